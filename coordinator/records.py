"""What the coordinator keeps: frozen records, each with the version of its format, stored as JSON.

A federation's record is small and rewritten at every step; what grows (members, commits, evaluations, results of
shards) has keys of its own. Rules live in `coordinator.decisions`; these classes only hold and name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.lora.layout import Layout, Matrix, Shard, SumTerms, Tensor
from shelora.protocol import Stage
from shelora.rounds import Round, RoundKind, RoundState
from shelora.strategies.port import Strategy

MAX_NOTICES: Final = 100
"""A federation's record is rewritten at every step: it holds no more. The round's own record holds all."""


class StoredRecord(BaseModel):
    """Base of everything stored. Equal records have equal JSON."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    """Version of the stored form."""

    @classmethod
    def read(cls, data: bytes | str) -> Self:
        """Reads what `model_dump_json` wrote.

        Raises: RECORD_UNREADABLE if it is damaged or of another version; it stays as it is.
        """
        try:
            return cls.model_validate_json(data)
        except (ValidationError, DomainError) as error:
            raise DomainError(
                Reason.RECORD_UNREADABLE,
                f"the stored {cls.__name__} {_oddity(error)}: run the version of the coordinator that wrote it, or a "
                "newer one; it is left as it is",
            ) from error


def _oddity(error: ValidationError | DomainError) -> str:
    """What is the matter with a stored record."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    formats = [problem["input"] for problem in problems if problem["loc"][-1:] == ("format",)]
    return f"has format {formats[0]}, and only 1 is read here" if formats else "has other contents than ours"


class Phase(StrEnum):
    """Where a federation is."""

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


class Model(StoredRecord):
    """What the clients' model looks like."""

    matrices: tuple[Matrix, ...]
    tensors: tuple[Tensor, ...]
    """With the federation's bound."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex; equal for equal shapes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class StoredDigest(StoredRecord):
    """SHA-256 and size of a blob."""

    sha256: str
    """In hex."""
    total_bytes: int


class Negotiation(StoredRecord):
    """A plan being made: a vote was published, a leader ranks the sums. After ballots the plan is there at once."""

    votes_sequence: int
    """Sequence of the vote."""
    votes_layout: str
    """Digest of its layout in hex."""
    tiers: tuple[float, ...]
    """Budgets of the members when the vote was published, strictly increasing."""
    candidates: tuple[str, ...]
    """Who may still become leader, in order of their votes."""
    deadline_ms: int
    """Unix milliseconds until which the leader may publish."""
    led_ms: int = 0
    """Unix milliseconds at which the leader was named; 0 before the first."""
    plan_number: int = 0
    """Number the leader publishes under; a new one for every leader, so that a late leader's plan is recognized."""
    leader: str = ""
    """"" between two leaders."""
    rejected: int = 0
    """Number of the plan discarded last, so that a late rejection of it succeeds."""


class PlanRecord(StoredRecord):
    """A published plan: all that a server learns of it."""

    number: int
    digest: StoredDigest
    negotiation: Negotiation
    """As it ended; goes on from there if the plan is rejected."""
    tier_columns: tuple[tuple[int, ...], ...]
    """Protected columns by matrix and tier."""


class Ticket(StoredRecord):
    """The round in progress, fixed before anything else of it exists."""

    sequence: int
    """Number among all attempts of the federation, from 1."""
    kind: RoundKind
    number: int
    """Number among training rounds from 1; 0 for a vote."""
    attempt: int
    plan: PlanRecord | None = None
    """Plan the round trains by."""
    draw: int = 0
    """Which batches are trained on; 0 without a committee."""


class ResultRecord(StoredRecord):
    """The result of a published training round, as long as agents may ask for it."""

    sequence: int
    """Of its round."""
    layout: str
    """Digest of its layout in hex."""
    plan: PlanRecord | None
    """Plan under which it was made."""
    epoch: int
    """Epoch in which it was made; 0 of a record that is older than epochs were noted."""
    opening: StoredDigest | None
    """What opens it; None without a committee."""
    attempt: int
    """Which attempt its round was."""
    digest: str = ""
    """`shelora.committee.context.result_digest` in hex; empty of a record that is older."""
    contributors: tuple[str, ...] = ()
    """With a committee, whose updates are in it, those of most examples first; empty if they are too many."""


class Garbage(StoredRecord):
    """A round whose data aggregation may delete."""

    round_id: str
    results: bool
    """Whether its results go too."""


