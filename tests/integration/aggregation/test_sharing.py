"""Workers that share a shard, over a real Redis: each part is made once, and none is missing whoever dies."""

import asyncio
from dataclasses import replace

import pytest

from coordinator.aggregation import AggregationPool
from services.aggregation import sharing, worker
from services.aggregation.keys import RoundKeys
from services.aggregation.servicer import _aggregation_request
from services.aggregation.store import connect_worker
from shelora.errors import DomainError, Reason
from shelora.lora import parts
from shelora.transport.channel import open_channel
from shelora.transport.replicas import Replicas
from shelora.v1 import aggregation_pb2 as pb
from tests.integration.aggregation.cohort import Cohort, small_layout
from tests.integration.aggregation.service import ROUND, InlinePool, eventually, replica

PARTS = 4


@pytest.fixture(scope="module")
def crowd():
    return Cohort(size=2 * PARTS, layout=lambda key_id: replace(small_layout(key_id), max_directions=64))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_RUN", 2)
    monkeypatch.setattr("coordinator.aggregation.LEAST_RUN", 2)


@pytest.fixture
def store(redis_url):
    store = connect_worker(redis_url, timeout_s=10)
    yield store
    store.close()


@pytest.fixture
def reads(monkeypatch):
    """The clients whose updates are read, for a sum or before it."""
    found = []
    load = worker._Updates.load

    def counted(self, client_id):
        found.append(client_id)
        return load(self, client_id)

    monkeypatch.setattr(worker._Updates, "load", counted)
    return found


@pytest.fixture
async def ready(caller, crowd):
    """The round's updates are stored."""
    await caller.open(crowd.layout)
    await caller.put_all(crowd)


@pytest.fixture
def requested(crowd, keys):
    """Makes requests that have been claimed."""

    def request(shard=2):
        contributions = crowd.contributions(shard)
        made = _aggregation_request(
            pb.AggregateShardRequest(round_id=ROUND, shard=shard, contributions=contributions)
        )
        wanted(keys, shard, made)
        return made

    return request


def wanted(keys, shard, request):
    key = RoundKeys(ROUND).result(shard)
    keys.client.hset(key, "wanted", request.digest)
    keys.client.expire(key, 60)


def shared_keys(keys):
    return [key for key in keys.client.scan_iter() if b":shared:" in key]


@pytest.mark.usefixtures("ready")
def test_what_helpers_made_is_used_and_nothing_of_it_is_left(crowd, store, requested, reads, keys):
    request = requested()
    assert worker.help_with(store, request) == PARTS
    assert worker.help_with(store, request) == 0, "all parts are taken"
    assert reads == crowd.clients, "every update was read by the helper"
    result = worker.run(store, request)
    assert reads == crowd.clients, "and by nobody else"
    assert shared_keys(keys) == []
    assert result.cpu_s > 0
    assert worker.help_with(store, request) == 0, "help that comes late does nothing"
    assert shared_keys(keys) == []


async def test_a_round_shared_by_two_replicas_gives_the_weighted_sum(redis_url, crowd, pool):
    """Through the coordinator's own calls, which ask both replicas for help."""
    helping = InlinePool(redis_url)
    async with replica(redis_url, pool) as one, replica(redis_url, helping) as other:
        await one.open(crowd.layout)
        await one.put_all(crowd)
        replicas = Replicas([one.address, other.address], open_channel, refresh_s=600)
        pooled = AggregationPool(replicas, retry_s=5)
        for shard in range(3):
            await pooled.aggregate(ROUND, shard, crowd.contributions(shard))
        crowd.assert_aggregate([await one.result(shard) for shard in range(3)])

        async def asked() -> bool:
            return pool.jobs + helping.jobs == 3 * (1 + 2)

        await eventually(asked)
        await replicas.close()
    helping.close()


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("shard", [0, 2], ids=["matrices", "tensors"])
@pytest.mark.parametrize("died", ["before it read", "before it stored"])
async def test_parts_of_a_helper_that_died_are_made_by_the_leader(
    caller, crowd, store, requested, monkeypatch, shard, died
):
    request = requested(shard)
    made = []

    def dies(request, part, *sum_of_it):
        made.append(part)
        if len(made) == 2:
            raise DomainError(Reason.STORE_FULL, "simulated death")
        return store_partial(request, part, *sum_of_it)

    store_partial = store.put_partial
    if died == "before it stored":
        monkeypatch.setattr(store, "put_partial", dies)
        with pytest.raises(DomainError):
            worker.help_with(store, request)
        assert made == [0, 1]
    else:
        assert store.take(request, 1)
    monkeypatch.setattr(sharing, "PATIENCE", 0.0)
    worker.run(store, request)
    for index in {0, 1, 2} - {shard}:
        worker.run(store, requested(index))
    crowd.assert_aggregate([await caller.result(index) for index in range(3)])


@pytest.mark.usefixtures("ready")
def test_a_leader_that_died_leaves_its_parts_to_the_next(crowd, store, requested, reads):
    request = requested()
    assert store.take(request, 0)
    assert worker.help_with(store, request) == PARTS - 1
    worker.run(store, request)
    assert sorted(reads) == sorted(crowd.clients), (
        "the dead leader's part was made, the others' were not again"
    )


@pytest.mark.usefixtures("ready")
def test_help_for_a_request_that_another_took_the_place_of_does_nothing(store, requested, keys):
    older, newer = requested(2), requested(0)
    wanted(keys, 2, newer)
    assert worker.help_with(store, older) == 0
    assert shared_keys(keys) == []


@pytest.mark.usefixtures("ready")
async def test_a_leader_waits_for_helpers_no_longer_than_a_part_takes(requested, store, monkeypatch):
    """A helper in the middle of a part stores it while the leader waits; the leader does not make it again."""
    request = requested()
    assert store.take(request, PARTS - 1)
    monkeypatch.setattr(sharing, "PATIENCE", 1e9)
    leading = asyncio.create_task(asyncio.to_thread(worker.run, store, request))
    helper = worker._work(store, request)
    total = helper.sum(b"")
    helper.add(total, PARTS - 1)
    await asyncio.sleep(0.2)
    assert not leading.done()
    store.put_partial(request, PARTS - 1, total.partial(), 2.5)
    assert (await leading).cpu_s > 2.5
