"""The gRPC face of the service: parse, call, render."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import grpc
import structlog

from services.aggregation import metrics
from services.aggregation.aggregations import Aggregations
from services.aggregation.downloads import Downloads
from services.aggregation.records import (
    AggregationRequest,
    CommittedContribution,
    ShardProgress,
    ShardSlot,
    checked_id,
    invalid,
)
from services.aggregation.store import ShardStore
from services.aggregation.uploads import Announcement, Uploads
from shelora.errors import DomainError
from shelora.lora.kinds import largest_update_bytes
from shelora.lora.layout import Layout
from shelora.messages import layout_from_proto
from shelora.telemetry.metrics import at_zero
from shelora.transport.pieces import Digest
from shelora.transport.status import translated
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc, common_pb2

SERVICE_NAME: Final = "shelora.v1.Aggregation"

MIN_TTL_S: Final = 60
MAX_TTL_S: Final = 30 * 24 * 3600

_Context = grpc.aio.ServicerContext[Any, Any]
_METHODS: Final = tuple(m.name for m in pb.DESCRIPTOR.services_by_name["Aggregation"].methods)
_log = structlog.get_logger(__name__)


class AggregationServicer(aggregation_pb2_grpc.AggregationServicer):
    """Serves `shelora.v1.Aggregation`."""

    def __init__(
        self,
        store: ShardStore,
        uploads: Uploads,
        downloads: Downloads,
        aggregations: Aggregations,
        max_shard_bytes: int,
    ) -> None:
        """Takes `max_shard_bytes`, the size of a shard above which a round is not opened."""
        self._store = store
        self._uploads = uploads
        self._downloads = downloads
        self._aggregations = aggregations
        self._max_shard_bytes = max_shard_bytes
        at_zero(metrics.REFUSALS, {"method": _METHODS, "reason": metrics.REASONS})

    async def OpenRound(self, request: pb.OpenRoundRequest, context: _Context) -> pb.OpenRoundResponse:
        async with _answering(context, "OpenRound"):
            layout = layout_from_proto(request.layout)
            _check_sizes(layout, self._max_shard_bytes)
            if not MIN_TTL_S <= request.ttl_s <= MAX_TTL_S:
                raise invalid(f"ttl_s must be {MIN_TTL_S} to {MAX_TTL_S}")
            round_id, ranks = checked_id("round_id", request.round_id), _ranks(request, layout)
            await self._store.open_round(round_id, layout, request.ttl_s, ranks)
            _log.info("round_open", round_id=request.round_id, shard_count=len(layout.shards))
        return pb.OpenRoundResponse()

    async def PutShard(
        self, request_iterator: AsyncIterator[pb.PutShardRequest], context: _Context
    ) -> pb.PutShardResponse:
        async with _answering(context, "PutShard"):
            announced = _announcement(await anext(request_iterator, pb.PutShardRequest()))
            stored_before = await self._uploads.receive(announced, _pieces(request_iterator))
        return pb.PutShardResponse(digest=_digest_to_proto(announced.digest), already_stored=stored_before)

    async def QueryShards(self, request: pb.QueryShardsRequest, context: _Context) -> pb.QueryShardsResponse:
        async with _answering(context, "QueryShards"):
            found = await self._store.progress(
                checked_id("round_id", request.round_id), checked_id("client_id", request.client_id)
            )
        return pb.QueryShardsResponse(shards=[_progress_to_proto(progress) for progress in found])

    async def SealUpdate(self, request: pb.SealUpdateRequest, context: _Context) -> pb.SealUpdateResponse:
        async with _answering(context, "SealUpdate"):
            round_id = checked_id("round_id", request.round_id)
            count = len((await self._store.layout(round_id)).shards)
            if len(request.shards) != count:
                raise invalid(f"shards must hold {count} digests")
            await self._store.seal(
                round_id,
                checked_id("client_id", request.client_id),
                [Digest(shard.sha256, shard.total_bytes) for shard in request.shards],
            )
        return pb.SealUpdateResponse()

    async def AggregateShard(
        self, request: pb.AggregateShardRequest, context: _Context
    ) -> pb.AggregateShardResponse:
        async with _answering(context, "AggregateShard"):
            result = await self._aggregations.aggregate(_aggregation_request(request))
        return pb.AggregateShardResponse(digest=_digest_to_proto(result.digest), cpu_s=result.cpu_s)

    async def HelpAggregate(
        self, request: pb.HelpAggregateRequest, context: _Context
    ) -> pb.HelpAggregateResponse:
        async with _answering(context, "HelpAggregate"):
            await self._aggregations.help(_aggregation_request(request.shard))
        return pb.HelpAggregateResponse()

    async def GetResult(
        self, request: pb.GetResultRequest, context: _Context
    ) -> AsyncIterator[pb.GetResultResponse]:
        async with _answering(context, "GetResult"):
            round_id = checked_id("round_id", request.round_id)
            async with aclosing(self._downloads.pieces(round_id, request.shard, request.offset)) as pieces:
                async for piece in pieces:
                    yield pb.GetResultResponse(piece=piece)
                    metrics.SENT_BYTES.inc(len(piece))

    async def CloseRound(self, request: pb.CloseRoundRequest, context: _Context) -> pb.CloseRoundResponse:
        async with _answering(context, "CloseRound"):
            await self._store.close_round(checked_id("round_id", request.round_id), results=request.results)
            _log.info("round_closed", round_id=request.round_id, results=request.results)
        return pb.CloseRoundResponse()

    async def ListReplicas(
        self,
        request: pb.ListReplicasRequest,  # noqa: ARG002 - it holds nothing
        context: _Context,
    ) -> pb.ListReplicasResponse:
        async with _answering(context, "ListReplicas"):
            addresses = await self._store.replicas()
        return pb.ListReplicasResponse(addresses=addresses)


@asynccontextmanager
async def _answering(context: _Context, method: str) -> AsyncIterator[None]:
    """Translates refusals into statuses, and counts them."""
    async with translated(context):
        try:
            yield
        except DomainError as error:
            metrics.REFUSALS.labels(method, error.reason.value).inc()
            _log.info("refused", method=method, reason=error.reason.value, detail=error.message)
            raise


async def _pieces(requests: AsyncIterator[pb.PutShardRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "piece":
            raise invalid("after the header, every message of the stream must be a piece")
        yield request.piece


def _announcement(request: pb.PutShardRequest) -> Announcement:
    if request.WhichOneof("part") != "header":
        raise invalid("the first message of the stream must be the header")
    header = request.header
    return Announcement(
        slot=ShardSlot(header.round_id, header.client_id, header.shard),
        digest=Digest(header.digest.sha256, header.digest.total_bytes),
        offset=header.offset,
        layout_digest=header.layout_digest,
    )


def _aggregation_request(request: pb.AggregateShardRequest) -> AggregationRequest:
    return AggregationRequest(
        round_id=request.round_id,
        shard=request.shard,
        contributions=tuple(
            CommittedContribution(client_id=c.client_id, sha256=c.sha256, weight=c.weight, scaling=c.scaling)
            for c in request.contributions
        ),
    )


def _ranks(request: pb.OpenRoundRequest, layout: Layout) -> dict[str, int]:
    """Largest rank of each member's update."""
    ranks = {checked_id("client_id", member.client_id): member.rank for member in request.members}
    if any(not 1 <= rank <= layout.max_rank for rank in ranks.values()):
        raise invalid(f"the rank of a member must be 1 to {layout.max_rank}")
    return ranks


def _check_sizes(layout: Layout, max_shard_bytes: int) -> None:
    largest = max(largest_update_bytes(layout), default=0)
    if largest > max_shard_bytes:
        raise invalid(
            f"a shard of the layout may have {largest} bytes; at most {max_shard_bytes} are accepted"
        )


def _digest_to_proto(digest: Digest) -> common_pb2.ShardDigest:
    return common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes)


def _progress_to_proto(progress: ShardProgress) -> pb.ShardProgress:
    return pb.ShardProgress(
        shard=progress.shard,
        digest=_digest_to_proto(progress.digest),
        received_bytes=progress.received_bytes,
        complete=progress.complete,
        squared_norm=progress.squared_norm,
    )
