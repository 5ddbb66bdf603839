"""What decrypts. For client agents and the key authority; aggregation and coordinator never import it.

Non-guarantees:
- A decrypted value carries the noise of its ciphertext. Anyone who holds ciphertexts and sees their raw decryptions
  solves for the key (Li and Micciancio, Eurocrypt 2021). Decrypted values stay with those who hold the key;
  what is published from them is first rounded far above the noise, or is a function that hides it.
- Ciphertexts carry no authentication: anyone who can write to the channel can alter them; transport must protect it.
- Python and SEAL copy key material and do not wipe it: a process that held a key holds it until it ends.
- Nothing here is constant-time.
"""

import hashlib
import struct
from typing import Final, NoReturn

import numpy as np
from tenseal import sealapi

from shelora.ckks.evaluator import FloatArray, pad_to_chunks
from shelora.ckks.packing import UInt64Array
from shelora.ckks.parameters import VALUE_LIMIT, CkksParameters
from shelora.ckks.seal import Native, SealContext, seal_context
from shelora.ckks.wire import KEY_ID_BYTES, SEED_BYTES, BlockShape, FullBlock, SeededBlock, UInt8Array
from shelora.errors import DomainError, Reason

_MAGIC: Final = b"SLSK"
_VERSION: Final = 1
_KEY_HEADER: Final = struct.Struct("<4sH32s")
"""magic, version, parameters digest; then two bits a coefficient, value + 1, lowest bits first."""

_KEY_ID_DOMAIN: Final = b"shelora.ckks.key-id.v1"
_COEFFICIENTS_PER_BYTE: Final = 4
_SHIFTS: Final = np.arange(0, 8, 2, dtype=np.uint8)
_KEY_SCALE: Final = 1.0
"""SEAL stores a key as a plaintext whose scale is unused."""

_MAX_DEVIATIONS: Final = 8.0
"""Standard deviations by which a count of -1, 0 or 1 may differ from N / 3; a sound key fails once in 10^14."""


class SecretKey:
    """A ternary CKKS key. Its `repr` and `str` show the fingerprint only; it cannot be pickled or copied."""

    def __init__(self, parameters: CkksParameters, coefficients: UInt64Array) -> None:
        """Use `generate` or `from_bytes`. Args: coefficients: [N] of {0, 1, 2}, meaning {-1, 0, 1}."""
        self.parameters = parameters
        self._coefficients = coefficients
        self.key_id = self._fingerprint()

    @classmethod
    def generate(cls, parameters: CkksParameters) -> "SecretKey":
        """A fresh key, uniform over {-1, 0, 1}^N, from SEAL's generator (seeded by the operating system)."""
        context = seal_context(parameters)
        native = sealapi.KeyGenerator(context.native).secret_key()
        residues = context.from_ntt(context.read_plaintext(native, _KEY_SCALE))
        coefficients = (residues + np.uint64(1)) % np.uint64(parameters.modulus)
        _require_key(_is_plausible(coefficients))
        return cls(parameters, coefficients)

    @classmethod
    def from_bytes(cls, parameters: CkksParameters, data: bytes) -> "SecretKey":
        """Reads what `to_bytes` wrote; every other string of bytes is refused.

        Raises: DomainError(SECRET_UNAVAILABLE): wrong length, header or parameters; a coefficient that is not
            ternary; a distribution no generated key has (for instance all zero).
        """
        header = _KEY_HEADER.pack(_MAGIC, _VERSION, parameters.digest)
        _require_key(len(data) == len(header) + parameters.poly_degree // _COEFFICIENTS_PER_BYTE)
        _require_key(data.startswith(header))
        packed = np.frombuffer(data, dtype=np.uint8, offset=len(header))
        coefficients = (packed[:, None] >> _SHIFTS & 3).reshape(-1).astype(np.uint64)
        _require_key(_is_plausible(coefficients))
        return cls(parameters, coefficients)

    def to_bytes(self) -> bytes:
        """The key itself: 38 bytes of header, then N / 4 bytes. Anyone who reads them can decrypt everything."""
        quads = self._coefficients.astype(np.uint8).reshape(-1, _COEFFICIENTS_PER_BYTE)
        packed: UInt8Array = np.bitwise_or.reduce(quads << _SHIFTS, axis=1)
        return _KEY_HEADER.pack(_MAGIC, _VERSION, self.parameters.digest) + packed.tobytes()

    def __repr__(self) -> str:
        return f"SecretKey({self.parameters.name}, key {self.key_id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not pickled or copied; use to_bytes deliberately")

    def _native(self, context: SealContext) -> Native:
        modulus = np.uint64(self.parameters.modulus)
        residues = (self._coefficients + modulus - np.uint64(1)) % modulus
        return context.load_plaintext(sealapi.SecretKey(), context.to_ntt(residues), _KEY_SCALE)

    def _fingerprint(self) -> bytes:
        """First 16 bytes of SHA-256 over the key, in its own domain.

        A key is uniform over 3^N, so nobody finds it by guessing preimages: the digest may be public.
        """
        return hashlib.sha256(_KEY_ID_DOMAIN + self.to_bytes()).digest()[:KEY_ID_BYTES]


