"""What a round is about: this client works it out itself and compares it with what the federation promised."""

from dataclasses import dataclass, field
from functools import cached_property

from client_agent.keys import EpochSecrets
from shelora.committee.context import COMMON_START, Committee, RoundContext
from shelora.committee.rules import committee_rule
from shelora.errors import DomainError, Reason
from shelora.federation import RoundSpec
from shelora.lora.layout import Layout
from shelora.rounds import RoundKind
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb


@dataclass(frozen=True)
class Attempt:
    """A round as this client works it out: what is signed over, and who sits on its committee."""

    context: RoundContext
    committee: Committee
    answer_key: bytes = field(repr=False)

    @property
    def round_id(self) -> str:
        """The round's."""
        return self.context.round_id

    @cached_property
    def variant(self) -> str:
        """Which update may be sent: attempts that differ in it train on other batches.

        The same deciders certify one set of one number; whatever a server says of attempts, no update is in two sets.
        """
        return self.context.deciders(self.committee).hex()[:32]


@dataclass(frozen=True)
class Attempts:
    """Works out rounds.

    Attributes:
        federation_id: Of the client.
        client_id: Its name.
        rules: What the federation promised of its rounds.
    """

    federation_id: str
    client_id: str
    rules: RoundSpec

    def of(
        self, round_: pb.RoundRef, layout: Layout, secrets: EpochSecrets, start: bytes = COMMON_START
    ) -> Attempt:
        """The round as this client works it out.

        Args: start: `result_digest` of the result that this client starts from.
        Raises: COMMITTEE_REFUSED: it protects less than was promised, or starts from another result.
        """
        context = self.context(round_.context, layout)
        require(context.start == start, "it starts from another result than this client was given")
        require(self.client_id in context.cohort, "this client is not in its cohort")
        require(
            (context.round_id, context.epoch, context.attempt)
            == (round_.round_id, round_.epoch, round_.attempt),
            "it is another round than that of the assignment",
        )
        return self.worked_out(context, secrets)

    def context(self, message: committee_pb2.RoundContext, layout: Layout) -> RoundContext:
        """A context that keeps what the federation promised. Raises: COMMITTEE_REFUSED."""
        try:
            context = RoundContext.from_proto(message)
        except DomainError as error:
            raise _refused(error.message) from error
        federation_id, _, rest = context.round_id.partition(".")
        named = federation_id == context.federation_id == self.federation_id
        require(named and rest.partition(".")[0] == context.instance, "it is of another federation")
        require(context.kind == RoundKind.TRAIN, "it is not a training round")
        require(context.layout_digest == layout.digest, "it names another layout")
        profile = layout.sums.additive if layout.sums else None
        require(context.parameters == profile, "it has other parameters than its layout")
        require(context.most_contributors == len(context.cohort), "its scale is not that of its cohort")
        require(
            context.rule == committee_rule(len(context.cohort)), "its committee is not that of its cohort"
        )
        hides = layout.sums is not None and layout.sums.noise is not None
        require(
            context.most_weight == 1 or not hides,
            "under client privacy every update has weight 1, and it allows more",
        )
        require(
            context.min_updates == self.rules.min_updates,
            f"it opens sums of {context.min_updates} updates, and the federation promised {self.rules.min_updates}",
        )
        return context

    def worked_out(self, context: RoundContext, secrets: EpochSecrets) -> Attempt:
        """A round that was compared. Raises: SECRET_UNAVAILABLE."""
        if not secrets.secret:
            raise DomainError(
                Reason.SECRET_UNAVAILABLE, "a committee needs the epoch's secrets, which this client lacks"
            )
        committee = context.committee(secrets.obfuscation.committee_key())
        return Attempt(context, committee, secrets.obfuscation.answer_key())


def require(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    """Refuses a round if not. Raises: COMMITTEE_REFUSED."""
    if not condition:
        raise _refused(what)


def _refused(what: str) -> DomainError:
    return DomainError(Reason.COMMITTEE_REFUSED, f"the round is refused: {what}")
