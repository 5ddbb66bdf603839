"""Every decoder of bytes that come from outside: valid messages to start from, and the reasons it may give.

`tests/unit/test_decoders.py` mutates the messages; `make fuzz` lets coverage guide the mutations of the binary ones.
"""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import DecodeError, Message

from client_agent.config import AgentConfig
from client_agent.state import AgentState, UpdateNote
from coordinator import checks
from coordinator.records import (
    EvaluationRecord,
    FederationRecord,
    LayoutRecord,
    MemberRecord,
    RoundRecord,
    StoredRecord,
    UpdateRecord,
)
from services.aggregation.answers import read_answer, refused_line, stored_line
from services.aggregation.records import AggregationRequest, CommittedContribution, StoredResult
from services.key_authority.epochs import EpochKeys, from_bytes, to_bytes
from services.key_authority.sealer import Binding
from shelora.additive import INSECURE_TOY as ADDITIVE_TOY
from shelora.additive import Adder, ShardShape
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SumOpener
from shelora.additive.wire import sum_header, summand_header
from shelora.audit import AuditEntry, AuditEvent, AuditRecord, verified
from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Decryptor, SecretKey
from shelora.ckks.wire import BlockShape, FullBlock, SeededBlock, decode_block, encode_block
from shelora.committee.certificate import ContributorSet, verified_set
from shelora.committee.context import RoundContext
from shelora.committee.dealing import check_dealt, read_dealing, shown_to
from shelora.committee.sealing import open_answer, seal_answer
from shelora.committee.statements import StatementKind
from shelora.committee.verdict import Checked
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.lora.codec import decode_result, encode_result, validate_update
from shelora.lora.layout import Tensor
from shelora.lora.restore import merged, restore
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.negotiation.ballots import Ballot
from shelora.negotiation.plan import Plan, open_plan, seal_plan
from shelora.obfuscation import Obfuscation
from shelora.rounds import Round, RoundKind
from shelora.transport.certificates import (
    der_to_pem,
    holder,
    key_to_pem,
    new_key,
    pem_to_der,
    read_certificate,
    requested_key,
    signing_request,
)
from shelora.transport.enrolment import Token
from shelora.transport.identity import Identity
from shelora.transport.pieces import Digest
from shelora.transport.tls import IDENTITY_FILE, IdentityFolder
from shelora.v1 import committee_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.identities import COORDINATOR, SEALER, TestAuthority, client
from tests.unit.committee.rounds import ANSWER_KEY, World, context_of, signer
from tests.unit.lora.cohorts import TOY_KEY, Cohort, layout_of, lora_factors, planned
from tests.unit.lora.cohorts import Member as CohortMember
from tests.unit.strategies.runs import SumProtection
from tests.unit.strategies.runs import client as sending
from tests.unit.strategies.sums import SECRET as COMPLETE_TOY
from tests.unit.strategies.sums import Round as SumRound

ROOT = Path(__file__).parents[2]
KEY = bytes(range(32))

CIPHERTEXTS = frozenset(reason for reason in Reason if reason.startswith("CIPHERTEXT_"))
SHARDS = frozenset(
    {
        Reason.SHARD_MALFORMED,
        Reason.LAYOUT_MISMATCH,
        Reason.SHAPE_MISMATCH,
        Reason.VALUE_NOT_FINITE,
        Reason.VALUE_OUT_OF_RANGE,
    }
)


