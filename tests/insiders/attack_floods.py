"""A member that sends the largest requests it can, and calls that are denied: the others are served meanwhile."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.insiders.gauges import latency_of
from tests.insiders.lab import Hostile, Lab

SECONDS = 4.0
STANDSTILL_S = 3.0
"""Longer than a call of another member takes on a busy machine; it took 6 to 60 s."""

DIGESTS = [common_pb2.ShardDigest(sha256=os.urandom(32), total_bytes=1) for _ in range(45_000)]
SMALL = [common_pb2.Matrix(name=str(number), out_features=1, in_features=1) for number in range(200_000)]


def commits(hostile: Hostile) -> Callable[[], Awaitable[Any]]:
    request = pb.CommitUpdateRequest(
        federation_id=hostile.federation,
        round_id=f"{hostile.federation}.x.1",
        client_id=hostile.name,
        layout_digest=bytes(32),
        shards=DIGESTS,
        rank=1,
        scaling=1.0,
        report=pb.UpdateReport(client_id=hostile.name, example_count=1),
    )
    return lambda: hostile.coordinator.CommitUpdate(request, timeout=30)


def plans(hostile: Hostile) -> Callable[[], Awaitable[Any]]:
    header = pb.PublishPlanHeader(
        federation_id=hostile.federation,
        client_id=hostile.name,
        plan_number=1,
        digest=DIGESTS[0],
        matrices=SMALL,
    )

    async def parts() -> AsyncIterator[pb.PublishPlanRequest]:
        yield pb.PublishPlanRequest(header=header)

    return lambda: hostile.coordinator.PublishPlan(parts(), timeout=30)


def joins(hostile: Hostile) -> Callable[[], Awaitable[Any]]:
    request = hostile.join_request(matrices=SMALL[:16_384])
    return lambda: hostile.coordinator.Join(request, timeout=30)


def denials(hostile: Hostile) -> Callable[[], Awaitable[Any]]:
    request = hostile.heartbeat(client_id="another")
    return lambda: hostile.coordinator.Heartbeat(request, timeout=30)


def denied_commits(hostile: Hostile) -> Callable[[], Awaitable[Any]]:
    request = pb.CommitUpdateRequest(
        federation_id=hostile.federation, client_id="another", shards=DIGESTS, round_id="x"
    )
    return lambda: hostile.coordinator.CommitUpdate(request, timeout=30)


@pytest.mark.parametrize("flood", [commits, plans, joins, denials, denied_commits])
async def test_a_members_flood_holds_up_no_other_member(lab: Lab, flood: Any):
    spec = await lab.create(flood.__name__.replace("_", "-"), start=False)
    async with lab.hostile(spec) as hostile, lab.hostile(spec, "honest") as honest:
        await honest.join()
        await hostile.join()
        ends: Counter[grpc.StatusCode] = Counter()
        async with latency_of(honest.beat) as latency:
            await _made(flood(hostile), ends)
    assert sum(ends.values()) > 8, "the attack was not made"
    assert flood is joins or grpc.StatusCode.OK not in ends
    assert latency.worst_s < STANDSTILL_S  # the last call is waited for, so that one that hangs counts


async def _made(call: Callable[[], Awaitable[Any]], ends: Counter[grpc.StatusCode]) -> None:
    """Makes a call 16 at a time, again and again."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + SECONDS

    async def again() -> None:
        while loop.time() < until_s:
            try:
                await call()
                ends[grpc.StatusCode.OK] += 1
            except grpc.aio.AioRpcError as error:
                ends[error.code()] += 1

    await asyncio.gather(*(again() for _ in range(16)))
