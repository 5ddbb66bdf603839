"""The agent's side of the coordinator and the key authority: one method a call."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import grpc
import structlog

from client_agent.committee_calls import CommitteeCalls
from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learning import LocalModel
from client_agent.link import Link
from client_agent.progress import Progress
from client_agent.state import Spool
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.lora.layout import Matrix
from shelora.messages import matrix_to_proto, tensor_to_proto
from shelora.protocol import PROTOCOL_VERSION, plain
from shelora.transport.channel import (
    OpenChannel,
    call,
    call_with_stream,
    is_transient,
    open_channel,
)
from shelora.transport.pieces import Digest, collect, cut
from shelora.transport.status import error_from_rpc
from shelora.transport.tls import Credentials
from shelora.v1 import committee_pb2, common_pb2, key_authority_pb2, key_authority_pb2_grpc
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc

MAX_PLAN_BYTES: Final = 64 * 2**20
"""Most bytes of a sealed plan: four a column, so 16 million columns."""
STREAM_TIMEOUT_S: Final = 300.0
"""Most seconds for a plan on its way in or out."""
HEARTBEAT_TIMEOUT_S: Final = 15.0
"""Seconds until a heartbeat is given up: one that a busy coordinator answers late counts as well."""
GIVE_UP_S: Final = 10.0
"""Seconds to try to say that an assignment is given up: the round waits for it anyway if this fails."""
FIRST_WAIT_S: Final = 2.0
"""Bound of the first wait after a stream broke: a thousand agents come back at five hundred a second."""
LONGEST_WAIT_S: Final = 30.0

_log = structlog.get_logger(__name__)


class Session:
    """Calls in the name of one client of one federation. Errors are DomainErrors."""

    def __init__(
        self, config: AgentConfig, credentials: Credentials | None, connect: OpenChannel = open_channel
    ) -> None:
        """Takes the client's identity; None only in tests."""
        self._config = config
        self._coordinator_channel = connect(config.coordinator, credentials)
        self._key_channel = connect(config.key_authority, credentials)
        self._coordinator: pb_grpc.CoordinatorAsyncStub = pb_grpc.CoordinatorStub(self._coordinator_channel)
        self._keys: key_authority_pb2_grpc.KeyAuthorityAsyncStub = key_authority_pb2_grpc.KeyAuthorityStub(
            self._key_channel
        )
        self._ask = Link(config)
        self.committee = CommitteeCalls(config, self._coordinator, self._ask)
        """Calls of this client's part in committees."""
        self._session = secrets.token_hex(8)
        """Tells this process from another one with the same identity."""
        self._began = False
        """Whether the coordinator has taken it for the one that takes part."""

    async def close(self) -> None:
        """Closes the connections."""
        await self._coordinator_channel.close()
        await self._key_channel.close()

    async def specification(self) -> FederationSpec:
        """What the operator specified. Raises: FEDERATION_UNKNOWN, STORE_UNAVAILABLE."""
        return (await self.specification_and_time())[0]

    async def specification_and_time(self) -> tuple[FederationSpec, float]:
        """The specification, and the coordinator's clock in Unix seconds. Raises: as `specification`."""
        request = pb.GetFederationRequest(
            federation_id=self._config.federation, view=pb.FEDERATION_VIEW_SPECIFICATION
        )
        federation = await self._ask(self._coordinator.GetFederation, request)
        return FederationSpec.from_proto(federation.spec), federation.now_unix_ms / 1000

    async def join(self, model: LocalModel, example_count: int) -> None:
        """Makes this client a member. Raises: MODEL_MISMATCH, FEDERATION_CLOSED."""
        request = pb.JoinRequest(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            rank=model.rank,
            budget=self._config.budget,
            example_count=example_count,
            matrices=[matrix_to_proto(m) for m in model.matrices],
            tensors=[tensor_to_proto(t) for t in model.tensors],
            protocol_version=PROTOCOL_VERSION,
        )
        await self._ask(self._coordinator.Join, request)

    async def assignments(self) -> AsyncIterator[pb.Assignment]:
        """Assignments as they come, without end: a stream that ends or breaks is opened anew after a while.

        Raises: DomainError if the coordinator refuses for a reason that does not pass, such as CLIENT_UNKNOWN.
        """
        wait = Backoff()
        while True:
            try:
                async for assignment in self._watch():
                    self._began = True
                    wait.reset()
                    yield assignment
            except grpc.aio.AioRpcError as error:
                if not is_transient(error):
                    raise error_from_rpc(error, self._config.coordinator) from error
                _log.debug("watch_broken", code=error.code().name)
            await wait()

    async def heartbeat(self, progress: Progress, trouble: DomainError | None = None) -> float:
        """Says what this client is doing, and what keeps it from its work. One attempt: the next follows soon.

        Returns: Seconds until then; 0 if the coordinator names none.
        Raises: CLIENT_UNKNOWN, CLIENT_REPLACED.
        """
        request = pb.HeartbeatRequest(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            stage=progress.stage.value,
            progress=progress.fraction,
            reason=trouble.reason.value if trouble else None,
            why=plain(trouble.message) if trouble else None,
            session=self._session if self._began else None,
        )
        answer = await self._ask(
            self._coordinator.Heartbeat, request, timeout_s=HEARTBEAT_TIMEOUT_S, retry_s=0
        )
        return answer.next_ms / 1000

    async def could_not_join(self, error: DomainError) -> None:
        """Says why this client ends before it is a member. A courtesy: its failures are only logged.

        What may quote its files stays with its owner.
        """
        if error.reason in _QUOTING:
            error = DomainError(error.reason, "the agent's own log says what is wrong and where")
        try:
            await self.heartbeat(Progress(), error)
        except DomainError as refusal:  # also where it was heard: CLIENT_UNKNOWN
            _log.debug("told_why_not_joined", reason=refusal.reason, why=refusal.message)

    async def give_up(self, assignment_id: str, error: DomainError) -> None:
        """Says that this client cannot do what it was assigned, and why. A courtesy: its failures are only logged."""
        request = pb.GiveUpRequest(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            assignment_id=assignment_id,
            reason=error.reason.value,
            why=plain(error.message),
        )
        try:
            await self._ask(self._coordinator.GiveUp, request, retry_s=GIVE_UP_S)
        except DomainError as refusal:
            _log.debug("giving_up_not_told", reason=refusal.reason, why=refusal.message)

    async def object_to_result(self, round_id: str, why: str) -> None:
        """Says that the result of a round serves this client badly.

        Raises: only what passes; a coordinator that does not take it, as of an older version, is not asked again.
        """
        request = pb.ObjectToResultRequest(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            round_id=round_id,
            why=plain(why),
        )
        try:
            await self._ask(self._coordinator.ObjectToResult, request, retry_s=GIVE_UP_S)
        except DomainError as refusal:
            if is_transient(refusal):
                raise
            _log.debug("objection_not_told", reason=refusal.reason, why=refusal.message)

    async def secrets(self, epoch: int) -> EpochSecrets:
        """The secrets of an epoch.

        Raises: PERMISSION_DENIED, CERTIFICATE_REVOKED, FEDERATION_UNKNOWN, EPOCH_RETIRED, SECRET_UNAVAILABLE.
        """
        request = key_authority_pb2.GetEpochSecretsRequest(
            federation_id=self._config.federation, epoch=epoch, client_id=self._config.client_id
        )
        return EpochSecrets.from_proto(epoch, await call(self._keys.GetEpochSecrets, request))

    async def commit(self, spool: Spool, upload_s: float) -> int:
        """Commits an uploaded update; returns how many are committed.

        Raises: ROUND_UNKNOWN, ROUND_NOT_COLLECTING, NOT_IN_COHORT, SHARD_MISSING, UPDATE_REWRITTEN.
        """
        note = spool.note
        request = pb.CommitUpdateRequest(
            federation_id=self._config.federation,
            round_id=note.round_id,
            client_id=self._config.client_id,
            layout_digest=note.layout_digest,
            shards=[digest_to_proto(digest) for digest in spool.shards],
            rank=note.rank,
            scaling=note.scaling,
            report=self._report(spool, upload_s),
            dealt=committee_pb2.DealtShares.FromString(spool.dealt) if spool.dealt else None,
        )
        return (await self._ask(self._coordinator.CommitUpdate, request)).update_count

    async def cast_ballot(self, spool: Spool) -> int:
        """Casts a ballot, the one shard of its spool; returns how many are cast.

        Raises: ROUND_UNKNOWN, ROUND_NOT_COLLECTING, NOT_IN_COHORT, BALLOT_REFUSED, UPDATE_REWRITTEN.
        """
        header = pb.CastBallotHeader(
            federation_id=self._config.federation,
            round_id=spool.note.round_id,
            client_id=self._config.client_id,
            digest=digest_to_proto(spool.shards[0]),
            report=self._report(spool, 0.0),
        )

        async def parts() -> AsyncIterator[pb.CastBallotRequest]:
            yield pb.CastBallotRequest(header=header)
            for piece in cut(spool.read(0)):
                yield pb.CastBallotRequest(piece=piece)

        response = await call_with_stream(self._coordinator.CastBallot, parts, timeout_s=STREAM_TIMEOUT_S)
        return response.ballot_count

    def _report(self, spool: Spool, upload_s: float) -> pb.UpdateReport:
        note = spool.note
        return pb.UpdateReport(
            client_id=self._config.client_id,
            example_count=note.example_count,
            train_loss=note.train_loss,
            train_s=note.train_s,
            encrypt_s=note.encrypt_s,
            upload_s=upload_s,
            upload_bytes=spool.total_bytes,
            overlap=note.overlap,
            base_model=_base_model(note.base_tags),
        )

    async def publish_plan(self, number: int, sealed: bytes, matrices: tuple[Matrix, ...]) -> None:
        """Publishes a sealed plan and its column counts. Raises: NOT_LEADER, ROUND_UNKNOWN, INVALID_ARGUMENT."""
        header = pb.PublishPlanHeader(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            plan_number=number,
            digest=digest_to_proto(Digest.of(sealed)),
            matrices=[matrix_to_proto(m) for m in matrices],
        )

        async def parts() -> AsyncIterator[pb.PublishPlanRequest]:
            yield pb.PublishPlanRequest(header=header)
            for piece in cut(sealed):
                yield pb.PublishPlanRequest(piece=piece)

        await call_with_stream(self._coordinator.PublishPlan, parts, timeout_s=STREAM_TIMEOUT_S)

    async def fetch_plan(self, number: int, digest: Digest) -> bytes:
        """A sealed plan, or a ranked list. Raises: PLAN_UNKNOWN, DIGEST_MISMATCH, TRANSFER_*."""
        request = pb.GetPlanRequest(federation_id=self._config.federation, plan_number=number)
        stream = self._coordinator.GetPlan(request, timeout=STREAM_TIMEOUT_S)

        async def pieces() -> AsyncIterator[bytes]:
            async for response in stream:
                yield response.piece

        try:
            return await collect(pieces(), digest, MAX_PLAN_BYTES)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._config.coordinator) from error

    async def reject_plan(self, number: int, digest: Digest, why: str) -> None:
        """Says that a plan does not match the votes. Raises: PLAN_UNKNOWN if it was replaced already."""
        request = pb.RejectPlanRequest(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            plan_number=number,
            sha256=digest.sha256,
            why=why,
        )
        await self._ask(self._coordinator.RejectPlan, request)

    async def report_evaluation(self, round_id: str, report: pb.EvaluationReport) -> None:
        """Reports what was measured after a result was applied."""
        report.client_id = self._config.client_id
        request = pb.ReportEvaluationRequest(
            federation_id=self._config.federation, round_id=round_id, report=report
        )
        await self._ask(self._coordinator.ReportEvaluation, request)

    def _watch(self) -> AsyncIterator[pb.Assignment]:
        request = pb.WatchRequest(
            federation_id=self._config.federation, client_id=self._config.client_id, session=self._session
        )
        return aiter(self._coordinator.Watch(request))


