"""Members that begin as many uploads as they may and hardly send: another federation is served."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc

from shelora.v1 import aggregation_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.insiders.lab import Hostile, Lab, Target

STREAMS = 30
PAUSE_S = 5.0


async def test_two_members_cannot_take_all_upload_slots(lab: Lab):
    attacked = await lab.create("slow", round={"clients": 2, "deadline_s": 300})
    other = await lab.create("beside", round={"clients": 2, "deadline_s": 30, "max_attempts": 2})
    begun, ended = Counter[str](), Counter[grpc.StatusCode]()
    async with (
        lab.hostile(attacked, "e0") as first,
        lab.hostile(attacked, "e1") as second,
        first.member(),
        second.member(),
    ):
        round_ = Target.of(await first.assignment("vote", "train"))
        uploads = [
            asyncio.create_task(_drip(hostile, round_, number, begun, ended))
            for hostile in (first, second)
            for number in range(STREAMS)
        ]
        try:
            await asyncio.sleep(3)
            assert sum(begun.values()) == 2 * STREAMS, "the attack was not made"
            async with lab.running(other, "h0", "h1") as members:
                assert await members == ["finished"] * 2
            assert not ended, "the attack was over before"
        finally:
            for upload in uploads:
                upload.cancel()
            await asyncio.gather(*uploads, return_exceptions=True)
    federation = await lab.view(other)
    assert federation.phase == pb.PHASE_FINISHED
    assert all(r.state == pb.ROUND_STATE_PUBLISHED for r in federation.history), "an attempt was lost"


async def _drip(
    hostile: Hostile,
    round_: Target,
    number: int,
    begun: Counter[str],
    ended: Counter[grpc.StatusCode],
) -> None:
    header = aggregation_pb2.PutShardHeader(
        round_id=round_.round_id,
        client_id=hostile.name,
        shard=0,
        digest=common_pb2.ShardDigest(sha256=bytes([number]) * 32, total_bytes=50_000),
        layout_digest=round_.layout.digest,
    )

    async def parts() -> AsyncIterator[aggregation_pb2.PutShardRequest]:
        yield aggregation_pb2.PutShardRequest(header=header)
        begun[hostile.name] += 1
        while True:
            yield aggregation_pb2.PutShardRequest(piece=b"x")
            await asyncio.sleep(PAUSE_S)

    try:
        await hostile.aggregation.PutShard(parts(), timeout=600)
    except grpc.aio.AioRpcError as error:
        ended[error.code()] += 1
