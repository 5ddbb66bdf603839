"""Requests become records here, once; every refusal names the field and its range."""

import math
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Final

from coordinator import transitions
from coordinator.aggregation import digest_from_proto
from coordinator.records import (
    BaseModelTags,
    Dropped,
    EvaluationRecord,
    FederationRecord,
    Means,
    MemberRecord,
    Model,
    Report,
    Sighting,
    StoredDigest,
    UpdateRecord,
)
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.lora.layout import MAX_ITEMS, Matrix, Tensor
from shelora.messages import matrix_from_proto, require_at_most, tensor_shape
from shelora.protocol import MAX_WHY, PROTOCOL_VERSION, Stage
from shelora.strategies.port import RoundTerms
from shelora.text import printable
from shelora.transport.pieces import SHA256_BYTES
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

KEY_ID_BYTES: Final = 16
TAG_BYTES: Final = 32
"""Bytes of a keyed digest."""
MAX_RANK: Final = 1024
MAX_EXAMPLES: Final = 10**9
MAX_SECONDS: Final = 10**7
"""A third of a year: longer than a round collects."""
MAX_SCALING: Final = 1e4
MAX_ASSIGNMENT: Final = 256
STAGES: Final = frozenset(Stage)
REASONS: Final = frozenset(Reason)
_SESSION: Final = re.compile(r"[A-Za-z0-9]{1,64}")
_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    """Raises INVALID_ARGUMENT with the message unless the condition holds."""
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, message)


def require_protocol(version: int) -> None:
    """Raises VERSION_REFUSED, with what to install, unless an agent speaks this version of the protocol."""
    if version != PROTOCOL_VERSION:
        age = "an older" if version < PROTOCOL_VERSION else "a newer"
        raise DomainError(
            Reason.VERSION_REFUSED,
            f"this agent speaks {age} protocol ({version}) than this federation ({PROTOCOL_VERSION}): install "
            f"shelora {metadata.version('shelora')} for the agent; its state folder is kept",
        )


def client_id(value: str) -> str:
    """A client's name."""
    require(
        bool(_CLIENT.fullmatch(value)),
        "client_id must have 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-'",
    )
    return value


def member(request: pb.JoinRequest, certified_ms: int = 0) -> MemberRecord:
    """The member that a join makes. `certified_ms`: when the certificate was issued that the client showed."""
    require_protocol(request.protocol_version)
    require(1 <= request.rank <= MAX_RANK, f"rank must be 1 to {MAX_RANK}")
    require(0 <= request.budget <= 1, "budget must be 0 to 1")  # NaN fails every comparison
    require(1 <= request.example_count <= MAX_EXAMPLES, f"example_count must be 1 to {MAX_EXAMPLES}")
    return MemberRecord(
        client_id=client_id(request.client_id),
        rank=request.rank,
        budget=request.budget,
        example_count=request.example_count,
        certified_ms=certified_ms,
    )


def model(
    spec: FederationSpec,
    matrices: Sequence[common_pb2.Matrix],
    tensors: Sequence[common_pb2.Tensor],
    known: Model | None = None,
) -> Model:
    """A model's matrices, and its tensors under the federation's bound; a layout of them can be built.

    Args: known: the federation's model, if there is one. No more of another is converted than tells it from this one.
    """
    if known is not None:
        matrices, tensors = matrices[: len(known.matrices) + 1], tensors[: len(known.tensors) + 1]
    require_at_most(MAX_ITEMS, matrices, "matrices")
    require_at_most(MAX_ITEMS, tensors, "tensors")
    require(len(matrices) > 0, "matrices must hold at least one adapted matrix")
    require(all(not m.tier_columns for m in matrices), "matrices must come without tier_columns")
    checked = tuple(matrix_from_proto(m) for m in matrices)
    bounded = tuple(Tensor(t.name, tensor_shape(t), spec.protection.tensor_bound) for t in tensors)
    found = Model(matrices=checked, tensors=bounded)
    round_ = RoundTerms(key_id=bytes(KEY_ID_BYTES), max_rank=1)
    spec.protection.strategy.layout(found, spec.protection, round_)
    return found