@dataclass(frozen=True)
class Decoder:
    """One way in."""

    name: str
    decode: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    reasons: frozenset[Reason]
    """All that it may refuse with; empty if it refuses nothing, since what it cannot read counts as absent."""
    binary: bool = True
    """Whether `make fuzz` runs it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", cache(self.seeds))

    def attempt(self, data: bytes) -> Reason | None:
        """Decodes. Returns the reason of a refusal; any other outcome than a named refusal is an error."""
        try:
            self.decode(data)
        except DomainError as error:
            if error.reason not in self.reasons:
                raise AssertionError(f"{self.name} refuses with {error!r}") from error
            return error.reason
        return None


@cache
def _cohort(*, encrypt_tensors: bool) -> Cohort:
    budgets = (0.2, 0.6)
    matrices, orders = planned([(8, 20), (6, 30)], budgets)
    tensors = (Tensor("head", (3, 4), 0.5), Tensor("bias", (5,)))
    rng = np.random.default_rng(0)
    members = tuple(
        CohortMember(
            0.5,
            2.0,
            tiers,
            lora_factors(rng, matrices, 3),
            {t.name: rng.uniform(-0.5, 0.5, t.shape).astype(np.float32) for t in tensors},
        )
        for tiers in (2, 1)
    )
    layout = layout_of(matrices, tensors, tiers=budgets, encrypt_tensors=encrypt_tensors)
    return Cohort(layout, orders, members)


@cache
def _updates(*, encrypt_tensors: bool) -> list[list[bytes]]:
    return _cohort(encrypt_tensors=encrypt_tensors).updates()


@cache
def _results(*, encrypt_tensors: bool) -> list[bytes]:
    cohort = _cohort(encrypt_tensors=encrypt_tensors)
    return cohort.results(_updates(encrypt_tensors=encrypt_tensors))


def _update(
    index: int, *, encrypt_tensors: bool
) -> tuple[Callable[[bytes], object], Callable[[], list[bytes]]]:
    return (
        lambda data: validate_update(_cohort(encrypt_tensors=encrypt_tensors).layout, index, data),
        lambda: [shards[index] for shards in _updates(encrypt_tensors=encrypt_tensors)],
    )


def _result(
    index: int, *, encrypt_tensors: bool
) -> tuple[Callable[[bytes], object], Callable[[], list[bytes]]]:
    def decode(data: bytes) -> object:
        cohort = _cohort(encrypt_tensors=encrypt_tensors)
        content = decode_result(cohort.layout, index, data)
        return restore(cohort.layout, [content], cohort.orders, Decryptor(TOY_KEY))

    return decode, lambda: [_results(encrypt_tensors=encrypt_tensors)[index]]


@cache
def _sum_round() -> SumRound:
    """A round of complete mode."""
    members = [sending(seed, rank, 100) for seed, rank in ((1, 1), (2, 2))]
    return SumRound(members, SumProtection(), Obfuscation(bytes(32), 1))


def _sketches(data: bytes) -> object:
    """What an agent makes of a result of sketches."""
    round_ = _sum_round()
    content = decode_result(round_.layout, 0, data)
    context = round_.context(round_.clients[0], opened=round_.opened())
    return merged(COMPLETE_TOY.restored(round_.layout, [content], context))


def _sketch_result() -> bytes:
    round_ = _sum_round()
    return encode_result(round_.layout, round_.contents()[0])


def _shape(*, seeded: bool) -> BlockShape:
    return BlockShape(parameters=INSECURE_TOY, key_id=bytes(16), rows=2, chunks=1, seeded=seeded)


def _block(*, seeded: bool) -> bytes:
    shape, rng = _shape(seeded=seeded), np.random.default_rng(0)
    c0, c1 = rng.integers(0, INSECURE_TOY.modulus, (2, 2, 1, INSECURE_TOY.poly_degree), dtype=np.uint64)
    if seeded:
        return encode_block(SeededBlock(shape, c0, np.zeros((2, 1, 64), dtype=np.uint8)))
    return encode_block(FullBlock(shape, c0, c1))


def _plan() -> Plan:
    return Plan((0.25, 0.5), np.array([3, 1, 0, 7], dtype=np.uint32))


def _ballot() -> bytes:
    return Ballot(np.array([1, 4, 5], dtype=np.uint32), np.array([7, 2**63 - 1, 0], dtype=np.uint64)).encode()


@cache
def _authority() -> TestAuthority:
    with TemporaryDirectory() as folder:
        return TestAuthority(Path(folder))


@cache
def _held() -> tuple[Any, ...]:
    return tuple(_authority().held(identity) for identity in (client(), COORDINATOR))


def _identity_file(data: bytes) -> object:
    with TemporaryDirectory() as folder:
        path = Path(folder) / IDENTITY_FILE
        path.touch(mode=0o600)
        path.write_bytes(data)
        return IdentityFolder(Path(folder)).read()


def _identity_files() -> list[bytes]:
    return [key_to_pem(held.key) + held.chain for held in _held()] + [_encrypted_key()]


def _encrypted_key() -> bytes:
    return new_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"p"),
    )


def _certificate_der(data: bytes) -> object:
    """As a newcomer and an agent read what an authority answers."""
    return read_certificate(der_to_pem(data))


def _key_of_request(data: bytes) -> object:
    return requested_key(data)


def _message(kind: type[Message], check: Callable[[Any], object]) -> Callable[[bytes], object]:
    """A request as gRPC parses it; what it cannot parse never reaches us."""

    def decode(data: bytes) -> object:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return None
        return check(message)

    return decode


@cache
def _specification() -> FederationSpec:
    return FederationSpec.from_yaml(ROOT / "examples/reuters/federation.yaml")


def _joined(request: pb.JoinRequest) -> object:
    spec = _specification()
    return checks.member(request), checks.model(spec, request.matrices, request.tensors)


def _join() -> list[bytes]:
    matrices = [common_pb2.Matrix(name="q", out_features=8, in_features=12)]
    tensors = [common_pb2.Tensor(name="head", shape=(3, 4), bound=1.0)]
    message = pb.JoinRequest(
        client_id="ward-7", rank=4, budget=0.5, example_count=9, protocol_version=1, matrices=matrices
    )
    message.tensors.extend(tensors)
    return [message.SerializeToString()]


def _commit() -> pb.CommitUpdateRequest:
    digest = common_pb2.ShardDigest(sha256=bytes(32), total_bytes=9)
    report = pb.UpdateReport(example_count=5, train_loss=0.5, overlap=0.5)
    return pb.CommitUpdateRequest(
        client_id="ward-7", layout_digest=bytes(32), shards=[digest], rank=4, scaling=2.0, report=report
    )


def _audit_log() -> bytes:
    now, head, lines = datetime(2026, 3, 1, tzinfo=UTC), None, []
    entries = [
        AuditEntry(event=AuditEvent.LOG_STARTED, vault="5e" * 16),
        AuditEntry(event=AuditEvent.EPOCH_OPENED, federation_id="clinic", epoch=1, key_id="00" * 16),
        AuditEntry(
            event=AuditEvent.CALL_DENIED, role="operator", method="/a.B/C", reason="PERMISSION_DENIED"
        ),
    ]
    for entry in entries:
        head = AuditRecord.after(head, entry, now)
        lines.append(head.line())
    return b"".join(lines)


def _yaml(load: Callable[[Path], object]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_bytes(data)
            return load(path)

    return decode


def _in_state(decode: Callable[[AgentState, Path, bytes], object]) -> Callable[[bytes], object]:
    def decoded(data: bytes) -> object:
        with TemporaryDirectory() as folder:
            state = AgentState(Path(folder) / "state")
            try:
                return decode(state, Path(folder) / "state", data)
            finally:
                state.close()

    return decoded


def _weights(state: AgentState, folder: Path, data: bytes) -> object:
    (folder / "applied.safetensors").write_bytes(data)
    return state.applied()


def _weight_files() -> list[bytes]:
    ramp = np.ones((2, 3), dtype=np.float32)
    arrays = {"A/q": ramp, "B/q": ramp.T.copy(), "tensor/head": ramp}
    arrays |= {"frozen-A/q": ramp, "frozen-B/q": ramp.T.copy(), "exponents/q": np.float32([3, -2])}
    return [safetensors.numpy.save(arrays, metadata={"round": "1"})]


def _plan_fit(state: AgentState, folder: Path, data: bytes) -> object:
    (folder / "plan_fit.json").write_bytes(data)
    fit = state.plan_fit()
    assert 1 <= fit.weight < float("inf")
    assert 0 <= fit.fresh_overlap < float("inf")
    return fit


def _spool(state: AgentState, folder: Path, data: bytes) -> object:
    writer = state.begin_spool("clinic.0.1")
    writer.add(b"shard")
    spool = writer.finish(_NOTE)
    (spool.folder / "manifest.json").write_bytes(data)
    return state.spool("clinic.0.1", bytes(32))


_NOTE = UpdateNote(
    round_id="clinic.0.1",
    layout_digest=bytes(32),
    rank=4,
    scaling=2.0,
    example_count=9,
    train_loss=0.5,
    train_s=1.0,
    encrypt_s=1.0,
)


def _manifests() -> list[bytes]:
    with TemporaryDirectory() as folder:
        state = AgentState(Path(folder) / "state")
        writer = state.begin_spool("clinic.0.1")
        writer.add(b"shard")
        content = (writer.finish(_NOTE).folder / "manifest.json").read_bytes()
        state.close()
    return [content]


def _job() -> bytes:
    parts = tuple(
        CommittedContribution(client_id=name, sha256=bytes(32), weight=0.5, scaling=2.0) for name in "ab"
    )
    return AggregationRequest("clinic.0.1", 0, parts).to_line()


def _answers() -> list[bytes]:
    return [
        stored_line(StoredResult(Digest(bytes(32), 9), 0.5)),
        refused_line(DomainError(Reason.SHARD_MISSING, "words")),
    ]


def _record_seeds() -> list[bytes]:
    spec = _specification()
    update = checks.update(_commit())
    layout = _cohort(encrypt_tensors=True).layout
    records: list[StoredRecord] = [
        FederationRecord(federation_id="clinic", instance="00000000", spec=spec, created_ms=1),
        LayoutRecord.of(layout),
        MemberRecord(client_id="a", rank=4, budget=0.5, example_count=3),
        update,
        RoundRecord(
            round=Round(
                round_id="clinic.0.1",
                kind=RoundKind.TRAIN,
                number=1,
                attempt=1,
                min_updates=2,
                deadline_s=60,
                cohort=("a", "b"),
            ),
            sequence=1,
            layout_digest="",
            shard_count=1,
        ),
    ]
    return [record.model_dump_json().encode() for record in records]


def _records(data: bytes) -> object:
    """A record of another kind, or of a format to come, is refused like a damaged one."""
    *others, last = (
        FederationRecord,
        LayoutRecord,
        MemberRecord,
        UpdateRecord,
        RoundRecord,
        EvaluationRecord,
    )
    for kind in others:
        with suppress(DomainError):
            return kind.read(data)
    return last.read(data)


def _samples(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(ROOT / name).read_bytes() for name in names]


def _secrets() -> EpochKeys:
    return EpochKeys(
        parameters=INSECURE_TOY.name,
        key_id=bytes(16),
        ckks_secret_key=TOY_KEY.to_bytes(),
        obfuscation_secret=KEY,
    )


_ADDITIVE = ShardShape(ADDITIVE_TOY, 0, 100)


def _additive_sum(data: bytes) -> object:
    opener = SumOpener(ADDITIVE_TOY, np.zeros(64, dtype=np.int64), KEY, contributors=2, most_contributors=2)
    return opener.open(data, _ADDITIVE)


def _planes() -> bytes:
    return bytes(_ADDITIVE.encoded_bytes - len(summand_header(_ADDITIVE)))


@cache
def _round() -> tuple[World, committee_pb2.Certificate, list[committee_pb2.Signed]]:
    world = World(context_of(3)).collect()
    world.check()
    certificate = world.certify(world.context.cohort)
    return world, certificate, world.release(certificate)


def _dealt_share(message: committee_pb2.DealtShare) -> object:
    world, _, _ = _round()
    member = world.member(world.committee.members[0])  # the same key every time
    if refusal := member.receive("ward-001", message, world.keys):
        raise refusal
    return member


def _shown() -> bytes:
    world, _, _ = _round()
    return shown_to(world.context, world.dealt["ward-001"], 1).SerializeToString()


def _opening() -> bytes:
    _, certificate, answers = _round()
    return committee_pb2.Opening(certificate=certificate, answers=answers).SerializeToString()


def _as_first_member(kind: StatementKind, content: bytes) -> committee_pb2.Signed:
    """A hostile member's statement: its signature is right, whatever it signs."""
    world, _, _ = _round()
    return signer(world.committee.members[0]).sign(kind, world.context, content)