class Dropped(StoredRecord):
    """An update that is not in its round's aggregate."""

    client_id: str
    reason: Reason
    why: str
    """What the client should do, in words; names nobody else. Its own words if it gave up."""
    gave_up: bool = False
    """Whether the client said so itself, so that nobody waits for it."""


class EarlyStopping(StoredRecord):
    """What the rule in `round.stop` has seen."""

    best: int
    """Training round with the best value."""
    value: float
    """That value."""
    judged: int
    """Newest training round that was judged."""
    waited: int = 0
    """Rounds judged since the best."""


class FederationRecord(StoredRecord):
    """Everything a coordinator needs to go on with a federation after a restart."""

    @field_validator("spec", mode="before")
    @classmethod
    def _written_before(cls, spec: Any) -> Any:  # noqa: ANN401 - whatever was stored
        """A federation whose record does not say what `figures` it tells began without them."""
        match spec:
            case {"protection": dict(protection)} if "figures" not in protection:
                return {**spec, "protection": {**protection, "figures": "none"}}
        return spec

    federation_id: str
    instance: str
    """Eight random hex digits: rounds of a federation re-created under an expired name never meet old data."""
    spec: FederationSpec
    created_ms: int
    phase: Phase = Phase.CREATED
    failure: str = ""
    """Why it failed, in words."""
    model: Model | None = None
    epoch: int = 1
    """Epoch of the keys."""
    key_id: str = ""
    """CKKS key of the epoch in hex; empty until the key authority opened it."""
    rotated_at: int = 0
    """Training rounds that had been published when the epoch began."""
    rotate_from: int = 0
    """Epoch that someone asked to leave; 0 if nobody did."""
    retired_before: int = 1
    """Epochs below this one are retired."""
    revoked: dict[str, int] = {}
    """Clients that were revoked, with the time up to which their certificates are, Unix milliseconds."""
    sequence: int = 0
    """Sequence of the newest round."""
    ticket: Ticket | None = None
    attempt: int = 1
    """Attempt that the next round is."""
    trained: int = 0
    """Training rounds published."""
    draws: int = 0
    """Draws that are spent: their updates are in a sum, or might be."""
    silent: tuple[str, ...] = ()
    """Clients that kept a committee from being seated: not asked again before the next result, if others are enough."""
    overlap: float | None = None
    """Mean of what the newest training round's updates said of their overlap with the plan; None if they said nothing,
    or there was a vote since."""
    planned_at: int = 0
    """Training rounds that had been published at the last vote."""
    plan_count: int = 0
    """Plan numbers given out."""
    plan: PlanRecord | None = None
    """Plan that new rounds train by."""
    accepted_plan: int = 0
    """Number of the newest plan under which a round has closed: no rejection discards it any more."""
    negotiation: Negotiation | None = None
    result_sequence: int = 0
    """Sequence of the newest published training round; 0 for none."""
    result_layout: str = ""
    """Digest of its layout in hex."""
    result_plan: PlanRecord | None = None
    """Plan under which that result was made."""
    result_epoch: int = 0
    """Epoch in which it was made; 0 for none."""
    result_opening: StoredDigest | None = None
    """What opens it; None without a committee."""
    result_attempt: int = 1
    """Which attempt its round was."""
    result_digest: str = ""
    """`shelora.committee.context.result_digest` in hex; empty of a record that is older."""
    result_contributors: tuple[str, ...] = ()
    """With a committee, whose updates are in it, those of most examples first; empty if they are too many."""
    suspects: tuple[str, ...] | None = None
    """Clients whose updates were in every result that was taken back; None if none was. One that spoils results alone
    is always among them, and who was left out of one that is taken back is not."""
    sits_out: str = ""
    """The suspect that is not asked, if the others are enough; "" for none."""
    result_before: ResultRecord | None = None
    """With a committee, the result that takes its place if agents cannot open it. None if that is the initial state,
    or if it has taken its place already."""
    garbage: tuple[Garbage, ...] = ()
    extra_rounds: int = 0
    """Training rounds beyond those of the specification; less than 0 if it was stopped."""
    split: bool = False
    """Whether enough clients have joined, and no model is that of more than half of them."""
    stopped: bool = False
    """Whether its operator stopped it."""
    early_stopping: EarlyStopping | None = None
    """Under a rule in `round.stop`; None before the first evaluations."""
    converged: bool = False
    """Whether that rule ended it."""
    deleting: bool = False
    """Whether it is being deleted, which nothing takes back."""
    notices: tuple[Dropped, ...] = ()
    """What the newest round left out, at most MAX_NOTICES of it, with reasons that its clients get to see."""
    noticed_sequence: int = 0
    """That round."""

    @property
    def ended(self) -> bool:
        return self.phase in {Phase.FINISHED, Phase.FAILED}

    @property
    def rounds(self) -> int:
        """Training rounds in all."""
        return self.spec.round.rounds + self.extra_rounds

    @property
    def strategy(self) -> Strategy:
        """How its updates are protected."""
        return self.spec.protection.strategy

    @property
    def rotation_due(self) -> bool:
        """Whether new keys come next, between two rounds."""
        if not self.strategy.needs_keys:
            return False
        old = 0 < self.spec.protection.key_rotation_rounds <= self.trained - self.rotated_at
        return old or self.rotate_from == self.epoch

    @property
    def oldest_epoch(self) -> int:
        """The oldest epoch whose keys agents may still need: that of a result in use, until there is a later one.

        None of those so far if it ended before keys were noted: they may have been made all the same.
        """
        if self.ended and self.strategy.needs_keys and not self.key_id:
            return self.epoch + 1
        return min([self.epoch, *(result.epoch for result in self.results if result.epoch)])

    @property
    def result(self) -> ResultRecord | None:
        """The newest result; None before the first."""
        if not self.result_sequence:
            return None
        return ResultRecord(
            sequence=self.result_sequence,
            layout=self.result_layout,
            plan=self.result_plan,
            epoch=self.result_epoch,
            opening=self.result_opening,
            attempt=self.result_attempt,
            digest=self.result_digest,
            contributors=self.result_contributors,
        )

    @property
    def results(self) -> tuple[ResultRecord, ...]:
        """The newest result, and the one that may take its place."""
        return tuple(result for result in (self.result, self.result_before) if result is not None)

    @property
    def retractable(self) -> bool:
        """Whether there is a way back from the newest result: to the one before, or from the first to the start."""
        first = self.trained == 1
        return (
            self.strategy.needs_committee
            and bool(self.result_sequence)
            and (first or bool(self.result_before))
        )

    @property
    def revoked_ms(self) -> int:
        """Time of the newest revocation that was taken in, Unix milliseconds; 0 for none."""
        return max(self.revoked.values(), default=0)

    def admits(self, member: "MemberRecord") -> bool:
        """Whether a client that joined is still a member: it is not if the certificate it joined with is revoked."""
        return member.certified_ms > self.revoked.get(member.client_id, -1)

    def fits(self, member: "MemberRecord") -> bool:
        """Whether a client that joined has the federation's model, as far as that is fixed."""
        return self.model is None or member.shapes in {"", self.model.digest}

    def admitted(self, joined: Mapping[str, "MemberRecord"]) -> dict[str, "MemberRecord"]:
        """Those of the clients that joined which are members still, by name."""
        known = {"", self.model.digest} if self.model else None
        return {
            name: member
            for name, member in joined.items()
            if self.admits(member) and (known is None or member.shapes in known)
        }

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The model's matrices; none before it is fixed."""
        return self.model.matrices if self.model else ()

    def round_id(self, sequence: int) -> str:
        """Identifier of a round, unique for all federations and attempts."""
        return f"{self.federation_id}.{self.instance}.{sequence}"

    def sequence_of(self, round_id: str) -> int | None:
        """The sequence of a round of this federation; None if it is none."""
        prefix = f"{self.federation_id}.{self.instance}."
        number = round_id.removeprefix(prefix)
        known = round_id.startswith(prefix) and number.isascii() and number.isdecimal()
        return int(number) if known and 1 <= int(number) <= self.sequence else None

    @property
    def plans(self) -> tuple[PlanRecord, ...]:
        """The plan in force and those under which the results in use were made."""
        made_under = (result.plan for result in self.results)
        return tuple(plan for plan in (self.plan, *made_under) if plan is not None)

    @property
    def negotiations(self) -> tuple[Negotiation, ...]:
        """Those whose votes agents may still ask for."""
        present = (self.negotiation,) if self.negotiation else ()
        return (*present, *(plan.negotiation for plan in self.plans))

    @property
    def results_in_use(self) -> frozenset[int]:
        """Sequences of the rounds whose results agents may still ask for."""
        made = (result.sequence for result in self.results)
        return frozenset({*made, *(n.votes_sequence for n in self.negotiations)})

    @property
    def layouts_in_use(self) -> frozenset[str]:
        """Digests of the layouts of those results."""
        made = (result.layout for result in self.results)
        return frozenset({*made, *(n.votes_layout for n in self.negotiations)})