def require_rank(spec: FederationSpec, model: Model, rank: int) -> None:
    """Raises INVALID_ARGUMENT for a rank beyond what the operator allows, or beyond all matrices."""
    most = spec.training.max_rank
    require(
        rank <= most, f"rank must be at most {most} in this federation (training.max_rank): lower lora.rank"
    )
    held = max(min(matrix.out_features, matrix.in_features) for matrix in model.matrices)
    require(
        rank <= held,
        f"rank must be at most {held}, the most that a matrix of the model holds: lower lora.rank",
    )


def sighting(request: pb.HeartbeatRequest, now_ms: int, certificate_ends_ms: int = 0) -> Sighting:
    """What a heartbeat says. Args: certificate_ends_ms: of the certificate it came with; 0 without one."""
    require(request.stage in STAGES, f"stage must be one of {', '.join(sorted(STAGES))}")
    require(0 <= request.progress <= 1, "progress must be 0 to 1")
    return Sighting(
        stage=request.stage,
        progress=request.progress,
        at_ms=now_ms,
        reason=reason(request.reason) if request.reason else None,
        why=words(request.why),
        certificate_ends_ms=certificate_ends_ms,
    )


def reason(name: str) -> Reason:
    """A reason by its name."""
    require(name in REASONS, "reason must be a Reason")
    return Reason(name)


def words(value: str) -> str:
    """What a client says in words: it is shown on terminals."""
    require(len(value) <= MAX_WHY, f"why must have at most {MAX_WHY} characters")
    require(printable(value) == value, "why must hold printable characters only, in one line")
    return value


def session(value: str) -> str:
    """The name of an agent's process; "" of one that has none."""
    require(not value or bool(_SESSION.fullmatch(value)), "session must have up to 64 of A-Z, a-z, 0-9")
    return value


def given_up(request: pb.GiveUpRequest) -> Dropped:
    """Why a client gives an assignment up."""
    require(0 < len(request.assignment_id) <= MAX_ASSIGNMENT, "assignment_id must be that of the assignment")
    return Dropped(
        client_id=client_id(request.client_id),
        reason=reason(request.reason),
        why=words(request.why),
        gave_up=True,
    )


def objection(request: pb.ObjectToResultRequest) -> Dropped:
    """Why a result serves a client badly."""
    return Dropped(
        client_id=client_id(request.client_id), reason=Reason.RESULT_REFUSED, why=words(request.why)
    )


def why(text: str) -> str:
    """A member's reason, as logs and terminals may show it."""
    return printable(text[:MAX_WHY])


def plan(
    record: FederationRecord, client: str, number: int, matrices: Sequence[common_pb2.Matrix]
) -> list[Matrix]:
    """The matrices of a plan that is awaited from this client. Raises NOT_LEADER, INVALID_ARGUMENT."""
    transitions.require_publisher(record, client, number)
    require(
        len(matrices) == len(record.matrices), "the plan's matrices are not those of the federation's model"
    )
    return [matrix_from_proto(matrix) for matrix in matrices]


def update(request: pb.CommitUpdateRequest) -> UpdateRecord:
    """The update that a commit announces, apart from its round."""
    require(
        math.isfinite(request.scaling) and 0 < request.scaling <= MAX_SCALING,
        "scaling must be above 0, to 10^4",
    )
    require(1 <= request.rank <= MAX_RANK, f"rank must be 1 to {MAX_RANK}")
    require(len(request.layout_digest) == SHA256_BYTES, "layout_digest must be 32 bytes")
    require(request.report.client_id in {"", request.client_id}, "report.client_id must be the client")
    return UpdateRecord(
        client_id=client_id(request.client_id),
        layout_digest=request.layout_digest.hex(),
        shards=tuple(digest(shard, "shards") for shard in request.shards),
        rank=request.rank,
        scaling=request.scaling,
        report=report(request.report),
    )


