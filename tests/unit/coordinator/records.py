"""Records for tests of pure functions."""

from coordinator.records import (
    FederationRecord,
    MemberRecord,
    Model,
    Negotiation,
    Phase,
    PlanRecord,
    RoundRecord,
    StoredDigest,
    Ticket,
)
from shelora.federation import FederationSpec
from shelora.lora.layout import Matrix, Tensor
from shelora.rounds import Round, RoundKind, RoundState

MATRICES = (Matrix("q", 8, 12), Matrix("v", 8, 12))
TENSORS = (Tensor("bias", (3,), 4.0),)
DIGEST = StoredDigest(sha256="ab" * 32, total_bytes=7)
NEGOTIATION = Negotiation(
    votes_sequence=1,
    votes_layout="cd" * 32,
    tiers=(0.5, 1.0),
    candidates=("b", "c"),
    deadline_ms=90_000,
    plan_number=1,
    leader="a",
)
PLAN = PlanRecord(number=1, digest=DIGEST, negotiation=NEGOTIATION, tier_columns=((1, 2), (3, 4)))
MEMBERS = {name: MemberRecord(client_id=name, rank=4, budget=1.0, example_count=10) for name in "abc"}


def federation(**fields) -> FederationRecord:
    spec = FederationSpec.model_validate(
        {
            "name": "fed",
            "training": {"base_model": "tiny", "labels": ["x", "y"]},
            "round": {"rounds": 2, "clients": 3, "min_updates": 2, "deadline_s": 60, "max_attempts": 2},
            "protection": {"mode": "selective"},
        }
    )
    record = FederationRecord(
        federation_id="fed",
        instance="00000001",
        spec=spec,
        created_ms=1,
        phase=Phase.RUNNING,
        model=Model(matrices=MATRICES, tensors=TENSORS),
        key_id="00" * 16,
    )
    return record.model_copy(update=fields)


def ticket(kind=RoundKind.TRAIN, sequence=2, plan=None) -> Ticket:
    number = 1 if kind is RoundKind.TRAIN else 0
    return Ticket(sequence=sequence, kind=kind, number=number, attempt=1, plan=plan)


def a_round(
    state=RoundState.COLLECTING, kind=RoundKind.TRAIN, sequence=2, reason=None, **fields
) -> RoundRecord:
    round_ = Round(
        round_id=f"fed.00000001.{sequence}",
        kind=kind,
        number=1 if kind is RoundKind.TRAIN else 0,
        attempt=1,
        min_updates=2,
        deadline_s=60,
        cohort=("a", "b", "c"),
        state=state,
        reason=reason,
        opened_ms=10_000,
    )
    return RoundRecord(round=round_, sequence=sequence, layout_digest="ef" * 32, shard_count=2).model_copy(
        update=fields
    )