class ShardResult(StoredRecord):
    """One aggregated shard."""

    digest: StoredDigest
    cpu_s: float


class RankedList(StoredRecord):
    """What the coordinator made of a vote's ballots."""

    digest: StoredDigest
    tiers: tuple[float, ...]
    """Budgets of the members when it was made, strictly increasing."""
    tier_columns: tuple[tuple[int, ...], ...]
    """Protected columns by matrix and tier."""


class RoundRecord(StoredRecord):
    """A round with what the coordinator needs to run and to publish it."""

    round: Round
    sequence: int
    layout_digest: str
    """In hex; the layout has a key of its own, shared by the rounds of a plan."""
    shard_count: int
    plan_number: int = 0
    """Plan the round trains by; 0 for none."""
    epoch: int = 1
    """Epoch of the keys that its layout and its plan are under."""
    revoked_ms: int = 0
    """Time of the newest revocation that its cohort takes into account, Unix milliseconds."""
    laggards: tuple[str, ...] = ()
    """Of the cohort, those that missed the round before: not waited for unless they are seen working."""
    most_ms: int = 0
    """Unix milliseconds at which most of the cohort, enough for a result, had committed; 0 before."""
    closed_ms: int = 0
    """Unix milliseconds at which collecting ended; 0 before."""
    dropped: tuple[Dropped, ...] = ()
    """Updates that are left out: by policy, because aggregation no longer has them, or because their client was revoked
    (whether it has committed one or not)."""
    contributor_count: int = 0
    """Updates in the result."""
    results: tuple[StoredDigest, ...] = ()
    """By shard index, once published; empty for a vote by ballots."""
    ranked: RankedList | None = None
    """Of a published vote by ballots; None if no member affords encryption."""
    aggregate_cpu_s: float = 0.0
    aggregate_wall_s: float = 0.0
    order: tuple[str, ...] = ()
    """Members of the committee in its order, once it is seated."""
    silent: tuple[str, ...] = ()
    """Clients that kept the committee from being seated."""
    step_ms: int = 0
    """When the committee's present step began, Unix milliseconds."""
    contributors: tuple[str, ...] = ()
    """The one set of updates that the committee is asked to certify, sorted; empty before."""
    proposed: str = ""
    """The same as members sign it: a serialized ContributorSet in hex."""
    most_weight: int = 1
    """With a committee, the largest weight of an update."""
    start: str = ""
    """With a committee, the digest of the result that the round starts from, in hex; empty for the common start."""
    opening: StoredDigest | None = None
    """What opens the published sum; None without a committee."""

    @property
    def dropped_ids(self) -> frozenset[str]:
        """Clients whose committed update is left out."""
        return frozenset(drop.client_id for drop in self.dropped)