def ballot(header: pb.CastBallotHeader) -> UpdateRecord:
    """The update that stands for a ballot: its digest in place of shards, one vote a client."""
    require(header.report.client_id in {"", header.client_id}, "report.client_id must be the client")
    require(header.report.example_count == 1, "report.example_count must be 1 in a vote")
    return UpdateRecord(
        client_id=client_id(header.client_id),
        layout_digest="",
        shards=(digest(header.digest, "digest"),),
        rank=1,
        scaling=1.0,
        report=report(header.report),
    )


def report(message: pb.UpdateReport) -> Report:
    """What an update says of itself."""
    require(1 <= message.example_count <= MAX_EXAMPLES, f"report.example_count must be 1 to {MAX_EXAMPLES}")
    if not math.isfinite(message.train_loss):
        raise DomainError(
            Reason.VALUE_NOT_FINITE,
            f"report.train_loss must be finite, not {message.train_loss}: lower the learning rate or check the data",
        )
    for name in ("train_s", "encrypt_s", "upload_s"):
        _duration(getattr(message, name), f"report.{name}")
    require(0 <= message.overlap <= 1, "report.overlap must be 0 to 1")
    return Report(
        example_count=message.example_count,
        train_loss=message.train_loss,
        train_s=message.train_s,
        encrypt_s=message.encrypt_s,
        upload_s=message.upload_s,
        upload_bytes=message.upload_bytes,
        overlap=message.overlap if message.HasField("overlap") else None,
        base_model=_base_model(message.base_model) if message.HasField("base_model") else None,
    )


def _base_model(message: pb.BaseModelTags) -> BaseModelTags:
    parts = {name: getattr(message, name) for name in ("weights", "tokenizer", "chat_template")}
    if message.HasField("start"):
        parts["start"] = message.start
    for name, tag in parts.items():
        require(len(tag) == TAG_BYTES, f"report.base_model.{name} must have {TAG_BYTES} bytes")
    return BaseModelTags(**{name: tag.hex() for name, tag in parts.items()})


def evaluation(message: pb.EvaluationReport) -> EvaluationRecord:
    """What an agent measured."""
    require(message.example_count <= MAX_EXAMPLES, f"report.example_count must be at most {MAX_EXAMPLES}")
    require(
        message.correct_count <= message.example_count, "report.correct_count must be at most example_count"
    )
    require(math.isfinite(message.loss), "report.loss must be finite")
    for name in ("download_s", "decrypt_s", "evaluate_s"):
        _duration(getattr(message, name), f"report.{name}")
    means = _means(message.means) if message.HasField("means") else None
    return EvaluationRecord(
        client_id=client_id(message.client_id),
        example_count=message.example_count,
        correct_count=message.correct_count,
        loss=message.loss,
        download_s=message.download_s,
        decrypt_s=message.decrypt_s,
        evaluate_s=message.evaluate_s,
        download_bytes=message.download_bytes,
        means=means,
    )


def _means(message: pb.MeanFigures) -> Means:
    told = {field.name: value for field, value in message.ListFields()}
    require(all(map(math.isfinite, told.values())), "report.means must be finite")
    require(0 <= message.accuracy <= 1, "report.means.accuracy must be 0 to 1")
    return Means(**told)


def digest(message: common_pb2.ShardDigest, field: str) -> StoredDigest:
    """A digest of 32 bytes."""
    require(len(message.sha256) == SHA256_BYTES, f"{field}: sha256 must be 32 bytes")
    return digest_from_proto(message)


def _duration(seconds: float, field: str) -> None:
    require(0 <= seconds <= MAX_SECONDS, f"{field} must be 0 to {MAX_SECONDS} seconds")
