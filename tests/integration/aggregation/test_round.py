"""A round over real gRPC and a real Redis: upload, aggregate, download."""

import asyncio
from dataclasses import replace as changed

import pytest

from services.aggregation.keys import RoundKeys
from shelora.errors import Reason
from shelora.v1 import aggregation_pb2 as pb
from tests.integration.aggregation.cohort import Cohort, large_layout
from tests.integration.aggregation.service import ROUND, TTL_S, Caller, InlinePool, refusal, replica

SHARDS = range(3)


async def aggregated(caller: Caller, cohort: Cohort) -> list[bytes]:
    for shard in SHARDS:
        await caller.aggregate(cohort, shard)
    return [await caller.result(shard) for shard in SHARDS]


async def test_a_round_gives_the_weighted_sum_of_its_updates(caller, cohort):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    cohort.assert_aggregate(await aggregated(caller, cohort))


async def test_every_key_of_a_round_expires_with_it(caller, cohort, keys):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    await aggregated(caller, cohort)
    half = cohort.shard_bytes("client-0", 0)[:100]
    await refusal(caller.put(cohort.layout, "client-9", 0, half))
    assert all(0 < keys.client.ttl(key) <= TTL_S for key in keys.client.scan_iter())


async def test_closing_a_round_deletes_its_updates_and_keeps_its_results(caller, cohort):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    results = await aggregated(caller, cohort)
    await caller.close(results=False)
    assert [await caller.result(shard) for shard in SHARDS] == results
    assert await refusal(caller.progress("client-0")) is Reason.ROUND_UNKNOWN
    late = caller.put(cohort.layout, "client-0", 0, cohort.shard_bytes("client-0", 0))
    assert await refusal(late) is Reason.ROUND_UNKNOWN


async def test_closing_a_round_with_its_results_leaves_nothing(caller, cohort, keys):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    await aggregated(caller, cohort)
    await caller.close(results=True)
    await caller.close(results=True)
    assert keys.client.keys() == [RoundKeys(ROUND).closed.encode()]
    assert await refusal(caller.result(0)) is Reason.RESULT_UNKNOWN


async def test_an_aggregation_repeated_after_the_round_was_closed_gets_the_first_answer(caller, cohort, pool):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    first = await caller.aggregate(cohort, 0)
    await caller.close(results=False)
    assert await caller.aggregate(cohort, 0) == first
    assert pool.jobs == 1


