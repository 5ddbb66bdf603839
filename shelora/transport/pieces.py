"""Cuts a serialized blob into pieces for a stream and puts it together again, checked."""

import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Final

from shelora.errors import DomainError, Reason

PIECE_BYTES: Final = 256 * 1024
"""Bytes in a piece: large enough that a message's overhead vanishes, small enough to share a connection."""

SHA256_BYTES: Final = 32


@dataclass(frozen=True)
class Digest:
    """SHA-256 and size in bytes of a blob.

    Raises: DomainError INVALID_ARGUMENT if the hash is not 32 bytes or the size is negative.
    """

    sha256: bytes
    total_bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != SHA256_BYTES:
            raise DomainError(Reason.INVALID_ARGUMENT, f"digest.sha256 must be {SHA256_BYTES} bytes")
        if self.total_bytes < 0:
            raise DomainError(Reason.INVALID_ARGUMENT, "digest.total_bytes must not be negative")

    @classmethod
    def of(cls, data: bytes | memoryview) -> "Digest":
        """Digest of `data`."""
        return cls(hashlib.sha256(data).digest(), memoryview(data).nbytes)


def cut(data: bytes | memoryview, offset: int = 0) -> Iterator[bytes]:
    """Pieces of `data` from byte `offset` on, in order, each of at most PIECE_BYTES.

    Raises: DomainError TRANSFER_OFFSET, at once, if `offset` is not in 0 to the size of `data`.
    """
    view = memoryview(data).cast("B")
    if not 0 <= offset <= len(view):
        raise DomainError(Reason.TRANSFER_OFFSET, f"offset {offset} is outside of 0 to {len(view)} bytes")
    return (bytes(view[start : start + PIECE_BYTES]) for start in range(offset, len(view), PIECE_BYTES))


class Assembler:
    """Collects the pieces of one blob. Never holds more bytes than the blob was announced to have.

    Args:
        digest: What the sender announced.
        limit_bytes: Most bytes the receiver accepts, whatever is announced.

    Raises: DomainError TRANSFER_TOO_LARGE if more than `limit_bytes` are announced.
    """

    def __init__(self, digest: Digest, limit_bytes: int) -> None:
        if digest.total_bytes > limit_bytes:
            raise DomainError(
                Reason.TRANSFER_TOO_LARGE,
                f"{digest.total_bytes} bytes announced, at most {limit_bytes} are accepted",
            )
        self._digest = digest
        self._data = bytearray()
        self._hash = hashlib.sha256()

    @property
    def received_bytes(self) -> int:
        """Bytes added so far; the offset to resume from."""
        return len(self._data)

    def add(self, piece: bytes) -> None:
        """Takes the next piece.

        Raises: DomainError TRANSFER_TOO_LARGE if it goes beyond the announced size; it is not kept then.
        """
        if len(self._data) + len(piece) > self._digest.total_bytes:
            raise DomainError(
                Reason.TRANSFER_TOO_LARGE, f"more than the announced {self._digest.total_bytes} bytes arrived"
            )
        self._data += piece
        self._hash.update(piece)

    def finish(self) -> bytes:
        """The blob.

        Raises: DomainError TRANSFER_TRUNCATED if bytes are missing, DIGEST_MISMATCH if they are other bytes.
        """
        if len(self._data) < self._digest.total_bytes:
            raise DomainError(
                Reason.TRANSFER_TRUNCATED,
                f"{len(self._data)} of {self._digest.total_bytes} announced bytes arrived",
            )
        if self._hash.digest() != self._digest.sha256:
            raise DomainError(Reason.DIGEST_MISMATCH, "the bytes received do not have the announced SHA-256")
        return bytes(self._data)


async def collect(pieces: AsyncIterator[bytes], digest: Digest, limit_bytes: int) -> bytes:
    """The blob that `pieces` make up; stops reading at the first piece too many.

    Raises: DomainError TRANSFER_TOO_LARGE, TRANSFER_TRUNCATED or DIGEST_MISMATCH.
    """
    assembler = Assembler(digest, limit_bytes)
    async for piece in pieces:
        assembler.add(piece)
    return assembler.finish()
