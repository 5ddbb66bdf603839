"""What committees do, watched where it is done: what is trained, dealt, signed and answered, by whom.

It believes no record of a coordinator, since in some runs coordinators lie; the observer looks at these.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from unittest import mock

from shelora.committee.context import RoundContext
from shelora.committee.member import Member
from shelora.committee.statements import Signer, StatementKind, signed_bytes
from shelora.v1 import committee_pb2
from tests.simulation.learner import MarkedLearner

Batch: TypeAlias = tuple[str, int, str]
"""A client, the number it trained for, the variant of its batches: what is the same is the same update."""
Place: TypeAlias = tuple[str, str, int, tuple[str, ...]]
"""Where one set may be certified: instance, kind, number; and the cohort, where a coordinator repeats numbers."""


class Witness:
    """The invariants of the committees of one federation.

    Args:
        min_updates: What the federation promised.
        violated: Told what does not hold.
    """

    draws_repeat = False
    """As of the observer."""

    def __init__(self, min_updates: int, violated: Callable[[str], None]) -> None:
        self._min_updates = min_updates
        self._violated = violated
        self._trained: dict[str, Batch] = {}
        self._dealt: dict[tuple[bytes, str], Batch | None] = {}
        self._signers: defaultdict[bytes, set[str]] = defaultdict(set)
        self._certified: dict[Place, bytes] = {}
        self._summed: dict[Batch, bytes] = {}

    def trained(self, client_id: str, number: int, variant: str) -> None:
        """A client trained."""
        self._trained[client_id] = client_id, number, variant

    def signed(self, name: str, kind: StatementKind, context: RoundContext, content: bytes) -> None:
        """A client signed a statement, honestly or not."""
        if kind is StatementKind.DEALING:
            self._dealt[context.digest, name] = self._trained.get(name)
        elif kind is StatementKind.SET:
            chosen = signed_bytes(kind, context, content)
            self._signers[chosen].add(name)
            if len(self._signers[chosen]) == context.rule.quorum:
                self._look_at_certified(context, content, chosen)

    def answered(self, name: str, context: RoundContext, content: bytes) -> None:
        """An honest member gave its part of the key of a set."""
        if self._certified.get(self._place(context)) != signed_bytes(StatementKind.SET, context, content):
            self._violated(f"{name} answers for a set of {context.round_id} that is not the certified one")

    def _look_at_certified(self, context: RoundContext, content: bytes, chosen: bytes) -> None:
        """A quorum signed a set: the only one of its number, of enough updates, none of which is in another sum."""
        place = self._place(context)
        if self._certified.setdefault(place, chosen) != chosen:
            self._violated(f"two sets of number {context.round_number} have a quorum, of {context.round_id}")
        names = context.names(committee_pb2.ContributorSet.FromString(content).contributors)
        if len(names) < self._min_updates:
            self._violated(f"a quorum signed a set of {names}, and {self._min_updates} were promised")
        for name in names:
            batch = self._dealt.get((context.digest, name))
            if batch is None:
                self._violated(f"{name} is in a certified set of {context.round_id} and dealt nothing")
            elif self._summed.setdefault(batch, chosen) != chosen:
                self._violated(
                    f"{name} sends the same update into two sums, the second of {context.round_id}"
                )

    def _place(self, context: RoundContext) -> Place:
        deciders: Sequence[str] = context.cohort if self.draws_repeat else ()
        return context.instance, context.kind, context.round_number, tuple(deciders)


@contextmanager
def witnessed(witness: Witness) -> Iterator[None]:
    """Shows a witness what clients do."""
    train, sign, release = MarkedLearner.train, Signer.sign, Member.release

    def trained(self: MarkedLearner, number: int, activity: Any, variant: str = "") -> Any:
        witness.trained(self._client_id, number, variant)
        return train(self, number, activity, variant)

    def signed(
        self: Signer, kind: StatementKind, context: RoundContext, content: bytes
    ) -> committee_pb2.Signed:
        witness.signed(self.name, kind, context, content)
        return sign(self, kind, context, content)

    def released(self: Member, certificate: committee_pb2.Certificate) -> committee_pb2.Signed:
        answer = release(self, certificate)
        witness.answered(self._signer.name, self.context, certificate.content)
        return answer

    with (
        mock.patch.object(MarkedLearner, "train", trained),
        mock.patch.object(Signer, "sign", signed),
        mock.patch.object(Member, "release", released),
    ):
        yield
