import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.aggregation import uploads
from services.aggregation.records import ShardSlot
from services.aggregation.settings import AggregationSettings
from services.aggregation.slots import SlotLimits, Slots
from shelora.errors import DomainError, Reason

LIMITS = SlotLimits(concurrent=8, client=2, federation=6)


def slot(federation, client, shard=0):
    return ShardSlot(f"{federation}.0.1", client, shard)


async def held(slots, stack, *taken):
    """Takes slots until one is not there at once; returns how many were."""
    for count, wanted in enumerate(taken):
        try:
            async with asyncio.timeout(0.02):
                await stack.enter_async_context(slots.taken(wanted))
        except TimeoutError:
            return count
    return len(taken)


async def test_slow_members_of_one_federation_leave_slots_to_another():
    """Two members with one byte in 15 s once held all slots of a replica."""
    slots = Slots(LIMITS)
    async with AsyncExitStack() as stack:
        assert await held(slots, stack, *[slot("hostile", "a", i) for i in range(9)]) == 2
        assert await held(slots, stack, *[slot("hostile", "b", i) for i in range(9)]) == 2
        assert await held(slots, stack, *[slot("hostile", f"c{i}") for i in range(9)]) == 2
        assert await held(slots, stack, slot("other", "a"), slot("other", "b"), slot("other", "c")) == 2


async def test_who_waits_for_its_own_slot_holds_up_nobody_else():
    slots = Slots(LIMITS)

    async def wait(wanted):
        async with slots.taken(wanted):
            pass

    async with AsyncExitStack() as stack:
        await held(slots, stack, slot("fed", "a", 0), slot("fed", "a", 1))
        waiting = asyncio.create_task(wait(slot("fed", "a", 2)))
        await asyncio.sleep(0)
        assert await held(slots, stack, *[slot("fed", f"m{i}") for i in range(4)]) == 4
        assert not waiting.done()
    await waiting
    assert not slots._clients._groups
    assert not slots._federations._groups


async def test_a_cancelled_wait_gives_its_place_back():
    slots = Slots(SlotLimits(concurrent=1, client=1, federation=1))
    async with AsyncExitStack() as stack:
        assert await held(slots, stack, slot("fed", "a"), slot("fed", "b")) == 1
    async with asyncio.timeout(1), slots.taken(slot("fed", "b")):
        pass
    assert not slots._federations._groups


async def drained(pace, pieces):
    while await pace.next(pieces) is not None:
        pass


async def test_an_upload_that_is_slow_for_long_loses_its_turn(monkeypatch):
    monkeypatch.setattr(uploads, "SLOW_S", 0.05)
    settings = AggregationSettings(
        identity=Path("x"), key_authority_address="x:1", upload_least_bytes_per_s=1000.0
    )
    limits = settings.upload_limits

    async def drops():
        while True:
            await asyncio.sleep(0.02)
            yield b"x"

    async def pours():
        for _ in range(10):
            await asyncio.sleep(0.02)
            yield bytes(1000)

    pace, slow = uploads._Pace(limits), drops()
    with pytest.raises(DomainError, match="fewer than 1000 a second; resume the upload") as caught:
        await drained(pace, slow)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    await slow.aclose()
    pace, fast = uploads._Pace(limits), pours()
    await drained(pace, fast)  # the control: who keeps pace goes on for as long
