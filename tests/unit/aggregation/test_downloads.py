import asyncio
from contextlib import aclosing

import pytest

from services.aggregation.downloads import Downloads
from services.aggregation.store import RESULT_RUN_BYTES
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import PIECE_BYTES, Digest

DATA = bytes(range(256)) * (RESULT_RUN_BYTES // 256 * 2 + 3)
"""Two runs and a bit."""


class Store:
    """Holds one result and counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    async def result_digest(self, round_id, shard):
        return Digest.of(DATA)

    async def result_run(self, round_id, shard, digest, offset):
        self.reads += 1
        await asyncio.sleep(0)
        return DATA[offset : offset + RESULT_RUN_BYTES]


async def fetched(downloads: Downloads, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in downloads.pieces("round", 0, offset)])


async def test_all_who_fetch_a_result_get_it_and_it_is_read_once():
    store = Store()
    downloads = Downloads(store, 100)
    assert set(await asyncio.gather(*(fetched(downloads) for _ in range(50)))) == {DATA}
    assert store.reads == 3


@pytest.mark.parametrize(
    "offset", [1, PIECE_BYTES, RESULT_RUN_BYTES - 1, RESULT_RUN_BYTES, len(DATA) - 1, len(DATA)]
)
async def test_a_download_begins_anywhere(offset: int):
    assert await fetched(Downloads(Store(), 1), offset) == DATA[offset:]


async def test_a_download_beyond_the_end_is_refused():
    with pytest.raises(DomainError) as refused:
        await fetched(Downloads(Store(), 1), len(DATA) + 1)
    assert refused.value.reason is Reason.TRANSFER_OFFSET


async def test_others_wait_for_their_turn_and_get_it_when_a_download_ends_or_breaks():
    downloads = Downloads(Store(), 1)
    async with aclosing(downloads.pieces("round", 0, 0)) as first:
        await anext(first)
        waiting = asyncio.create_task(fetched(downloads))
        await asyncio.sleep(0.01)
        assert not waiting.done()
    assert await waiting == DATA


async def test_a_slow_reader_does_not_hold_up_the_others():
    downloads = Downloads(Store(), 1, turn_s=0.01)
    async with aclosing(downloads.pieces("round", 0, 0)) as slow:
        first = await anext(slow)
        assert await fetched(downloads) == DATA
        assert first + b"".join([piece async for piece in slow]) == DATA
    assert await fetched(downloads) == DATA
