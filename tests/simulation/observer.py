"""What must hold, watched from outside: every write to the store, every answer, every result.

It reads what is stored and what is sent, and works out for itself what must follow; it asks no product code whether
product code is right.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import numpy as np

from coordinator.keys import Keys
from coordinator.records import Commit, FederationRecord, LayoutRecord, Phase, RoundRecord, UpdateRecord
from services.aggregation.keys import PREFIX, RoundKeys
from shelora.errors import Reason
from shelora.federation import ScreeningSpec
from shelora.lora.codec import decode_result
from shelora.lora.restore import restore
from shelora.lora.screening import shares
from shelora.lora.shards import Float32
from shelora.negotiation.plan import column_orders
from shelora.rounds import COMMITTEE_TRANSITIONS, TRANSITIONS, RoundKind, RoundState
from shelora.v1 import coordinator_pb2 as pb
from tests.simulation.learner import TOLERANCE, marks_in
from tests.simulation.valkey import Command, Valkey

_PHASES: Final = {
    (Phase.CREATED, Phase.RUNNING),
    (Phase.RUNNING, Phase.FINISHED),
    (Phase.RUNNING, Phase.FAILED),
    (Phase.CREATED, Phase.FAILED),
    (Phase.FINISHED, Phase.RUNNING),
}
_STEPS: Final = {
    (before, after) for table in (TRANSITIONS, COMMITTEE_TRANSITIONS) for (before, _), after in table.items()
}

PASSING_MS: Final = 600_000
"""What expires within this time is not left behind: the mark of a closed round, the bytes of a worker that died."""


class Observer:
    """The invariants of one run of one federation.

    Args:
        rounds: Most training rounds.
        violated: Told what does not hold.
    """

    draws_repeat = False
    """Whether the coordinator does not spend draws: then another committee may certify, of updates on other batches."""
    liars = False
    """Whether members of committees lie: one can have a dealing left out, and one that cheats has its own."""

    def __init__(
        self,
        valkey: Valkey,
        federation_id: str,
        clients: Sequence[str],
        rounds: int,
        violated: Callable[[str], None],
    ) -> None:
        self._valkey = valkey
        self._federation_id = federation_id
        self._clients = list(clients)
        self._rounds = rounds
        self._violated = violated
        self.reopened: Callable[[], None] = lambda: None
        """Told when a federation that had finished goes on."""
        self.deleted = False
        self._keys = Keys()
        self._raw: dict[bytes, bytes] = {}
        self._immortal: set[bytes] = set()
        self.federation: FederationRecord | None = None
        self.rounds: dict[str, RoundRecord] = {}
        self.acknowledged: set[tuple[str, str]] = set()
        """Round and client of every commit that its client was told of."""
        self.counted: dict[str, set[str]] = {}
        """By published round, the clients whose updates are in its aggregate."""
        self.weights: dict[str, Float32] = {}
        """By published training round, the weights [rounds, clients] that its aggregate must hold."""
        self.certified: dict[tuple[int, tuple[str, ...]], tuple[str, tuple[str, ...]]] = {}
        """By draw (and committee, if draws repeat), the round and the set that was certified."""
        self.lost = False
        """Whether the store was made to lose an update: then an acknowledged one may be dropped."""

    # Events

    def after(self, commands: Sequence[Command], answers: Sequence[Any]) -> None:
        """Looks at what commands have changed."""
        if self._valkey.immortal > self._immortal:
            self._violated(f"keys without expiry: {sorted(self._valkey.immortal)}")
            self._immortal = set(self._valkey.immortal)
        for command, answer in zip(commands, answers, strict=True):
            if command[0] == "UNLINK" and self._keys.federation(self._federation_id) in command:
                self.deleted = True
            if command[0] == "EVALSHA":
                keys = [str(key) for key in command[3 : 3 + int(command[2])]]
                for key in keys:
                    self._look(key)
                self._look_at_commit(keys, answer)

    def answered(
        self, caller: str, method: str, request: bytes, _response: bytes | None, code: grpc.StatusCode
    ) -> None:
        """An answer that reached its caller."""
        if code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}:
            self._violated(f"{method} ended with {code.name} for {caller}")
        if method == "CommitUpdate" and code is grpc.StatusCode.OK:
            sent = pb.CommitUpdateRequest.FromString(request)
            self.acknowledged.add((sent.round_id, sent.client_id))

    def applied(self, client_id: str, round_id: str, weights: Float32) -> None:
        """A result as a client decoded it."""
        expected = self.weights.get(round_id)
        if expected is None:
            self._violated(f"{client_id} applied a result of {round_id}, which was not published")
        elif not np.allclose(weights, expected, atol=TOLERANCE):
            self._violated(f"{client_id} applied {weights} for {round_id}; published was {expected}")

    # Records

    def _look_at_commit(self, keys: Sequence[str], answer: Any) -> None:
        if not (keys[0].startswith(self._keys.prefix) and len(keys) > 1 and keys[1].endswith(":commits")):
            return
        state = (self._valkey.value(keys[0]) or {}).get(b"state")
        if isinstance(answer, list) and answer[0] == 1 and state != b"COLLECTING":
            self._violated(f"an update is counted in a round that is {state!r}: {keys[0]}")

    def _look(self, key: str) -> None:
        if not key.startswith(self._keys.prefix) or not key.endswith((":round", ":federation")):
            return
        data = (self._valkey.value(key) or {}).get(b"data")
        if data is None or self._raw.get(key) == data:
            return
        self._raw[key] = data
        if key.endswith(":round"):
            self._look_at_round(RoundRecord.model_validate_json(data))
        else:
            self._look_at_federation(FederationRecord.model_validate_json(data))

    def _look_at_round(self, record: RoundRecord) -> None:
        round_id, state = record.round.round_id, record.round.state
        before = self.rounds.get(round_id)
        self.rounds[round_id] = record
        if before is None:
            if state is not RoundState.SELECTING:
                self._violated(f"{round_id} begins as {state}")
            return
        if before.round.ended:
            self._violated(f"{round_id} changes after it ended: {before} to {record}")
        elif before.round.state is not state and (before.round.state, state) not in _STEPS:
            self._violated(f"{round_id} goes from {before.round.state} to {state}")
        elif before.round.state is state and _steps_within(before) == _steps_within(record):
            self._violated(f"{round_id} is written again as {state}: {before} to {record}")
        if before.proposed and record.proposed != before.proposed:
            self._violated(f"{round_id} proposes two sets: {before.contributors}, {record.contributors}")
        if state is RoundState.AGGREGATING and record.round.convenes:
            self._look_at_certified(record)
        if state is RoundState.PUBLISHED:
            self._look_at_result(record)

    def _look_at_certified(self, record: RoundRecord) -> None:
        """A set was certified: the only one of its draw, of enough updates, all of them committed."""
        deciders = (record.round.draw, record.order if self.draws_repeat else ())
        certified = (record.round.round_id, record.contributors)
        if self.certified.setdefault(deciders, certified) != certified:
            self._violated(f"two sets are certified of {deciders}: {self.certified[deciders]}, {certified}")
        if len(record.contributors) < record.round.min_updates:
            self._violated(f"{certified} is certified, of too few updates")
        committed = {commit.update.client_id for commit in self._commits(record)}
        if not committed.issuperset(record.contributors):
            self._violated(f"{certified} is certified; committed have {committed}")

    def _look_at_federation(self, record: FederationRecord) -> None:
        before, self.federation = self.federation, record
        if before is None:
            return
        if before.phase is not record.phase and (before.phase, record.phase) not in _PHASES:
            self._violated(f"the federation goes from {before.phase} to {record.phase}")
        if (before.phase, record.phase) == (Phase.FINISHED, Phase.RUNNING):
            if record.rounds <= before.rounds:
                self._violated("a finished federation goes on without more rounds")
            self.reopened()
        if record.trained not in {before.trained, before.trained + 1} and not self._retracts(before, record):
            self._violated(f"{before.trained} rounds trained, then {record.trained}")
        if record.sequence not in {before.sequence, before.sequence + 1}:
            self._violated(f"round {before.sequence} is followed by {record.sequence}")
        if record.phase is Phase.FAILED and not record.failure:
            self._violated("the federation failed without a reason")
        if (
            record.phase is Phase.FAILED
            and record.result_sequence
            and "no candidate is left" in record.failure
        ):
            self._violated("a federation with a result failed over a plan")
        if before.accepted_plan and record.accepted_plan < before.accepted_plan:
            self._violated("a plan is not accepted any more")

    def _retracts(self, before: FederationRecord, after: FederationRecord) -> bool:
        """Whether the newest result is taken back as it must be: over liars, by the round that began from it."""
        ended = self.rounds[before.round_id(before.ticket.sequence)] if before.ticket else None
        if not self.liars or ended is None or ended.round.reason is not Reason.SUM_UNREADABLE:
            return False
        earlier = before.result_before.sequence if before.result_before else 0
        return (after.trained, after.result_sequence) == (before.trained - 1, earlier)

    # Results

    def _look_at_result(self, record: RoundRecord) -> None:
        round_id = record.round.round_id
        kept = {
            c.update.client_id: c.update
            for c in self._commits(record)
            if c.update.client_id not in record.dropped_ids
        }
        self.counted[round_id] = set(kept)
        if record.contributor_count != len(kept) or len(kept) < record.round.min_updates:
            self._violated(
                f"{round_id} says it counts {record.contributor_count} updates; {sorted(kept)} are committed"
            )
        if record.round.kind is not RoundKind.TRAIN:
            return
        expected = np.zeros((self._rounds, len(self._clients)), dtype=np.float32)
        counts = [update.report.example_count for update in kept.values()]
        weights = shares(counts, ScreeningSpec().max_example_ratio)
        if record.round.convenes:  # clients weigh themselves, by what counts in their cohort
            counts = [min(count, record.most_weight) for count in counts]
            weights = [count / sum(counts) for count in counts]
        for client_id, weight in zip(kept, weights, strict=True):
            expected[record.round.number - 1, self._clients.index(client_id)] = weight
        self.weights[round_id] = expected
        result = self._stored_result(record)
        if result is None:
            self._violated(f"{round_id} is published, and its result is not stored")
            return
        layout = LayoutRecord.model_validate_json(
            self._valkey.value(self._keys.layout(self._federation_id, record.layout_digest))
        ).layout()
        if layout.encrypts or layout.sums:  # clients look at it
            return
        contents = [decode_result(layout, index, data) for index, data in enumerate(result)]
        found = marks_in(restore(layout, contents, column_orders(None, layout.matrices, None), None))
        if not np.allclose(found, expected, atol=TOLERANCE):
            self._violated(f"{round_id} is published as\n{found}\nand its commits make\n{expected}")

    def _stored_result(self, record: RoundRecord) -> list[bytes] | None:
        """The shards of a stored result; None if one is missing."""
        keys = RoundKeys(record.round.round_id)
        found = [
            self._valkey.value(keys.result_bytes(index, bytes.fromhex(digest.sha256)))
            for index, digest in enumerate(record.results)
        ]
        return None if None in found else found

    def _commits(self, record: RoundRecord) -> list[Commit]:
        assert self.federation is not None
        key = self._keys.commits(self._federation_id, self.federation.instance, record.sequence)
        parts = [data.split(b" ", 2) for data in (self._valkey.value(key) or {}).values()]
        return [
            Commit(ordinal=int(n), update=UpdateRecord.model_validate_json(update)) for n, _, update in parts
        ]

    # The end

    def at_the_end(self, epochs: Sequence[int]) -> None:
        """What must hold once the federation has ended and everybody has come to rest.

        Args: epochs: Those whose keys the key authority has.
        """
        federation = self.federation
        assert federation is not None
        if self.deleted:
            self._look_for_remains(federation, epochs)
            return
        for round_id, client_id in sorted(self.acknowledged):
            counted = self.counted.get(round_id)
            refused = self.liars and self._is_refused(round_id, client_id)
            if counted is not None and client_id not in counted and not (self.lost or refused):
                self._violated(f"{client_id} was told that its update of {round_id} counts, and it does not")
        if federation.garbage:
            self._violated(f"garbage is left: {federation.garbage}")
        # Keys are retired from the oldest on: those of a result that was taken back stay while an older one is needed.
        needed = list(range(federation.oldest_epoch, federation.epoch + 1)) if federation.key_id else []
        if needed != list(epochs):
            self._violated(f"there are keys of the epochs {list(epochs)}, needed are those of {needed}")
        self._look_for_leftovers(federation)

    def _look_for_remains(self, federation: FederationRecord, epochs: Sequence[int]) -> None:
        """What is left of a federation that was deleted: what passes by itself."""
        if epochs:
            self._violated(f"there are keys of the epochs {list(epochs)} of a federation that was deleted")
        for key in map(bytes.decode, self._valkey.keys("*")):
            passing = self._valkey.execute("PTTL", key) <= PASSING_MS
            heard = ":seen:" in key  # an agent's last words
            if not (passing or heard) and f"{{{federation.federation_id}" in key:
                self._violated(f"left of a federation that was deleted: {key}")

    def _is_refused(self, round_id: str, client_id: str) -> bool:
        """Whether a committee left a client's update out."""
        dropped = self.rounds[round_id].dropped
        return any(drop.client_id == client_id and drop.reason is Reason.DEALING_REFUSED for drop in dropped)

    def _look_for_leftovers(self, federation: FederationRecord) -> None:
        kept = {federation.round_id(sequence) for sequence in federation.results_in_use}
        for key in map(bytes.decode, self._valkey.keys(f"{PREFIX}*")):
            round_id, _, part = key.removeprefix(f"{PREFIX}{{").partition("}:")
            kept_for_use = round_id in kept and part.startswith("result")
            if not kept_for_use and self._valkey.execute("PTTL", key) > PASSING_MS:
                self._violated(f"left in aggregation: {key}")
        for key in map(bytes.decode, self._valkey.keys(f"{self._keys.prefix}*")):
            if key.endswith(":ballots") or ":committee:" in key:
                self._violated(f"left in the coordinator: {key}")
        plans = {self._keys.plan(self._federation_id, plan.digest.sha256) for plan in federation.plans}
        for key in map(bytes.decode, self._valkey.keys(f"{self._keys.plan(self._federation_id, '')}*")):
            if key not in plans and self._valkey.execute("PTTL", key) > PASSING_MS:
                self._violated(f"left in the coordinator: {key}")
        for sequence in federation.results_in_use:
            record = self.rounds[federation.round_id(sequence)]
            if self._stored_result(record) is None:
                self._violated(f"the result of {record.round.round_id} is gone")


def _steps_within(record: RoundRecord) -> tuple[Any, ...]:
    """What a round goes through within a state."""
    return record.dropped, record.most_ms, record.proposed


def shown(federation: FederationRecord | None) -> str:
    """The state of a federation in a line."""
    if federation is None:
        return "no federation"
    ticket = federation.ticket.sequence if federation.ticket else None
    return json.dumps(
        {
            "phase": federation.phase,
            "trained": federation.trained,
            "round": ticket,
            "failure": federation.failure,
        }
    )
