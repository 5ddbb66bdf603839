"""Receives shards: announced, stored piece by piece, checked to the last coefficient, then complete."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from services.aggregation import metrics
from services.aggregation.records import ShardSlot, Upload
from services.aggregation.slots import SlotLimits, Slots
from services.aggregation.store import ShardStore
from services.aggregation.watermark import Watermark
from shelora.errors import DomainError, Reason
from shelora.lora.codec import validate_update
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout
from shelora.lora.screening import squared_norm
from shelora.transport.pieces import PIECE_BYTES, Digest

BATCH_BYTES: Final = 1024 * 1024
"""Bytes that are stored in one command; what an upload holds in memory while it arrives."""

BREAK_GRACE_S: Final = 1.0
"""Time for a broken connection to show itself. gRPC ends a request stream alike when the sender is done and when the
connection broke; in the second case it cancels the call a moment later, and the bytes must stay."""

_log = structlog.get_logger(__name__)


SLOW_S: Final = 30.0
"""Seconds over which the least rate is held: a pause of a phone's connection is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """What uploads may take of this replica."""

    slots: SlotLimits
    """Uploads received at once; others wait."""
    checks: int
    """Shards checked at once: each is whole in memory and keeps a thread busy."""
    idle_s: float
    """Seconds without a piece after which an upload loses its place; its bytes stay."""
    least_bytes_s: float
    """Bytes a second, on average since it has its place, below which an upload loses it after SLOW_S; its bytes stay.
    0 for any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The header of an upload."""

    slot: ShardSlot
    digest: Digest
    offset: int
    layout_digest: bytes


