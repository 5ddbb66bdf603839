"""Records of another version, as they are met while replicas of two versions run: told apart, and left as they are."""

import asyncio
import json

import pytest
import redis

from coordinator.keys import Keys
from coordinator.records import FederationRecord, Phase
from shelora.errors import DomainError, Reason
from tests.contract.coordinator.world import spec


@pytest.fixture
def stored(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        yield client


def make_newer(stored: redis.Redis, key: str) -> bytes:
    """Rewrites a record as the next version would. Returns it."""
    fields = {**json.loads(stored.hget(key, "data")), "format": 2, "priority": "high"}
    stored.hset(key, "data", json.dumps(fields))
    return stored.hget(key, "data")


async def test_a_newer_record_is_named_as_such_and_stays_as_it_is(fed, stored):
    await fed.begin(spec("none"))
    newer = make_newer(stored, Keys().federation("fed"))
    for call in (
        fed.federation(),
        fed.handlers.federations.start("fed"),
        fed.join("late"),
        fed.driver.step("fed"),
    ):
        with pytest.raises(
            DomainError, match="stored FederationRecord has format 2, and only 1 is read here"
        ) as caught:
            await call
        assert caught.value.reason is Reason.RECORD_UNREADABLE
    assert stored.hget(Keys().federation("fed"), "data") == newer


async def test_a_record_with_unknown_fields_is_not_taken_for_ours():
    with pytest.raises(DomainError, match="has other contents"):
        FederationRecord.read(b"{}")


async def test_a_driver_leaves_what_it_cannot_read_to_a_newer_replica(fed, stored):
    """Were it to keep the lease, the replica that can read the record would wait for ever."""
    await fed.begin(spec("none"))
    await fed.settle()
    make_newer(stored, Keys().round("fed", (await fed.federation()).instance, 1))
    async with asyncio.timeout(30):
        await fed.driver._hold("fed")
    assert await fed.store.leases.acquire("fed", "the newer replica", 60)


async def test_a_federation_of_a_newer_version_does_not_keep_others_from_being_driven(fed, stored):
    await fed.begin(spec("none"))
    other = spec("none").model_copy(update={"name": "a-newer-one"})
    await fed.handlers.federations.create(other)
    make_newer(stored, Keys().federation("a-newer-one"))
    driving = asyncio.create_task(fed.driver.run())
    try:
        async with asyncio.timeout(30):
            while not (await fed.federation()).ended:
                await fed.act()
                await asyncio.sleep(0.01)
    finally:
        driving.cancel()
        await asyncio.gather(driving, return_exceptions=True)
    assert (await fed.federation()).phase is Phase.FINISHED
