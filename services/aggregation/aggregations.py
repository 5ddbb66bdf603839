"""Aggregates shards: the same request once, however often it comes."""

import asyncio
from typing import Protocol

import structlog

from services.aggregation import metrics
from services.aggregation.answers import HELP, read_answer, read_help
from services.aggregation.records import AggregationRequest, StoredResult
from services.aggregation.store import ShardStore, shard_missing
from shelora.lora.parts import part_count


class Pool(Protocol):
    """What runs jobs: `WorkerPool`."""

    async def run(self, line: bytes) -> bytes:
        """A worker's answer. Raises WORKER_FAILED."""

    async def spread(self, line: bytes) -> list[bytes]:
        """Answers of the workers that had nothing more urgent to do."""


_log = structlog.get_logger(__name__)


class Aggregations:
    """The aggregations of one replica. Other replicas may compute the same; the first result stored wins."""

    def __init__(self, store: ShardStore, pool: Pool) -> None:
        self._store = store
        self._pool = pool
        self._running: dict[bytes, asyncio.Task[StoredResult]] = {}
        self._helping: dict[bytes, asyncio.Task[None]] = {}

    async def aggregate(self, request: AggregationRequest) -> StoredResult:
        """The result of a request, computed if it is not stored. A caller that leaves does not stop the computation.

        Raises: ROUND_UNKNOWN, SHARD_UNKNOWN, SHARD_MISSING, WORKER_FAILED; SHARD_REWRITTEN if a newer request for the
        shard took this one's place.
        """
        running = self._running.get(request.digest)
        if running is None:
            running = asyncio.create_task(self._aggregate(request), name=f"aggregate-{request.shard}")
            self._running[request.digest] = running
            running.add_done_callback(lambda task: self._ended(request, task))
        return await asyncio.shield(running)

    async def help(self, request: AggregationRequest) -> None:
        """Has workers that have nothing else to do make parts of a shard; returns before they have.

        Raises: ROUND_UNKNOWN, SHARD_UNKNOWN.
        """
        layout = await self._store.layout(request.round_id)
        parts = part_count(layout, request.shard, len(request.contributions))
        if parts > 1 and request.digest not in self._helping:
            task = asyncio.create_task(self._help(request), name=f"help-{request.shard}")
            self._helping[request.digest] = task
            task.add_done_callback(lambda _: self._helping.pop(request.digest))

    async def _help(self, request: AggregationRequest) -> None:
        for answer in await self._pool.spread(HELP + request.to_line()):
            metrics.PARTS.inc(read_help(answer))

    async def _aggregate(self, request: AggregationRequest) -> StoredResult:
        # A repeated request gets the first answer, also after the round was closed.
        stored = await self._store.result(request)
        if stored is not None:
            return stored
        await self._check(request)
        stored = await self._store.claim(request)
        if stored is not None:
            return stored
        return self._counted(request, read_answer(await self._pool.run(request.to_line())))

    async def _check(self, request: AggregationRequest) -> None:
        """Raises ROUND_UNKNOWN, SHARD_UNKNOWN, SHARD_MISSING."""
        layout = await self._store.layout(request.round_id)
        layout.shard(request.shard)
        missing = await self._store.missing(request)
        if missing is not None:
            raise shard_missing(missing)

    def _counted(self, request: AggregationRequest, result: StoredResult) -> StoredResult:
        metrics.SHARDS.inc()
        metrics.SHARD_CPU.inc(result.cpu_s)
        metrics.STORED_BYTES.labels("result").inc(result.digest.total_bytes)
        _log.info(
            "shard_aggregated",
            round_id=request.round_id,
            shard=request.shard,
            contributor_count=len(request.contributions),
            total_bytes=result.digest.total_bytes,
            cpu_s=result.cpu_s,
        )
        return result

    def _ended(self, request: AggregationRequest, task: asyncio.Task[StoredResult]) -> None:
        del self._running[request.digest]
        if not task.cancelled():
            task.exception()  # seen: the callers that are left have it, and nobody else needs it