class MemberRecord(StoredRecord):
    """A client that joined."""

    client_id: str
    rank: int
    budget: float
    example_count: int
    certified_ms: int = 0
    """When the certificate was issued that it joined with, Unix milliseconds."""
    shapes: str = ""
    """Digest of its model; "" of a member that joined before models were compared."""


class Sighting(StoredRecord):
    """When a client was last heard of, and what it said it was doing."""

    stage: str
    progress: float
    at_ms: int
    """Unix milliseconds."""
    reason: Reason | None = None
    """What keeps it from its work, as it says itself."""
    why: str = ""
    """The same in words."""
    certificate_ends_ms: int = 0
    """When the certificate that it called with ends, Unix milliseconds; 0 if that is not known."""

    @property
    def working(self) -> bool:
        """Whether it says that it does what it was asked."""
        return self.stage not in {"", Stage.IDLE, Stage.PAUSED, Stage.FINISHED}

    @property
    def sending(self) -> bool:
        """Whether it says that its update is on its way, or waits for servers that it cannot reach."""
        waits = self.stage == Stage.PAUSED and self.reason is Reason.STORE_UNAVAILABLE
        return self.stage == Stage.UPLOADING or waits


class BaseModelTags(StoredRecord):
    """Keyed digests of an agent's base model, in hex."""

    weights: str
    tokenizer: str
    chat_template: str
    start: str = ""
    """Of the adapter and head that training starts from; empty where there are none."""


class Report(StoredRecord):
    """What an update says of itself."""

    example_count: int
    train_loss: float
    train_s: float
    encrypt_s: float
    upload_s: float
    upload_bytes: int
    overlap: float | None = None
    """Share of its top columns that the plan protects, relative to when the plan was new."""
    base_model: BaseModelTags | None = None
    """Digests by which its base model is compared with others; None if it sends none."""