class Uploads:
    """The uploads of one replica."""

    def __init__(
        self,
        store: ShardStore,
        limits: UploadLimits,
        new_token: Callable[[], str],
        watermark: Watermark | None = None,
    ) -> None:
        """Takes `new_token`, which draws 32 random hex digits, and what is known of Redis' memory."""
        self._store = store
        self._watermark = watermark or Watermark()
        self._limits = limits
        self._new_token = new_token
        self._slots = Slots(limits.slots)
        self._checking = asyncio.Semaphore(limits.checks)

    async def receive(self, announced: Announcement, pieces: AsyncIterator[bytes]) -> bool:
        """Receives one shard.

        Returns: True if this content was complete before; not a piece is read then.
        Raises: what PutShard names. Every refusal deletes the bytes; STORE_UNAVAILABLE and cancellation keep them.
        """
        layout = await self._store.layout(announced.slot.round_id)
        rank = await self._store.largest_rank(announced.slot.round_id, announced.slot.client_id)
        _check_announcement(layout, announced, layout.max_rank if rank is None else rank)
        async with self._slots.taken(announced.slot):
            upload = await self._store.begin(announced.slot, announced.digest, self._new_token())
            if upload is None:
                return True
            try:
                self._watermark.require(announced.digest.total_bytes - upload.received_bytes)
                return not await self._complete(layout, upload, announced.offset, pieces)
            except DomainError as error:
                if error.reason is not Reason.STORE_UNAVAILABLE:
                    await self._store.forget(upload)
                raise

    async def _complete(
        self, layout: Layout, upload: Upload, offset: int, pieces: AsyncIterator[bytes]
    ) -> bool:
        """Returns False if another call completed the same content first."""
        if offset > upload.received_bytes:
            message = f"offset {offset} is beyond the {upload.received_bytes} bytes received"
            raise DomainError(Reason.TRANSFER_OFFSET, message)
        with metrics.UPLOADS.track_inprogress():
            await self._transfer(upload, offset, pieces)
        checked = await self._check(layout, upload)
        if checked is None or not await self._store.promote(upload, checked.squared_norm):
            return False
        metrics.STORED_BYTES.labels("update_encrypted").inc(checked.encrypted_bytes)
        metrics.STORED_BYTES.labels("update_clear").inc(upload.digest.total_bytes - checked.encrypted_bytes)
        _log.info("shard_stored", total_bytes=upload.digest.total_bytes, **_fields(upload.slot))
        return True

    async def _transfer(self, upload: Upload, offset: int, pieces: AsyncIterator[bytes]) -> None:
        """Stores the pieces as they arrive, to the last, or until another call has completed the same content."""
        batch, pace = _Batch(self._store, upload, offset), _Pace(self._limits)
        try:
            while not batch.overtaken and (piece := await pace.next(pieces)) is not None:
                await batch.add(piece)
            if not batch.overtaken and batch.end < upload.digest.total_bytes:
                await asyncio.sleep(BREAK_GRACE_S)
                message = f"{batch.end} of {upload.digest.total_bytes} announced bytes arrived"
                raise DomainError(Reason.TRANSFER_TRUNCATED, message)
            await batch.flush()
        except (asyncio.CancelledError, _SlowError):
            with suppress(DomainError):  # the bytes that can be kept are; why the call ends is known already
                await batch.flush()
            raise

    async def _check(self, layout: Layout, upload: Upload) -> "_Checked | None":
        """Checks the stored bytes, in a thread: numpy over tens of MiB would keep every other call waiting.

        Returns: None if another call completed the same content first.
        """
        async with self._checking:
            data = await self._store.read(upload)
            if len(data) == upload.digest.total_bytes:
                return await asyncio.to_thread(_verified, layout, upload, data)
        if await self._store.is_complete(upload):
            return None
        raise DomainError(Reason.SHARD_REWRITTEN, "a later upload with other content took this one's place")


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is told of checked content."""

    squared_norm: float
    encrypted_bytes: int


class _SlowError(DomainError):
    """The sender is quiet or slow. It may come back and resume, as after any failure that passes."""

    def __init__(self, what: str) -> None:
        super().__init__(Reason.STORE_UNAVAILABLE, f"{what}; resume the upload")


class _Pace:
    """How fast the pieces of an upload come; the time that we take to store them does not count."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._waited_s = 0.0
        self._received = 0

    async def next(self, pieces: AsyncIterator[bytes]) -> bytes | None:
        """The next piece, None after the last. Raises _SlowError if it takes too long, or all have."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(self._limits.idle_s):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise _SlowError(f"no piece arrived for {self._limits.idle_s:g} s") from None
        self._waited_s += loop.time() - began_s
        if piece is not None:
            self._received += len(piece)
            self._require_pace()
        return piece

    def _require_pace(self) -> None:
        least = self._limits.least_bytes_s
        if self._waited_s > SLOW_S and self._received < least * self._waited_s:
            raise _SlowError(
                f"{self._received} bytes arrived in {self._waited_s:.0f} s, fewer than {least:g} a second"
            )


class _Batch:
    """Pieces on their way to the store."""

    def __init__(self, store: ShardStore, upload: Upload, offset: int) -> None:
        self._store = store
        self._upload = upload
        self._offset = offset
        self._buffer = bytearray()
        self.overtaken = False
        """Another call completed the same content."""

    @property
    def end(self) -> int:
        """Bytes received so far, counted from the beginning of the shard."""
        return self._offset + len(self._buffer)

    async def add(self, piece: bytes) -> None:
        """Takes the next piece. Raises TRANSFER_TOO_LARGE, and what storing raises."""
        total = self._upload.digest.total_bytes
        if len(piece) > PIECE_BYTES:
            raise DomainError(Reason.TRANSFER_TOO_LARGE, f"a piece has more than {PIECE_BYTES} bytes")
        if self.end + len(piece) > total:
            raise DomainError(Reason.TRANSFER_TOO_LARGE, f"more than the announced {total} bytes arrived")
        metrics.RECEIVED_BYTES.inc(len(piece))
        self._buffer += piece
        if len(self._buffer) >= BATCH_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Stores what was added. May be repeated after it was cancelled: stored bytes are skipped."""
        if self._buffer and not self.overtaken:
            self.overtaken = not await self._store.append(self._upload, self._offset, bytes(self._buffer))
            self._offset += len(self._buffer)
            self._buffer.clear()


def _check_announcement(layout: Layout, announced: Announcement, rank: int) -> None:
    """Holds an upload against its round and the largest rank of its client's update."""
    if announced.layout_digest != layout.digest:
        raise DomainError(Reason.LAYOUT_MISMATCH, "the round is open with another layout")
    shard = layout.shard(announced.slot.shard)
    kind, total = kind_of(shard), announced.digest.total_bytes
    if total > (largest := kind.largest_update_bytes(layout, shard, layout.max_rank)):
        raise DomainError(
            Reason.TRANSFER_TOO_LARGE, f"{total} bytes announced, at most {largest} are accepted"
        )
    if total > kind.largest_update_bytes(layout, shard, rank):
        raise DomainError(
            Reason.NOT_IN_COHORT,
            f"this round asked this client for rank {rank} at most: join again for the next",
        )


def _verified(layout: Layout, upload: Upload, data: bytes) -> _Checked:
    """Checks a shard. Raises what PutShard names of contents."""
    if hashlib.sha256(data).digest() != upload.digest.sha256:
        raise DomainError(Reason.DIGEST_MISMATCH, "the bytes received do not have the announced SHA-256")
    content = validate_update(layout, upload.slot.shard, data)
    return _Checked(squared_norm(layout, content), len(content.ciphertexts))


def _fields(slot: ShardSlot) -> dict[str, str | int]:
    """A slot as fields of a log record."""
    return {"round_id": slot.round_id, "client_id": slot.client_id, "shard": slot.shard}
