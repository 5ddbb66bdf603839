import asyncio

import pytest

from services.common.single_flight import SingleFlight


class Source:
    """Makes answers when it is allowed to, and counts them."""

    def __init__(self) -> None:
        self.made = 0
        self.allowed = asyncio.Event()

    async def make(self) -> int:
        self.made += 1
        await self.allowed.wait()
        return self.made


async def test_those_who_ask_at_once_and_later_share_one_answer():
    shared, source = SingleFlight[str, int](2), Source()
    waiting = [asyncio.create_task(shared.get("key", source.make)) for _ in range(5)]
    await asyncio.sleep(0)
    source.allowed.set()
    assert await asyncio.gather(*waiting) == [1] * 5
    assert await shared.get("key", source.make) == 1
    assert await shared.get("other", source.make) == 2


async def test_a_caller_that_leaves_takes_nothing_from_the_others():
    shared, source = SingleFlight[str, int](2), Source()
    first, second = (asyncio.create_task(shared.get("key", source.make)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    source.allowed.set()
    assert await second == 1


async def test_a_failure_is_not_kept():
    shared = SingleFlight[str, int](2)

    async def fail() -> int:
        raise ValueError("once")

    async def succeed() -> int:
        return 7

    with pytest.raises(ValueError, match="once"):
        await shared.get("key", fail)
    assert await shared.get("key", succeed) == 7


async def test_the_oldest_answer_is_forgotten():
    shared, source = SingleFlight[str, int](2), Source()
    source.allowed.set()
    for key in ("a", "b", "a", "c", "a", "b"):
        await shared.get(key, source.make)
    assert source.made == 4