def _keys_with(content: bytes) -> object:
    world, _, _ = _round()
    others = (member.key for member in list(world.members.values())[1:])
    return world.key_set([_as_first_member(StatementKind.COMMITTEE_KEY, content), *others])


def _opened_with(content: bytes) -> object:
    world, certificate, answers = _round()
    return world.open(certificate, [_as_first_member(StatementKind.ANSWER, content), *answers[1:]])


def _sealed_answer(values: bytes) -> bytes:
    world, certificate, _ = _round()
    chosen = ContributorSet.read(world.context, certificate.content)
    sealed = seal_answer(ANSWER_KEY, chosen.digest, 1, values, Csprng(bytes(32)))
    return committee_pb2.Answer(position=1, sealed=sealed).SerializeToString()


def _summed_shares() -> bytes:
    world, certificate, answers = _round()
    chosen = ContributorSet.read(world.context, certificate.content)
    answer = committee_pb2.Answer.FromString(answers[0].content)
    return open_answer(ANSWER_KEY, chosen.digest, 1, answer.sealed)


_BINDING = Binding(purpose="epoch secrets", vault="5e" * 16, federation_id="clinic", epoch=1)
_RESTORING = SHARDS | CIPHERTEXTS | {Reason.TOO_FEW_CONTRIBUTORS}
_INVALID = frozenset({Reason.INVALID_ARGUMENT})
_CONFIGURATION = frozenset({Reason.CONFIGURATION_INVALID})
_UNAVAILABLE = frozenset({Reason.SECRET_UNAVAILABLE})
_DEALING = frozenset({Reason.DEALING_REFUSED})
_CERTIFYING = frozenset({Reason.SET_REFUSED, Reason.QUORUM_MISSING})