class StoredShard(StoredRecord):
    """What aggregation has of one shard of an update."""

    digest: StoredDigest
    squared_norm: float = 0.0
    """Its part of the update's squared norm, without the scaling."""


class UpdateRecord(StoredRecord):
    """A committed update: its manifest and its report."""

    client_id: str
    layout_digest: str
    shards: tuple[StoredDigest, ...]
    rank: int
    scaling: float
    report: Report
    norm: float = 0.0
    """As aggregation measured it (`shelora.lora.screening`); 0 for a vote."""
    dealing: str = ""
    """SHA-256 of its dealing in hex; "" without a committee."""

    @property
    def manifest_digest(self) -> str:
        """SHA-256 in hex of what fixes the update; a repeat may differ in its report only."""
        manifest = self.model_dump_json(exclude={"report", "norm"} | (set() if self.dealing else {"dealing"}))
        counted = json.dumps([manifest, self.report.example_count])
        return hashlib.sha256(counted.encode()).hexdigest()


class Commit(StoredRecord):
    """An update with its place in the order of commits."""

    ordinal: int
    """From 1."""
    update: UpdateRecord


class Statement(StrEnum):
    """What clients state to the committee of a round, or as its members. The value is part of a key's name."""

    VIEW = "views"
    """The committee as a client works it out, with its key if it is a member."""
    DEPARTURE = "departures"
    """A member has lost its key."""
    CHECK = "checks"
    """Which shares a member refuses, and its answers to the test of the others."""
    SIGNATURE = "signatures"
    """A member's signature of the proposed set."""
    ANSWER = "answers"
    """The sum of a member's shares over the certified set."""

    @property
    def states(self) -> frozenset[RoundState]:
        """States of the round in which it may be stated."""
        return _STATES[self]


_STATES: Final = {
    Statement.VIEW: frozenset({RoundState.KEYING}),
    Statement.DEPARTURE: frozenset(
        {RoundState.KEYING, RoundState.COLLECTING, RoundState.CERTIFYING, RoundState.AGGREGATING}
    ),
    Statement.CHECK: frozenset({RoundState.CERTIFYING}),
    Statement.SIGNATURE: frozenset({RoundState.CERTIFYING}),
    Statement.ANSWER: frozenset({RoundState.AGGREGATING}),
}


@dataclass(frozen=True)
class Dealt:
    """One client's key of one round, shared among the committee, as it came with the update."""

    dealing: bytes
    """A serialized Dealing without its shares."""
    shares: tuple[bytes, ...]
    """By place in the committee's order."""


class Means(StoredRecord):
    """Means over the contributors of a sum, as an agent that opened it says; None for what is not told."""

    accuracy: float | None = None
    """Of the result that the round began from, 0 to 1."""
    loss: float | None = None
    """The same of the test loss, nats."""
    train_loss: float | None = None
    """Of the round's training, nats."""


class EvaluationRecord(StoredRecord):
    """What an agent measured after it applied a result."""

    client_id: str
    example_count: int
    correct_count: int
    loss: float
    download_s: float
    decrypt_s: float
    evaluate_s: float
    download_bytes: int
    means: Means | None = None
    """Where sums hold figures, in place of its own."""


class LayoutRecord(StoredRecord):
    """A layout, under its digest."""

    parameters: str
    key_id: str
    """In hex."""
    matrices: tuple[Matrix, ...]
    tensors: tuple[Tensor, ...]
    tiers: tuple[float, ...]
    encrypt_tensors: bool
    max_rank: int
    max_directions: int
    shards: tuple[Shard, ...]
    sums: SumTerms | None = None
    clear_bits: int = 32

    @classmethod
    def of(cls, layout: Layout) -> Self:
        return cls(
            parameters=layout.parameters,
            key_id=layout.key_id.hex(),
            matrices=layout.matrices,
            tensors=layout.tensors,
            tiers=layout.tiers,
            encrypt_tensors=layout.encrypt_tensors,
            max_rank=layout.max_rank,
            max_directions=layout.max_directions,
            shards=layout.shards,
            sums=layout.sums,
            clear_bits=layout.clear_bits,
        )

    def layout(self) -> Layout:
        return Layout(
            parameters=self.parameters,
            key_id=bytes.fromhex(self.key_id),
            matrices=self.matrices,
            tensors=self.tensors,
            tiers=self.tiers,
            encrypt_tensors=self.encrypt_tensors,
            max_rank=self.max_rank,
            max_directions=self.max_directions,
            shards=self.shards,
            sums=self.sums,
            clear_bits=self.clear_bits,
        )
