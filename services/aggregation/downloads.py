"""Results on their way to agents: all agents of a round fetch the same bytes, which are read once for all of them.

Memory is bounded by turns and not by the size of the cohort: a thousand agents come at once when a round is published.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from services.aggregation.store import RESULT_RUN_BYTES, ShardStore
from services.common.single_flight import SingleFlight
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import cut

KEPT_RUNS: Final = 64
"""Runs of RESULT_RUN_BYTES kept for the next agent: 64 MiB."""

TURN_S: Final = 10.0
"""Seconds after which a download that is still under way makes room for another: slow readers must not hold up the
others, and hold little themselves."""


class Downloads:
    """The downloads of one replica.

    Args:
        store: Holds the results.
        concurrent: Downloads at once, about 1 MiB each beside the kept runs; others wait for their turn.
        turn_s: As TURN_S.
    """

    def __init__(self, store: ShardStore, concurrent: int, turn_s: float = TURN_S) -> None:
        self._store = store
        self._turns = asyncio.Semaphore(concurrent)
        self._turn_s = turn_s
        self._runs: SingleFlight[tuple[str, int, bytes, int], bytes] = SingleFlight(KEPT_RUNS)

    async def pieces(self, round_id: str, shard: int, offset: int) -> AsyncGenerator[bytes, None]:
        """The pieces of a published result from `offset` on. Raises RESULT_UNKNOWN, TRANSFER_OFFSET."""
        digest = await self._store.result_digest(round_id, shard)
        if offset > digest.total_bytes:
            raise DomainError(Reason.TRANSFER_OFFSET, f"the result has {digest.total_bytes} bytes")
        async with self._turn():
            while offset < digest.total_bytes:
                start = offset - offset % RESULT_RUN_BYTES
                read = partial(self._store.result_run, round_id, shard, digest, start)
                run = await self._runs.get((round_id, shard, digest.sha256, start), read)
                for piece in cut(run, offset - start):
                    yield piece
                offset = start + len(run)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Waits for a turn, which ends with the block or after `turn_s`."""
        over = False

        def end() -> None:
            nonlocal over
            if not over:
                over = True
                self._turns.release()

        await self._turns.acquire()
        timer = asyncio.get_running_loop().call_later(self._turn_s, end)
        try:
            yield
        finally:
            timer.cancel()
            end()
