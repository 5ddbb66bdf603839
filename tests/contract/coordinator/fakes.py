"""Aggregation and key authority in this process: the contract of aggregation.proto without cryptography."""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from shelora.errors import DomainError, Reason
from shelora.messages import layout_from_proto
from shelora.transport.status import translated
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc, common_pb2, key_authority_pb2, key_authority_pb2_grpc


def key_id(epoch: int) -> bytes:
    return bytes([epoch]) * 16


def digest_of(*parts: object) -> common_pb2.ShardDigest:
    return common_pb2.ShardDigest(sha256=hashlib.sha256(repr(parts).encode()).digest(), total_bytes=100)


@dataclass
class FakeAggregation(aggregation_pb2_grpc.AggregationServicer):
    """State shared by all its replicas, as Redis is."""

    layouts: dict[str, bytes] = field(default_factory=dict)
    updates: dict[tuple[str, str], dict[int, common_pb2.ShardDigest]] = field(default_factory=dict)
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    sealed: set[tuple[str, str]] = field(default_factory=set)
    requests: dict[tuple[str, int], bytes] = field(default_factory=dict)
    results: dict[tuple[str, int], common_pb2.ShardDigest] = field(default_factory=dict)
    computed: Counter = field(default_factory=Counter)
    aggregated: list[pb.AggregateShardRequest] = field(default_factory=list)
    squared_norms: dict[str, float] = field(default_factory=dict)
    """Of every shard of a client's updates, 1 by default."""
    after_query: Callable[[], None] = lambda: None
    """What happens right after each answer to QueryShards."""
    failures: list[Reason] = field(default_factory=list)
    """Reasons the next calls of AggregateShard fail with."""

    async def OpenRound(self, request, context):
        async with translated(context):
            digest = layout_from_proto(request.layout).digest
            if self.layouts.setdefault(request.round_id, digest) != digest:
                raise DomainError(Reason.LAYOUT_MISMATCH, "another layout")
            self.ranks[request.round_id] = {member.client_id: member.rank for member in request.members}
            return pb.OpenRoundResponse()

    async def QueryShards(self, request, context):
        async with translated(context):
            self._known(request.round_id)
            stored = self.updates.get((request.round_id, request.client_id), {})
            self.after_query()
            return pb.QueryShardsResponse(
                shards=[
                    pb.ShardProgress(
                        shard=i,
                        digest=d,
                        received_bytes=d.total_bytes,
                        complete=True,
                        squared_norm=self.squared_norms.get(request.client_id, 1.0),
                    )
                    for i, d in stored.items()
                ]
            )

    async def SealUpdate(self, request, context):
        async with translated(context):
            self._known(request.round_id)
            key = request.round_id, request.client_id
            if list(self.updates.get(key, {}).values()) != list(request.shards):
                raise DomainError(Reason.SHARD_MISSING, "not these")
            self.sealed.add(key)
            return pb.SealUpdateResponse()

    async def AggregateShard(self, request, context):
        async with translated(context):
            if self.failures:
                raise DomainError(self.failures.pop(0), "as told")
            key, content = (request.round_id, request.shard), request.SerializeToString(deterministic=True)
            if self.requests.get(key) != content:
                self._known(request.round_id)
                for part in request.contributions:
                    stored = self.updates.get((request.round_id, part.client_id), {}).get(request.shard)
                    if stored is None or stored.sha256 != part.sha256:
                        raise DomainError(Reason.SHARD_MISSING, f"client {part.client_id!r}")
                self.computed[key] += 1
                self.aggregated.append(request)
                self.requests[key] = content
                self.results[key] = digest_of("result", content)
            return pb.AggregateShardResponse(digest=self.results[key], cpu_s=0.25)

    async def CloseRound(self, request, context):
        async with translated(context):
            self.layouts.pop(request.round_id, None)
            self.updates = {key: v for key, v in self.updates.items() if key[0] != request.round_id}
            if request.results:
                self.results = {key: v for key, v in self.results.items() if key[0] != request.round_id}
            return pb.CloseRoundResponse()

    def put(
        self, round_id: str, client_id: str, shard_count: int, content: str = ""
    ) -> list[common_pb2.ShardDigest]:
        """Stores an update as PutShard would. Returns its digests."""
        self._known(round_id)
        digests = [digest_of(round_id, client_id, shard, content) for shard in range(shard_count)]
        self.updates[round_id, client_id] = dict(enumerate(digests))
        return digests

    def result_rounds(self) -> set[str]:
        return {round_id for round_id, _ in self.results}

    def _known(self, round_id: str) -> None:
        if round_id not in self.layouts:
            raise DomainError(Reason.ROUND_UNKNOWN, "no such round")


@dataclass
class FakeKeyAuthority(key_authority_pb2_grpc.KeyAuthorityServicer):
    opened: list[tuple[str, int, str]] = field(default_factory=list)
    refusal: Reason | None = None
    retired_before: int = 1

    async def OpenEpoch(self, request, context):
        async with translated(context):
            if self.refusal:
                raise DomainError(self.refusal, "as told")
            if request.epoch < self.retired_before:
                raise DomainError(Reason.EPOCH_RETIRED, "as told")
            self.opened.append((request.federation_id, request.epoch, request.parameters))
            return key_authority_pb2.OpenEpochResponse(key_id=key_id(request.epoch))

    async def RetireEpochs(self, request, context):
        async with translated(context):
            self.retired_before = max(self.retired_before, request.before_epoch)
            return key_authority_pb2.RetireEpochsResponse()


@asynccontextmanager
async def serving(*servicers: object) -> AsyncIterator[str]:
    """Serves fakes on a free port. Yields the address."""
    server = grpc.aio.server()
    for servicer in servicers:
        if isinstance(servicer, FakeAggregation):
            aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)
        else:
            key_authority_pb2_grpc.add_KeyAuthorityServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