class Backoff:
    """Random waits whose bound doubles until something arrives.

    They begin at zero, so that agents whose streams broke in one moment come back spread over the whole bound.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._bound_s = FIRST_WAIT_S

    def reset(self) -> None:
        """Something arrived."""
        self._bound_s = FIRST_WAIT_S

    def next_s(self) -> float:
        """Seconds to wait now."""
        wait_s = self._uniform(0.0, self._bound_s)
        self._bound_s = min(2 * self._bound_s, LONGEST_WAIT_S)
        return wait_s

    async def __call__(self) -> None:
        """Waits."""
        await asyncio.sleep(self.next_s())


def _base_model(tags: Mapping[str, str] | None) -> pb.BaseModelTags | None:
    return pb.BaseModelTags(**{part: bytes.fromhex(tag) for part, tag in tags.items()}) if tags else None


def digest_to_proto(digest: Digest) -> common_pb2.ShardDigest:
    return common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes)


def digest_from_proto(message: common_pb2.ShardDigest) -> Digest:
    """Raises: DomainError INVALID_ARGUMENT."""
    return Digest(message.sha256, message.total_bytes)


def is_fatal(error: DomainError) -> bool:
    """Whether trying again cannot help: someone must change something first."""
    return error.reason in _FATAL


_QUOTING: Final = frozenset({Reason.DATA_INVALID, Reason.CONFIGURATION_INVALID})
"""Reasons whose words name a label, a path or a setting of this device."""

_FATAL: Final = frozenset(
    {
        Reason.CONFIGURATION_INVALID,
        Reason.DATA_INVALID,
        Reason.MODEL_INVALID,
        Reason.MODEL_MISMATCH,
        Reason.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CERTIFICATE_REVOKED,
        Reason.CLIENT_REPLACED,
        Reason.SERVER_UNTRUSTED,
        Reason.FEDERATION_CLOSED,
        Reason.LIMIT_REACHED,
        Reason.VERSION_REFUSED,
        Reason.PROTECTION_REFUSED,
        Reason.INVALID_ARGUMENT,
        Reason.COMMITTEE_REFUSED,
    }
)