DECODERS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        Decoder(
            "seeded-block",
            lambda data: decode_block(data, _shape(seeded=True)),
            lambda: [_block(seeded=True)],
            CIPHERTEXTS,
        ),
        Decoder(
            "full-block",
            lambda data: decode_block(data, _shape(seeded=False)),
            lambda: [_block(seeded=False)],
            CIPHERTEXTS,
        ),
        Decoder("update-shard", *_update(0, encrypt_tensors=True), SHARDS | CIPHERTEXTS),
        Decoder("update-tensors", *_update(1, encrypt_tensors=False), SHARDS | CIPHERTEXTS),
        Decoder(
            "update-sketches",
            lambda data: validate_update(_sum_round().layout, 0, data),
            lambda: [_sum_round().updates[0][0]],
            SHARDS | CIPHERTEXTS,
        ),
        Decoder(
            "result-sketches",
            _sketches,
            lambda: [_sketch_result()],
            _RESTORING | {Reason.SUM_UNREADABLE},
        ),
        Decoder("result-shard", *_result(0, encrypt_tensors=True), _RESTORING),
        Decoder("result-tensors", *_result(1, encrypt_tensors=False), _RESTORING),
        Decoder(
            "layout",
            _message(common_pb2.Layout, layout_from_proto),
            lambda: [
                layout_to_proto(layout).SerializeToString()
                for layout in (_cohort(encrypt_tensors=True).layout, _sum_round().layout)
            ],
            _INVALID,
        ),
        Decoder("plan", Plan.decode, lambda: [_plan().encode()], frozenset({Reason.PLAN_REFUSED})),
        Decoder(
            "sealed-plan",
            lambda data: open_plan(data, KEY, b"context"),
            lambda: [seal_plan(_plan(), KEY, b"context")],
            frozenset({Reason.PLAN_REFUSED}),
        ),
        Decoder(
            "ballot",
            lambda data: Ballot.decode(data, total=8, most=4),
            lambda: [_ballot()],
            frozenset({Reason.BALLOT_REFUSED}),
        ),
        Decoder("signing-request", _key_of_request, lambda: [signing_request(new_key())], _INVALID),
        Decoder("certificate", read_certificate, lambda: [held.certificate for held in _held()], _INVALID),
        Decoder(
            "certificate-der",
            _certificate_der,
            lambda: [pem_to_der(held.certificate) for held in _held()] + [_authority().root.der],
            _INVALID,
        ),
        Decoder(
            "client-certificate",
            lambda data: holder(data, _authority().root.der),
            lambda: [pem_to_der(held.certificate) for held in _held()],
            frozenset({Reason.UNAUTHENTICATED}),
        ),
        Decoder("identity-file", _identity_file, _identity_files, _CONFIGURATION),
        Decoder(
            "sealed-file",
            lambda data: SEALER.open(_BINDING, data),
            lambda: [SEALER.seal(_BINDING, b"content")],
            _UNAVAILABLE,
        ),
        Decoder("epoch-secrets", from_bytes, lambda: [to_bytes(_secrets())], _UNAVAILABLE),
        Decoder(
            "secret-key",
            lambda data: SecretKey.from_bytes(INSECURE_TOY, data),
            lambda: [TOY_KEY.to_bytes()],
            _UNAVAILABLE,
        ),
        Decoder("join", _message(pb.JoinRequest, _joined), _join, _INVALID | {Reason.VERSION_REFUSED}),
        Decoder(
            "commit",
            _message(pb.CommitUpdateRequest, checks.update),
            lambda: [_commit().SerializeToString()],
            _INVALID | {Reason.VALUE_NOT_FINITE},
        ),
        Decoder(
            "evaluation",
            _message(pb.EvaluationReport, checks.evaluation),
            lambda: [
                pb.EvaluationReport(client_id="a", example_count=2, correct_count=1).SerializeToString()
            ],
            _INVALID,
        ),
        Decoder(
            "federation",
            _message(pb.FederationSpec, FederationSpec.from_proto),
            lambda: [_specification().to_proto().SerializeToString()],
            _INVALID,
        ),
        Decoder(
            "additive-summand",
            lambda data: Adder(_ADDITIVE).add(data),
            lambda: [summand_header(_ADDITIVE) + _planes()],
            CIPHERTEXTS,
        ),
        Decoder(
            "additive-sum",
            _additive_sum,
            # Under a sum of secrets that is zero, zeros are a sum of nothing but half a unit of rounding each.
            lambda: [sum_header(_ADDITIVE, 2) + _planes()],
            CIPHERTEXTS | {Reason.SUM_UNREADABLE},
        ),
        Decoder(
            "round-context",
            _message(committee_pb2.RoundContext, lambda m: RoundContext.from_proto(m, insecure=True)),
            lambda: [context_of(3).to_proto().SerializeToString()],
            _INVALID,
        ),
        Decoder(
            "statement",
            _message(
                committee_pb2.Signed,
                lambda m: _round()[0].trust.author(m, StatementKind.DEALING, context_of(3)),
            ),
            lambda: [_round()[0].dealt["ward-001"].dealing.SerializeToString()],
            frozenset({Reason.SIGNATURE_REFUSED}),
        ),
        Decoder(
            "dealing",
            lambda data: read_dealing(context_of(3), data),
            lambda: [_round()[0].dealt["ward-001"].dealing.content],
            _DEALING,
        ),
        Decoder(
            "dealt-shares",
            _message(committee_pb2.DealtShares, lambda m: check_dealt(context_of(3), m)),
            lambda: [_round()[0].dealt["ward-001"].SerializeToString()],
            _DEALING,
        ),
        Decoder(
            "dealt-share",
            _message(committee_pb2.DealtShare, _dealt_share),
            lambda: [_shown()],
            _DEALING | {Reason.SIGNATURE_REFUSED},
        ),
        Decoder(
            "committee-check",
            lambda data: Checked.read(context_of(3), data),
            lambda: [next(iter(_round()[0].members.values())).check().content],
            _INVALID,
        ),
        Decoder(
            "contributor-set",
            lambda data: ContributorSet.read(context_of(3), data),
            lambda: [_round()[1].content],
            frozenset({Reason.SET_REFUSED}),
        ),
        Decoder(
            "set-certificate",
            _message(
                committee_pb2.Certificate,
                lambda m: verified_set(context_of(3), _round()[0].committee, m, _round()[0].trust),
            ),
            lambda: [_round()[1].SerializeToString()],
            _CERTIFYING,
        ),
        Decoder(
            "opening",
            _message(committee_pb2.Opening, lambda m: _round()[0].open(m.certificate, m.answers)),
            lambda: [_opening()],
            _CERTIFYING | {Reason.ANSWERS_REFUSED, Reason.SUM_UNREADABLE},
        ),
        Decoder(
            "committee-key",
            _keys_with,
            lambda: [_round()[0].members[_round()[0].committee.members[0]].key.content],
            frozenset({Reason.COMMITTEE_REFUSED}),
        ),
        Decoder(
            "answer",
            _opened_with,
            lambda: [_round()[2][0].content],
            frozenset({Reason.ANSWERS_REFUSED, Reason.SUM_UNREADABLE}),
        ),
        Decoder(
            "summed-shares",
            lambda data: _opened_with(_sealed_answer(data)),
            lambda: [_summed_shares()],
            frozenset({Reason.ANSWERS_REFUSED, Reason.SUM_UNREADABLE}),
        ),
        Decoder("weights-file", _in_state(_weights), _weight_files, frozenset()),
        Decoder(
            "token",
            lambda data: Token.parse(data.decode("latin-1")),
            lambda: [Token(KEY, KEY).encoded.encode()],
            frozenset({Reason.TOKEN_REFUSED}),
            binary=False,
        ),
        Decoder(
            "identity-uri",
            lambda data: Identity.from_uri(data.decode("latin-1")),
            lambda: [client().uri.encode(), COORDINATOR.uri.encode()],
            _INVALID,
            binary=False,
        ),
        Decoder(
            "audit-log",
            lambda data: list(verified(io.BytesIO(data))),
            lambda: [_audit_log()],
            frozenset({Reason.AUDIT_BROKEN}),
            binary=False,
        ),
        Decoder(
            "federation-yaml",
            _yaml(FederationSpec.from_yaml),
            _samples("examples/reuters/federation.yaml"),
            _CONFIGURATION,
            binary=False,
        ),
        Decoder(
            "agent-yaml",
            _yaml(lambda path: AgentConfig.load(path, {})),
            _samples("client_agent/sample.yaml"),
            _CONFIGURATION,
            binary=False,
        ),
        Decoder("store-record", _records, _record_seeds, frozenset({Reason.RECORD_UNREADABLE}), binary=False),
        Decoder(
            "worker-job",
            AggregationRequest.from_line,
            lambda: [_job()],
            frozenset({Reason.INVALID_ARGUMENT, Reason.TOO_FEW_CONTRIBUTORS}),
            binary=False,
        ),
        Decoder("worker-answer", read_answer, _answers, frozenset(Reason), binary=False),
        Decoder(
            "plan fit",
            _in_state(_plan_fit),
            lambda: [
                json.dumps({"format": 1, "vote_round_id": "v", "weight": 1.5, "fresh_overlap": 0.5}).encode()
            ],
            frozenset(),
            binary=False,
        ),
        Decoder("spool-manifest", _in_state(_spool), _manifests, frozenset(), binary=False),
    )
}
