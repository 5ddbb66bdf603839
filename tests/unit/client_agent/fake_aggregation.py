"""An aggregation replica in memory that can break off transfers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from shelora.transport.pieces import Digest, cut
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc


@dataclass
class Shards:
    """What all replicas know."""

    arrived: dict[int, bytearray] = field(default_factory=dict)
    digests: dict[int, Any] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)


@dataclass
class FakeAggregation(aggregation_pb2_grpc.AggregationServicer):
    shards: Shards
    breaks_after_pieces: int | None = None
    """Pieces after which every transfer breaks off."""
    offsets: list[int] = field(default_factory=list)
    calls: int = 0

    async def QueryShards(self, _request: Any, _context: Any) -> pb.QueryShardsResponse:
        self.calls += 1
        return pb.QueryShardsResponse(
            shards=[
                pb.ShardProgress(
                    shard=index,
                    digest=self.shards.digests[index],
                    received_bytes=len(data),
                    complete=len(data) == self.shards.digests[index].total_bytes,
                )
                for index, data in self.shards.arrived.items()
            ]
        )

    async def PutShard(
        self, requests: AsyncIterator[pb.PutShardRequest], context: Any
    ) -> pb.PutShardResponse:
        header = (await anext(requests)).header
        self.offsets.append(header.offset)
        self.shards.digests[header.shard] = header.digest
        data = self.shards.arrived.setdefault(header.shard, bytearray())
        del data[header.offset :]
        pieces = 0
        async for request in requests:
            data += request.piece
            pieces += 1
            if pieces == self.breaks_after_pieces:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        assert Digest.of(bytes(data)).sha256 == header.digest.sha256
        return pb.PutShardResponse(digest=header.digest)

    async def GetResult(
        self, request: pb.GetResultRequest, context: Any
    ) -> AsyncIterator[pb.GetResultResponse]:
        self.offsets.append(request.offset)
        for number, piece in enumerate(cut(self.shards.results[request.shard], request.offset)):
            if number == self.breaks_after_pieces:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield pb.GetResultResponse(piece=piece)


@asynccontextmanager
async def serving(replica: FakeAggregation) -> AsyncIterator[str]:
    server = grpc.aio.server()
    aggregation_pb2_grpc.add_AggregationServicer_to_server(replica, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)
