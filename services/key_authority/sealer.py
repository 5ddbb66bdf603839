"""Seals what the key authority keeps: AES-256-GCM under a key that does not lie beside it.

A sealed blob, version 1, integers big-endian:

    magic    4 bytes   "SHSL"
    version  1 byte    1
    key      16 bytes  public identifier of the sealing key, which distinguishes a wrong key from damage
    salt     32 bytes  random; HKDF-SHA256 (RFC 5869) of the sealing key under it gives this blob's key and nonce
    length   2 bytes   of the binding
    binding            what the blob is and where it belongs, in the clear
    sealed             ciphertext and 16-byte tag; everything before it is the associated data

Every blob has a key of its own, so there is no nonce to repeat and no limit on the number of blobs in practice.
"""

import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.key_authority.disk import read_secret
from shelora.errors import DomainError, Reason

KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 16

_MAGIC: Final = b"SHSL"
_VERSION: Final = 1
_SALT_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_HEAD: Final = struct.Struct(f">4sB{KEY_ID_BYTES}s{_SALT_BYTES}sH")
_HEXADECIMAL: Final = frozenset("0123456789abcdef")


class SealingKey:
    """The 32-byte key under which everything is sealed. The `repr` shows its public identifier only."""

    def __init__(self, key: bytes) -> None:
        """Raises: DomainError CONFIGURATION_INVALID if it has not 32 bytes."""
        if len(key) != KEY_BYTES:
            raise _not_a_key()
        self._key = key
        self.key_id: Final = self.derive(b"shelora/v1/sealing-key-id", None, KEY_ID_BYTES)
        """16 bytes that name the key and do not help to guess it."""

    def __repr__(self) -> str:
        return f"SealingKey({self.key_id.hex()})"

    @classmethod
    def from_hex(cls, hexadecimal: str) -> Self:
        """Reads 64 lower-case hexadecimal digits. Raises: DomainError CONFIGURATION_INVALID."""
        if len(hexadecimal) != 2 * KEY_BYTES or not _HEXADECIMAL.issuperset(hexadecimal):
            raise _not_a_key()
        return cls(bytes.fromhex(hexadecimal))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a file that only this user may read, with the key in hexadecimal.

        Raises: DomainError CONFIGURATION_INVALID; the message says what to run.
        """
        return cls.from_hex(read_secret(path, "sealing key"))

    def derive(self, info: bytes, salt: bytes | None, count: int) -> bytes:
        """`count` bytes of HKDF-SHA256 of the key."""
        return HKDF(algorithm=SHA256(), length=count, salt=salt, info=info).derive(self._key)


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What a blob is and where it belongs. It opens nowhere else."""

    purpose: str
    """What it holds, such as "epoch secrets"; one name for each kind of content."""

    vault: str = ""
    """Identity of the vault it belongs to."""

    federation_id: str = ""
    """Federation it belongs to, if to one."""

    epoch: int = 0
    """Epoch it belongs to, 0 if to none."""

    def encoded(self) -> bytes:
        """An encoding that no other binding has: every text carries its length."""
        texts = [text.encode() for text in (self.purpose, self.vault, self.federation_id)]
        return b"".join(struct.pack(">H", len(text)) + text for text in texts) + struct.pack(">Q", self.epoch)


class WrongSealingKeyError(DomainError):
    """A blob is sealed under another key than the one at hand."""

    def __init__(self, needed: bytes, given: bytes) -> None:
        super().__init__(
            Reason.SECRET_UNAVAILABLE,
            f"sealed under the sealing key {needed.hex()}, but the key at hand is {given.hex()}",
        )
        self.needed = needed


class SealBrokenError(DomainError):
    """A blob is damaged, of a newer format, or belongs elsewhere."""

    def __init__(self, what: str) -> None:
        super().__init__(Reason.SECRET_UNAVAILABLE, what)


class _Parts(NamedTuple):
    salt: bytes
    binding: bytes
    header: bytes
    sealed: bytes


class Sealer:
    """Seals and opens blobs under one key."""

    def __init__(self, key: SealingKey) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"Sealer({self.key_id.hex()})"

    @property
    def key_id(self) -> bytes:
        """Public identifier of the sealing key, 16 bytes."""
        return self._key.key_id

    def seal(self, binding: Binding, content: bytes) -> bytes:
        """A blob that only this key opens, and only as what `binding` says. Never the same twice."""
        return self._seal(binding.encoded(), content)

    def open(self, binding: Binding, blob: bytes) -> bytes:
        """The content of what was sealed with this binding.

        Raises: WrongSealingKeyError; SealBrokenError if a byte was changed, added or lost, or the binding is another.
        """
        parts = self._parts(blob)
        if parts.binding != binding.encoded():
            raise SealBrokenError(
                "sealed as something else: a file of another epoch, federation, vault or kind"
            )
        return self._open(parts)

    def resealed(self, blob: bytes, new: "Sealer") -> bytes:
        """The same content and binding under the key of `new`. Raises: as `open`."""
        parts = self._parts(blob)
        return new._seal(parts.binding, self._open(parts))  # noqa: SLF001 - of the same class

    def _seal(self, binding: bytes, content: bytes) -> bytes:
        salt = secrets.token_bytes(_SALT_BYTES)
        header = _HEAD.pack(_MAGIC, _VERSION, self.key_id, salt, len(binding)) + binding
        cipher, nonce = self._cipher(salt)
        return header + cipher.encrypt(nonce, content, header)

    def _open(self, parts: _Parts) -> bytes:
        cipher, nonce = self._cipher(parts.salt)
        try:
            return cipher.decrypt(nonce, parts.sealed, parts.header)
        except InvalidTag:
            raise SealBrokenError("damaged: it was changed after it was sealed") from None

    def _parts(self, blob: bytes) -> _Parts:
        """Takes a blob apart. Nothing in it is authentic before `_open` has succeeded."""
        key_id = key_id_of(blob)
        if key_id != self.key_id:
            raise WrongSealingKeyError(key_id, self.key_id)
        *_, salt, length = _HEAD.unpack_from(blob)
        end = _HEAD.size + length
        if len(blob) < end + _TAG_BYTES:
            raise SealBrokenError("damaged: it was cut short")
        return _Parts(salt, blob[_HEAD.size : end], blob[:end], blob[end:])

    def _cipher(self, salt: bytes) -> tuple[AESGCM, bytes]:
        stream = self._key.derive(b"shelora/v1/seal", salt, KEY_BYTES + _NONCE_BYTES)
        return AESGCM(stream[:KEY_BYTES]), stream[KEY_BYTES:]


def key_id_of(blob: bytes) -> bytes:
    """Identifier of the key that a blob says it is sealed under. Raises: SealBrokenError if it is not a sealed blob."""
    if len(blob) < _HEAD.size:
        raise SealBrokenError("damaged: it was cut short")
    magic, version, key_id, _, _ = _HEAD.unpack_from(blob)
    if magic != _MAGIC:
        raise SealBrokenError("damaged, or not a sealed file")
    if version != _VERSION:
        raise SealBrokenError(f"sealed in format {version}, which this version does not read")
    return bytes(key_id)


def _not_a_key() -> DomainError:
    return DomainError(
        Reason.CONFIGURATION_INVALID,
        "the sealing key must be 64 lower-case hexadecimal digits; "
        "make one with: shelora-key-authority make-sealing-key PATH",
    )