async def test_the_same_aggregation_asked_many_times_at_once_is_computed_once(caller, cohort, pool):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    answers = await asyncio.gather(*(caller.aggregate(cohort, 0) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    assert pool.jobs == 1


async def test_two_replicas_on_one_redis_serve_each_others_uploads_and_give_the_same_bytes(
    redis_url, cohort, pool
):
    async with replica(redis_url, pool) as one, replica(redis_url, pool) as other:
        await one.open(cohort.layout)
        for number, client in enumerate(cohort.clients):
            for shard in SHARDS:
                await (one, other)[number % 2].put(
                    cohort.layout, client, shard, cohort.shard_bytes(client, shard)
                )
        answers = await asyncio.gather(one.aggregate(cohort, 0), other.aggregate(cohort, 0))
        assert pool.jobs == 2
        assert answers[0] == answers[1]
        assert await one.result(0) == await other.result(0)
        assert len(await one.result(0)) == answers[0].digest.total_bytes


async def test_a_new_request_for_a_shard_replaces_its_result(caller, cohort, pool, keys):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    first = await caller.aggregate(cohort, 0)
    stored = len(keys.client.keys())
    fewer = cohort.contributions(0, ["client-0", "client-1"])
    for part in fewer:
        part.weight = 0.5
    request = pb.AggregateShardRequest(round_id=ROUND, shard=0, contributions=fewer)
    second = await caller.stub.AggregateShard(request)
    assert second.digest != first.digest
    assert len(await caller.result(0)) == second.digest.total_bytes
    assert len(keys.client.keys()) == stored


async def test_a_result_can_be_fetched_from_any_offset(caller, cohort):
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    await caller.aggregate(cohort, 0)
    whole = await caller.result(0)
    assert await caller.result(0, offset=1000) == whole[1000:]
    assert await caller.result(0, offset=len(whole)) == b""
    assert await refusal(caller.result(0, offset=len(whole) + 1)) is Reason.TRANSFER_OFFSET


async def test_a_result_larger_than_a_piece_arrives_in_pieces(redis_url, caller):
    cohort = Cohort(size=2, layout=large_layout)
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    await caller.aggregate(cohort, 0)
    responses = caller.stub.GetResult(pb.GetResultRequest(round_id=ROUND, shard=0))
    sizes = [len(response.piece) async for response in responses]
    assert max(sizes) == 256 * 1024
    cohort.assert_aggregate([await caller.result(0)])


async def test_opening_a_round_again_succeeds_and_with_another_layout_fails(caller, cohort):
    await caller.open(cohort.layout)
    await caller.open(cohort.layout)
    assert await refusal(caller.open(large_layout())) is Reason.LAYOUT_MISMATCH


@pytest.mark.parametrize("ttl_s", [0, 59, 30 * 24 * 3600 + 1])
async def test_a_round_lives_a_minute_to_thirty_days(caller, cohort, ttl_s):
    assert await refusal(caller.open(cohort.layout, ttl_s=ttl_s)) is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("round_id", ["", "x" * 129])
async def test_a_round_has_an_identifier_of_bounded_length(caller, cohort, round_id):
    assert await refusal(caller.open(cohort.layout, round_id=round_id)) is Reason.INVALID_ARGUMENT


async def test_a_layout_with_a_shard_too_large_to_store_is_refused(caller, cohort):
    layout = changed(
        large_layout(), matrices=(changed(large_layout().matrices[0], out_features=2**20),), max_rank=64
    )
    assert await refusal(caller.open(layout)) is Reason.INVALID_ARGUMENT


def request_with(cohort: Cohort, change) -> pb.AggregateShardRequest:
    parts = cohort.contributions(0)
    change(parts)
    return pb.AggregateShardRequest(round_id=ROUND, shard=0, contributions=parts)


CHANGES = {
    "a client alone": (lambda p: p.__delitem__(slice(1, None)), Reason.TOO_FEW_CONTRIBUTORS),
    "nobody": (lambda p: p.clear(), Reason.TOO_FEW_CONTRIBUTORS),
    "a client twice": (lambda p: p.__setitem__(1, p[0]), Reason.INVALID_ARGUMENT),
    "disorder": (lambda p: p.reverse(), Reason.INVALID_ARGUMENT),
    "a weight of zero": (lambda p: setattr(p[0], "weight", 0.0), Reason.INVALID_ARGUMENT),
    "a negative weight": (lambda p: setattr(p[0], "weight", -1.0), Reason.INVALID_ARGUMENT),
    "a weight that is not a number": (
        lambda p: setattr(p[0], "weight", float("nan")),
        Reason.INVALID_ARGUMENT,
    ),
    "weights beyond one": (lambda p: setattr(p[0], "weight", p[0].weight + 1e-6), Reason.INVALID_ARGUMENT),
    "a scaling of zero": (lambda p: setattr(p[0], "scaling", 0.0), Reason.INVALID_ARGUMENT),
    "an infinite scaling": (lambda p: setattr(p[0], "scaling", float("inf")), Reason.INVALID_ARGUMENT),
    "a short digest": (lambda p: setattr(p[0], "sha256", b"x"), Reason.INVALID_ARGUMENT),
    "another digest": (lambda p: setattr(p[0], "sha256", bytes(32)), Reason.SHARD_MISSING),
    "an absent client": (lambda p: setattr(p[2], "client_id", "nobody"), Reason.SHARD_MISSING),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_an_aggregation_is_refused_for(caller, cohort, pool, name):
    change, reason = CHANGES[name]
    await caller.open(cohort.layout)
    await caller.put_all(cohort)
    assert await refusal(caller.stub.AggregateShard(request_with(cohort, change))) is reason
    assert pool.jobs == 0


async def test_an_aggregation_of_an_unknown_shard_or_round_is_refused(caller, cohort):
    assert await refusal(caller.aggregate(cohort, 0)) is Reason.ROUND_UNKNOWN
    await caller.open(cohort.layout)
    request = request_with(cohort, lambda parts: None)
    request.shard = 3
    assert await refusal(caller.stub.AggregateShard(request)) is Reason.SHARD_UNKNOWN


async def test_a_missing_shard_is_told_with_the_name_of_its_client(caller, cohort):
    await caller.open(cohort.layout)
    with pytest.raises(Exception, match="client-0"):
        await caller.aggregate(cohort, 0)


class SlowPool(InlinePool):
    """Waits for a go before it computes."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def run(self, line: bytes) -> bytes:
        self.asked.set()
        await self.go.wait()
        return await super().run(line)


@pytest.fixture
async def slow_pool(redis_url):
    pool = SlowPool(redis_url)
    yield pool
    pool.close()


async def test_a_caller_that_leaves_lets_the_aggregation_finish(redis_url, cohort, slow_pool):
    async with replica(redis_url, slow_pool) as caller:
        await caller.open(cohort.layout)
        await caller.put_all(cohort)
        call = asyncio.ensure_future(caller.aggregate(cohort, 0))
        await slow_pool.asked.wait()
        call.cancel()
        await asyncio.wait([call])
        slow_pool.go.set()
        await caller.aggregate(cohort, 0)
        assert slow_pool.jobs == 1
        assert await caller.result(0)


async def test_a_worker_that_ends_after_the_round_was_closed_leaves_nothing(
    redis_url, cohort, slow_pool, keys
):
    async with replica(redis_url, slow_pool) as caller:
        await caller.open(cohort.layout)
        await caller.put_all(cohort)
        call = asyncio.ensure_future(refusal(caller.aggregate(cohort, 0)))
        await slow_pool.asked.wait()
        await caller.close(results=True)
        slow_pool.go.set()
        assert await call is Reason.ROUND_UNKNOWN
        assert keys.client.keys() == [RoundKeys(ROUND).closed.encode()]
