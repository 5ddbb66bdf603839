"""The gRPC face of the coordinator: parse, call, render."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, Protocol

import grpc

from coordinator import checks
from coordinator.assignments import Assignment
from coordinator.handlers import Handlers
from coordinator.records import FederationRecord
from coordinator.render import Renderer
from services.common.guard import certificate_of
from shelora.committee.rules import MAX_MEMBERS, SHARES_AT_ONCE
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.transport.pieces import Digest, cut
from shelora.transport.revocations import issued_ms
from shelora.transport.status import translated
from shelora.v1 import committee_pb2, coordinator_pb2_grpc
from shelora.v1 import coordinator_pb2 as pb

SERVICE_NAME: Final = "shelora.v1.Coordinator"

_Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    """Serves `shelora.v1.Coordinator`; coordinator.proto says what each call does."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._render = Renderer(handlers.lookup.store)

    async def CreateFederation(self, request: pb.CreateFederationRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            record = await self._handlers.federations.create(FederationSpec.from_proto(request.spec))
            return await self._federation(record)

    async def GetFederation(self, request: pb.GetFederationRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            found = await self._handlers.lookup.store.federations.read(request.federation_id)
            now_ms = self._handlers.lookup.clock_ms()
            return await self._render.federation(found.record, now_ms, request.view, request.history_after)

    async def ListFederations(
        self,
        request: pb.ListFederationsRequest,  # noqa: ARG002 - it holds nothing
        context: _Context,
    ) -> pb.ListFederationsResponse:
        async with translated(context):
            records = await self._handlers.federations.all()
            return pb.ListFederationsResponse(federations=[await self._render.listed(r) for r in records])

    async def StartFederation(self, request: pb.StartFederationRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            return await self._federation(await self._handlers.federations.start(request.federation_id))

    async def RotateKeys(self, request: pb.RotateKeysRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            record = await self._handlers.federations.rotate(request.federation_id, request.from_epoch)
            return await self._federation(record)

    async def StopFederation(self, request: pb.StopFederationRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            return await self._federation(await self._handlers.federations.stop(request.federation_id))

    async def ExtendFederation(self, request: pb.ExtendFederationRequest, context: _Context) -> pb.Federation:
        async with translated(context):
            record = await self._handlers.federations.extend(request.federation_id, request.rounds)
            return await self._federation(record)

    async def DeleteFederation(
        self, request: pb.DeleteFederationRequest, context: _Context
    ) -> pb.DeleteFederationResponse:
        async with translated(context):
            await self._handlers.federations.delete(request.federation_id)
            return pb.DeleteFederationResponse()

    async def Join(self, request: pb.JoinRequest, context: _Context) -> pb.JoinResponse:
        async with translated(context):
            certificate = certificate_of(context)  # None only in tests
            member = checks.member(request, issued_ms(certificate) if certificate else 0)
            record = await self._handlers.members.join(
                request.federation_id, member, request.matrices, request.tensors
            )
            spec = record.spec.to_proto()
            return pb.JoinResponse(training=spec.training, protection=spec.protection)

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.Assignment]:
        async with (
            translated(context),
            aclosing(self._watched(request)) as assignments,
        ):
            async for federation, assignment in assignments:
                yield await self._render.assignment(federation, assignment)

    def _watched(self, request: pb.WatchRequest) -> AsyncGenerator[tuple[FederationRecord, Assignment], None]:
        session = checks.session(request.session)
        return self._handlers.watching.watch(request.federation_id, request.client_id, session)

    async def GiveUp(self, request: pb.GiveUpRequest, context: _Context) -> pb.GiveUpResponse:
        async with translated(context):
            said = checks.given_up(request)
            await self._handlers.members.give_up(request.federation_id, request.assignment_id, said)
            return pb.GiveUpResponse()

    async def ObjectToResult(
        self, request: pb.ObjectToResultRequest, context: _Context
    ) -> pb.ObjectToResultResponse:
        async with translated(context):
            said = checks.objection(request)
            await self._handlers.members.object_to_result(request.federation_id, request.round_id, said)
            return pb.ObjectToResultResponse()

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: _Context) -> pb.HeartbeatResponse:
        async with translated(context):
            certificate = certificate_of(context)  # None only in tests
            ends_ms = int(1000 * certificate.expires.timestamp()) if certificate else 0
            seen = checks.sighting(request, self._handlers.lookup.clock_ms(), ends_ms)
            session = checks.session(request.session)
            next_s = await self._handlers.members.heartbeat(
                request.federation_id, request.client_id, seen, session
            )
            return pb.HeartbeatResponse(next_ms=round(1000 * next_s))

    async def CommitUpdate(
        self, request: pb.CommitUpdateRequest, context: _Context
    ) -> pb.CommitUpdateResponse:
        async with translated(context):
            await self._handlers.updates.require_shards(
                request.federation_id, request.round_id, len(request.shards)
            )
            update = checks.update(request)
            dealt = request.dealt if request.HasField("dealt") else None
            count = await self._handlers.updates.commit(
                request.federation_id, request.round_id, update, dealt
            )
            return pb.CommitUpdateResponse(update_count=count)

    async def CastBallot(
        self, request_iterator: AsyncIterator[pb.CastBallotRequest], context: _Context
    ) -> pb.CastBallotResponse:
        async with translated(context):
            first = await anext(request_iterator, pb.CastBallotRequest())
            checks.require(first.HasField("header"), "the first message must be the header")
            header = first.header
            count = await self._handlers.updates.cast_ballot(
                header.federation_id, header.round_id, checks.ballot(header), _pieces(request_iterator)
            )
            return pb.CastBallotResponse(ballot_count=count)

    async def PublishPlan(
        self, request_iterator: AsyncIterator[pb.PublishPlanRequest], context: _Context
    ) -> pb.PublishPlanResponse:
        async with translated(context):
            first = await anext(request_iterator, pb.PublishPlanRequest())
            checks.require(first.HasField("header"), "the first message must be the header")
            header = first.header
            await self._handlers.plans.publish(
                header.federation_id,
                header.client_id,
                header.plan_number,
                Digest(header.digest.sha256, header.digest.total_bytes),
                header.matrices,
                _pieces(request_iterator),
            )
            return pb.PublishPlanResponse()

    async def GetPlan(
        self, request: pb.GetPlanRequest, context: _Context
    ) -> AsyncIterator[pb.GetPlanResponse]:
        async with translated(context):
            for piece in cut(await self._handlers.plans.read(request.federation_id, request.plan_number)):
                yield pb.GetPlanResponse(piece=piece)

    async def RejectPlan(self, request: pb.RejectPlanRequest, context: _Context) -> pb.RejectPlanResponse:
        async with translated(context):
            await self._handlers.plans.reject(
                request.federation_id,
                request.client_id,
                request.plan_number,
                request.sha256.hex(),
                checks.why(request.why),
            )
            return pb.RejectPlanResponse()

    async def ReportEvaluation(
        self, request: pb.ReportEvaluationRequest, context: _Context
    ) -> pb.ReportEvaluationResponse:
        async with translated(context):
            evaluation = checks.evaluation(request.report)
            await self._handlers.members.report_evaluation(
                request.federation_id, request.round_id, evaluation
            )
            return pb.ReportEvaluationResponse()

    async def PostCommitteeKey(
        self, request: pb.PostCommitteeKeyRequest, context: _Context
    ) -> pb.PostCommitteeKeyResponse:
        async with translated(context):
            key = request.key if request.HasField("key") else None
            order = tuple(request.order[: MAX_MEMBERS + 1])
            await self._handlers.committees.post_key(*_scope(request), order, key)
            return pb.PostCommitteeKeyResponse()

    async def GetCommitteeKeys(
        self, request: pb.GetCommitteeKeysRequest, context: _Context
    ) -> pb.GetCommitteeKeysResponse:
        async with translated(context):
            keys = await self._handlers.committees.keys(*_scope(request))
            await _compress(context)
            return pb.GetCommitteeKeysResponse(keys=keys)

    async def LeaveCommittee(
        self, request: pb.LeaveCommitteeRequest, context: _Context
    ) -> pb.LeaveCommitteeResponse:
        async with translated(context):
            await self._handlers.committees.leave(*_scope(request))
            return pb.LeaveCommitteeResponse()

    async def GetShares(
        self, request: pb.GetSharesRequest, context: _Context
    ) -> AsyncIterator[committee_pb2.DealtShare]:
        async with (
            translated(context),
            aclosing(self._handlers.committees.shares(*_scope(request))) as shares,
        ):
            async for together in _together(shares, request.at_once):
                yield together

    async def PostCheck(self, request: pb.PostCheckRequest, context: _Context) -> pb.PostCheckResponse:
        async with translated(context):
            await self._handlers.committees.check(*_scope(request), request.check)
            return pb.PostCheckResponse()

    async def SignSet(self, request: pb.SignSetRequest, context: _Context) -> pb.SignSetResponse:
        async with translated(context):
            await self._handlers.committees.sign(*_scope(request), request.signature)
            return pb.SignSetResponse()

    async def PostAnswer(self, request: pb.PostAnswerRequest, context: _Context) -> pb.PostAnswerResponse:
        async with translated(context):
            await self._handlers.committees.answer(*_scope(request), request.answer)
            return pb.PostAnswerResponse()

    async def GetOpening(self, request: pb.GetOpeningRequest, context: _Context) -> pb.GetOpeningResponse:
        async with translated(context):
            opening = await self._handlers.committees.opening(
                request.federation_id, request.round_id, has_keys=request.has_keys
            )
            if not request.has_keys:
                await _compress(context)
            return opening

    async def _federation(self, record: FederationRecord) -> pb.Federation:
        return await self._render.federation(record, self._handlers.lookup.clock_ms())


async def _compress(context: _Context) -> None:
    """Has the response compressed: certificates of one authority are much alike, most else here is noise."""
    context.set_compression(grpc.Compression.Gzip)
    await context.send_initial_metadata(())  # which says so: grpc.aio compresses no unary response without it


class _OfClient(Protocol):
    """A request of one client about one round."""

    federation_id: str
    round_id: str
    client_id: str


def _scope(request: _OfClient) -> tuple[str, str, str]:
    return request.federation_id, request.round_id, checks.client_id(request.client_id)


async def _pieces(
    requests: AsyncIterator[pb.PublishPlanRequest] | AsyncIterator[pb.CastBallotRequest],
) -> AsyncIterator[bytes]:
    """The pieces after the header."""
    async for request in requests:
        if request.HasField("header"):
            raise DomainError(Reason.INVALID_ARGUMENT, "only the first message may be the header")
        yield request.piece


def register(servicer: CoordinatorServicer, server: grpc.aio.Server) -> None:
    """Adds the coordinator to a server that has not started."""
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(servicer, server)


async def _together(
    shares: AsyncIterator[committee_pb2.DealtShare], wanted: int
) -> AsyncIterator[committee_pb2.DealtShare]:
    """As many in a message as are wanted, 1 to SHARES_AT_ONCE: each costs both sides the same, however small it is."""
    most = min(max(1, wanted), SHARES_AT_ONCE)
    first: committee_pb2.DealtShare | None = None
    async for share in shares:
        if first is None:
            first = share
        else:
            first.further.append(share)
        if 1 + len(first.further) == most:
            yield first
            first = None
    if first is not None:
        yield first
