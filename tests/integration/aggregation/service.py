"""Replicas of the service in this process, and what their callers do."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from services.aggregation.aggregations import Aggregations
from services.aggregation.downloads import Downloads
from services.aggregation.servicer import SERVICE_NAME, AggregationServicer
from services.aggregation.slots import SlotLimits
from services.aggregation.store import connect, connect_worker
from services.aggregation.uploads import UploadLimits, Uploads
from services.aggregation.worker import answer
from services.common.server import running_server
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.messages import layout_to_proto
from shelora.transport.channel import call_with_stream, open_channel
from shelora.transport.pieces import Digest, cut
from shelora.transport.status import error_from_rpc
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc, common_pb2

ROUND = "round-1"
TTL_S = 600


class InlinePool:
    """Runs jobs as a worker process does, in a thread of this one."""

    def __init__(self, redis_url: str) -> None:
        self._store = connect_worker(redis_url, timeout_s=10)
        self.jobs = 0

    async def run(self, line: bytes) -> bytes:
        self.jobs += 1
        return await asyncio.to_thread(answer, self._store, line)

    async def spread(self, line: bytes) -> list[bytes]:
        return [await self.run(line)]

    def close(self) -> None:
        self._store.close()


class Caller:
    """What the coordinator and the clients call."""

    def __init__(self, stub: Any, address: str) -> None:
        self.stub = stub
        self.address = address

    async def open(self, layout: Layout, round_id: str = ROUND, ttl_s: int = TTL_S, **ranks: int) -> None:
        members = [
            pb.RoundMember(client_id=name.replace("_", "-"), rank=rank) for name, rank in ranks.items()
        ]
        request = pb.OpenRoundRequest(
            round_id=round_id, layout=layout_to_proto(layout), ttl_s=ttl_s, members=members
        )
        await self.stub.OpenRound(request)

    async def put(
        self, layout: Layout, client: str, index: int, data: bytes, *, offset: int = 0, **header: Any
    ) -> pb.PutShardResponse:
        first = announcement(layout, client, index, data, offset=offset, **header)
        return await self.send(lambda: stream(first, cut(data, offset)))

    async def send(self, requests: Callable[[], Iterator[pb.PutShardRequest]]) -> pb.PutShardResponse:
        """Calls PutShard as an agent does."""
        return await call_with_stream(self.stub.PutShard, requests)

    async def put_all(self, cohort: Any) -> None:
        for client in cohort.clients:
            for shard in range(len(cohort.layout.shards)):
                await self.put(cohort.layout, client, shard, cohort.shard_bytes(client, shard))

    async def progress(self, client: str) -> dict[int, pb.ShardProgress]:
        answer = await self.stub.QueryShards(pb.QueryShardsRequest(round_id=ROUND, client_id=client))
        return {progress.shard: progress for progress in answer.shards}

    async def aggregate(self, cohort: Any, shard: int) -> pb.AggregateShardResponse:
        return await self.stub.AggregateShard(
            pb.AggregateShardRequest(round_id=ROUND, shard=shard, contributions=cohort.contributions(shard))
        )

    async def result(self, shard: int, offset: int = 0) -> bytes:
        stream = self.stub.GetResult(pb.GetResultRequest(round_id=ROUND, shard=shard, offset=offset))
        return b"".join([response.piece async for response in stream])

    async def close(self, *, results: bool) -> None:
        await self.stub.CloseRound(pb.CloseRoundRequest(round_id=ROUND, results=results))


def announcement(
    layout: Layout, client: str, index: int, data: bytes, *, offset: int = 0, **changes: Any
) -> pb.PutShardRequest:
    digest = Digest.of(data)
    header = {
        "round_id": ROUND,
        "client_id": client,
        "shard": index,
        "digest": common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes),
        "offset": offset,
        "layout_digest": layout.digest,
    }
    return pb.PutShardRequest(header=pb.PutShardHeader(**{**header, **changes}))


def stream(first: pb.PutShardRequest, pieces: Iterator[bytes]) -> Iterator[pb.PutShardRequest]:
    yield first
    for piece in pieces:
        yield pb.PutShardRequest(piece=piece)


@asynccontextmanager
async def replica(redis_url: str, pool: Any, idle_s: float = 30) -> AsyncIterator[Caller]:
    store = connect(redis_url, connections=8, timeout_s=10)
    numbers = iter(range(1000))
    uploads = Uploads(
        store,
        UploadLimits(slots=SlotLimits(8, 4, 6), checks=2, idle_s=idle_s, least_bytes_s=0.0),
        lambda: f"{id(store):016x}{next(numbers):016x}",
    )
    servicer = AggregationServicer(store, uploads, Downloads(store, 8), Aggregations(store, pool), 64 * 2**20)

    def register(server: grpc.aio.Server) -> None:
        aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)

    async with running_server([SERVICE_NAME], register) as address, open_channel(address) as channel:
        yield Caller(aggregation_pb2_grpc.AggregationStub(channel), address)
    await store.close()


async def refusal(call: Any) -> Reason:
    """The reason for which a call is refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason
    except DomainError as error:
        return error.reason
    raise AssertionError("the call was not refused")


async def eventually(condition: Any) -> None:
    """Waits until an asynchronous condition holds; the test's own timeout is the limit."""
    while not await condition():  # noqa: ASYNC110 - the condition lies in another process
        await asyncio.sleep(0.01)