class Encryptor:
    """Encrypts under one key, symmetrically: smaller and less noisy than under a public key."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters = secret_key.parameters
        self.key_id = secret_key.key_id
        self._context = seal_context(secret_key.parameters)
        self._native = sealapi.Encryptor(self._context.native, secret_key._native(self._context))  # noqa: SLF001

    def __repr__(self) -> str:
        return f"Encryptor({self.parameters.name}, key {self.key_id.hex()})"

    def encrypt(self, values: FloatArray) -> SeededBlock:
        """Fresh ciphertexts of values [rows, total_slots], each within [-1, 1].

        Returns: a block of [rows, ceil(total_slots / slots)] ciphertexts; the last slots of a row hold zero.
        Raises: DomainError: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
        """
        _check_values(values)
        rows, total_slots = values.shape
        shape = BlockShape(
            parameters=self.parameters,
            key_id=self.key_id,
            rows=rows,
            chunks=self.parameters.chunks(total_slots),
            seeded=True,
        )
        c0 = np.empty((rows * shape.chunks, self.parameters.poly_degree), dtype=np.uint64)
        seeds = np.empty((rows * shape.chunks, SEED_BYTES), dtype=np.uint8)
        padded = pad_to_chunks(values, shape.chunks, self.parameters.slots)
        for index, slots in enumerate(padded.reshape(-1, self.parameters.slots)):
            plaintext = self._context.encode(slots, self.parameters.scale)
            sealed = self._native.encrypt_symmetric(plaintext)
            c0[index], seeds[index] = self._context.read_seeded(sealed)
        grid = (rows, shape.chunks)
        return SeededBlock(
            shape, c0.reshape(*grid, self.parameters.poly_degree), seeds.reshape(*grid, SEED_BYTES)
        )


class Decryptor:
    """Decrypts under one key. Callers show it only sums over at least two clients."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters = secret_key.parameters
        self.key_id = secret_key.key_id
        self._context = seal_context(secret_key.parameters)
        self._native = sealapi.Decryptor(self._context.native, secret_key._native(self._context))  # noqa: SLF001

    def __repr__(self) -> str:
        return f"Decryptor({self.parameters.name}, key {self.key_id.hex()})"

    def decrypt(self, block: FullBlock | SeededBlock, total_slots: int) -> FloatArray:
        """Values [rows, total_slots] of a sum, or of fresh ciphertexts.

        Raises: DomainError: CIPHERTEXT_FOREIGN_PARAMETERS; CIPHERTEXT_FOREIGN_KEY; CIPHERTEXT_WRONG_SHAPE:
            the block does not have the chunks that total_slots need.
        """
        self._check_origin(block.shape)
        shape = block.shape
        if total_slots < 0 or shape.chunks != self.parameters.chunks(total_slots):
            raise DomainError(Reason.CIPHERTEXT_WRONG_SHAPE, "the block's chunks do not fit total_slots")
        slots = self.parameters.slots
        values = np.empty((shape.rows, shape.chunks * slots))
        for row, chunk in np.ndindex(shape.rows, shape.chunks):
            values[row, chunk * slots : (chunk + 1) * slots] = self._slots(block, row, chunk)
        return values[:, :total_slots]

    def _slots(self, block: FullBlock | SeededBlock, row: int, chunk: int) -> FloatArray:
        if isinstance(block, SeededBlock):
            ciphertext = self._context.load_seeded(block.seeded_ciphertext(row, chunk))
        else:
            ciphertext = self._context.load_full(block.full_ciphertext(row, chunk))
        plaintext = sealapi.Plaintext()
        self._native.decrypt(ciphertext, plaintext)
        return self._context.decode(plaintext)

    def _check_origin(self, shape: BlockShape) -> None:
        if shape.parameters.digest != self.parameters.digest:
            raise DomainError(Reason.CIPHERTEXT_FOREIGN_PARAMETERS, "the block has other CKKS parameters")
        if shape.key_id != self.key_id:
            raise DomainError(Reason.CIPHERTEXT_FOREIGN_KEY, "the block is encrypted under another key")


def _check_values(values: FloatArray) -> None:
    if values.ndim != 2 or values.dtype != np.float64:
        raise DomainError(Reason.SHAPE_MISMATCH, "expected float64 values of shape [rows, slots]")
    if not np.isfinite(values).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, "values must be finite")
    if values.size and float(np.abs(values).max()) > VALUE_LIMIT:
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, "values must lie within [-1, 1]")


def _is_plausible(coefficients: UInt64Array) -> bool:
    """Ternary, and each of the three values about as frequent as in a uniform key."""
    if int(coefficients.max()) > 2:
        return False
    counts = np.bincount(coefficients.astype(np.intp), minlength=3)
    count = len(coefficients)
    deviation = np.abs(counts - count / 3).max()
    return bool(deviation <= _MAX_DEVIATIONS * np.sqrt(count * 2 / 9))


def _require_key(condition: bool) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.SECRET_UNAVAILABLE, "the secret key is not one of these parameters")
