"""What agents derive from the obfuscation secret: column orders, initial factors, keys and labels of plans,
keys of committees.

Columns travel in a secret order, the same for all agents and unknown to every server, and LoRA starts from a secret
A. Without them the clear part of an update gives training text away even when nearly all columns are encrypted
(docs/threat-model.md). Every derived stream is HKDF-SHA256 (RFC 5869) of the secret, bound to epoch, purpose and
name, expanded by ChaCha20 (RFC 8439).
"""

import math
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason

SECRET_BYTES = 32
_WORD_BYTES = 8
_UNIT = 2.0**-53
"""Turns the upper 53 bits of a word into a number in [0, 1)."""


class Obfuscation:
    """Everything keyed by one epoch's obfuscation secret."""

    def __init__(self, secret: bytes, epoch: int) -> None:
        """Takes 32 secret bytes and the number of the epoch."""
        if len(secret) != SECRET_BYTES:
            raise DomainError(Reason.SECRET_UNAVAILABLE, f"an obfuscation secret has {SECRET_BYTES} bytes")
        self._secret = secret
        self.epoch = epoch

    @classmethod
    def public(cls, name: str, epoch: int = 0) -> "Obfuscation":
        """What everyone can derive from a name: values that agents must agree on and that are not secret."""
        return cls(sha256(f"shelora/v1/{name}".encode()).digest(), epoch)

    def __repr__(self) -> str:
        return f"Obfuscation(epoch={self.epoch})"

    def permutation(self, matrix: str, columns: int) -> NDArray[np.int64]:
        """Secret order of a matrix's columns: entry k is the true index of the column at position k."""
        return np.argsort(self._words("column-order", matrix, columns), kind="stable")

    def initial_A(self, matrix: str, rank: int, columns: int) -> NDArray[np.float32]:
        """Initial A [rank, columns], uniform in ±1/sqrt(columns) as in PEFT; smaller ranks are its first rows."""
        return self._uniform("initial-factor", matrix, (rank, columns), 1 / math.sqrt(columns))

    def initial_tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Initial value of a tensor trained whole: uniform in ±1/sqrt(fan in); zero for vectors."""
        if len(shape) < 2:
            return np.zeros(shape, dtype=np.float32)
        return self._uniform("initial-tensor", name, shape, 1 / math.sqrt(math.prod(shape[1:])))

    def labels(self, vote: str, matrix: str, columns: int) -> NDArray[np.int64]:
        """Secret labels of a matrix's columns in one vote: entry k is the true index of the column labelled k."""
        name = f"{len(vote)}:{vote}/{matrix}"  # the length keeps two pairs of names apart
        return np.argsort(self._words("ballot-label", name, columns), kind="stable")

    def increasing(self, vote: str, levels: int) -> NDArray[np.uint64]:
        """A random strictly increasing function of 0 to levels - 1, at most 2^32 levels, for one vote; below 2^63.

        A range of 2^62 is halved again and again, each time at a random point of it. Sums of independent draws would
        be simpler, but close to a straight line: they show the distances of scores beside their order.
        """
        depth = max(1, (levels - 1).bit_length())
        cuts = self._unit("ballot-value", vote, 2**depth)
        shares = np.ones(1)
        for level in range(depth):
            left = shares * cuts[2**level : 2 ** (level + 1)]
            shares = np.stack([left, shares - left], axis=1).reshape(-1)
        steps = (shares[:levels] * 2.0**62).astype(np.uint64) + np.uint64(1)
        return np.cumsum(steps, dtype=np.uint64)

    def sketch(self, side: str, matrix: str, number: int, shape: tuple[int, int]) -> NDArray[np.int16]:
        """Χ or Φ of a matrix in training round `number`: integers of about a normal distribution.

        Each is the sum of four bytes less 510: within ±510, of mean 0 and variance 21845. Integers, so that every
        machine has the same to the bit. Args: side: "columns" for Χ, "rows" for Φ.
        """
        rows, columns = shape
        words = self._words(f"sketch-{side}", f"{number}/{matrix}", -(-rows * columns // 2))
        quads = words.astype("<u8", copy=False).view("<u4")[: rows * columns]
        pairs = (quads & np.uint32(0x00FF00FF)) + ((quads >> np.uint32(8)) & np.uint32(0x00FF00FF))
        sums = (pairs + (pairs >> np.uint32(16))).astype(np.uint16)  # what is above wraps away
        centred: NDArray[np.int16] = sums.view(np.int16).reshape(shape) - np.int16(510)
        return centred

    def plan_key(self) -> bytes:
        """AES-256 key under which agents exchange plans."""
        return self._derive("plan-key", "")

    def committee_key(self) -> bytes:
        """HMAC key that orders the clients of a cohort, so that no server chooses a committee."""
        return self._derive("committee-order", "")

    def answer_key(self) -> bytes:
        """AES-256 key under which committee members answer all clients."""
        return self._derive("committee-answer", "")

    def tag(self, part: str, digest: bytes) -> bytes:
        """A keyed digest, 32 bytes: equal for equal digests of one epoch, and nothing else to all who lack the secret.

        HKDF-Expand is HMAC-SHA256 of its input here (RFC 5869, section 2.3), a pseudorandom function.
        """
        return self._derive("base-model", f"{part}/{digest.hex()}")

    def _uniform(self, purpose: str, name: str, shape: tuple[int, ...], bound: float) -> NDArray[np.float32]:
        unit = self._unit(purpose, name, math.prod(shape))
        return ((2 * unit - 1) * bound).astype(np.float32).reshape(shape)

    def _unit(self, purpose: str, name: str, count: int) -> NDArray[np.float64]:
        """Numbers in [0, 1), of 53 bits."""
        unit: NDArray[np.float64] = (self._words(purpose, name, count) >> np.uint64(11)).astype(np.float64)
        return unit * _UNIT

    def _words(self, purpose: str, name: str, count: int) -> NDArray[np.uint64]:
        """`count` 64-bit words of the key stream of (epoch, purpose, name)."""
        cipher = Cipher(algorithms.ChaCha20(self._derive(purpose, name), bytes(16)), mode=None)
        stream = cipher.encryptor().update(bytes(count * _WORD_BYTES))
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64)

    def _derive(self, purpose: str, name: str) -> bytes:
        info = f"shelora/v1/{purpose}/{self.epoch}/{name}".encode()
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._secret)


def epoch_secret_id(secret: bytes) -> bytes:
    """Public identifier of an obfuscation secret, 16 bytes. It does not help to guess 32 random bytes."""
    return sha256(b"shelora/v1/epoch-secret-id" + secret).digest()[:16]
