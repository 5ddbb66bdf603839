"""Makes what this client sends of a round, on disk: votes and updates."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final

import structlog

from client_agent.attempts import Attempt
from client_agent.keys import EpochSecrets
from client_agent.learning import Evaluation, Weights
from client_agent.metrics import Stopwatch
from client_agent.negotiators import Negotiator
from client_agent.participation import Participation, Tools
from client_agent.plan_fit import assess, stake_of
from client_agent.progress import Activity
from client_agent.protection import round_context, spool_update, summing
from client_agent.state import Spool, UpdateNote
from client_agent.sum_budget import SumBudget
from shelora.committee.dealer import Dealer
from shelora.lora.figures import Figures
from shelora.lora.layout import Layout
from shelora.negotiation.plan import Plan
from shelora.rounds import federation_of
from shelora.strategies.agents.registry import agent_strategy_of
from shelora.v1 import coordinator_pb2 as pb

LEAST_EXAMPLES: Final = 32
"""Examples of a round from which on a client tells their mean loss in sums."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Made:
    """A round's training, before it is protected."""

    note: UpdateNote
    """What is committed with it."""
    weights: Weights
    base: str
    """Round whose result it began from, or what stands for the initial state."""
    variant: str
    """What names the one set of updates that this one may be in (`Attempt.variant`); "" without a committee."""
    figures: Figures
    """What this client would tell of it, and of its training, in a sum that holds figures."""


class Maker:
    """Scores, trains, protects. Its methods that do not say otherwise block: they are for the worker.

    Args:
        me: Who this client is.
        tools: What it works with.
        negotiator: How it votes.
        sums: Under client privacy: sums that this client may be in. Then nothing else about its examples is sent.
    """

    def __init__(
        self, me: Participation, tools: Tools, negotiator: Negotiator, sums: SumBudget | None
    ) -> None:
        self._me = me
        self._state = tools.state
        self._learner = tools.learner
        self._negotiator = negotiator
        self._strategy = agent_strategy_of(me.protection.mode)
        self._sums = sums

    @property
    def counted(self) -> int:
        """Examples that this client says it has: 1 under client privacy, for all alike. Returns at once."""
        return 1 if self._sums else len(self._learner.examples)

    def is_current(self, note: UpdateNote, *, vote: bool = False) -> bool:
        """Whether what was spooled, perhaps before a restart, was made as it would be now. Returns at once.

        An update is of the examples, the base model and the privacy of training; a vote of the latter two.
        """
        base = self._learner.base.hex() if self._learner.base else ""
        count = note.example_count if vote else self.counted
        return (note.example_count, note.base, note.privacy) == (count, base, self._learner.privacy)

    def vote(self, round_id: str, layout: Layout, secrets: EpochSecrets, activity: Activity) -> Spool:
        """Scores the columns and spools the vote."""
        self._learner.resume(round_id, secrets)
        watch = Stopwatch()
        scores = self._learner.score(activity)
        stake = stake_of(self._state.plan_fit(), self._me.protection, self._me.budget)
        # Aggregation weight 1: votes count alike, however many examples their clients hold.
        note = UpdateNote(
            round_id=round_id,
            layout_digest=layout.digest,
            rank=1,
            scaling=1.0,
            example_count=1,
            train_loss=0.0,
            train_s=watch.seconds,
            encrypt_s=0.0,
        )
        writer = self._state.begin_spool(round_id)
        for vote in self._negotiator.cast(layout, scores, stake, round_id, secrets):
            writer.add(vote)
        note = replace(note, encrypt_s=watch.seconds - note.train_s)
        return writer.finish(self._with_base(note, secrets))

    def require_sum(self, attempt: Attempt | None) -> None:
        """Raises: PRIVACY_EXHAUSTED if the round's sum would tell more of this client than was promised."""
        if self._sums and attempt:
            self._sums.require(attempt.context.instance, attempt.context.round_number)

    def train(
        self,
        train: pb.Train,
        plan: Plan | None,
        attempt: Attempt | None,
        base: Evaluation | None,
        activity: Activity,
    ) -> Made:
        """What this client trained, and what is committed with it.

        Args: base: its evaluation of the result that the round begins from; None without one.
        """
        overlap = self._assessed(plan, train.plan.vote_round_id, activity) if plan else None
        variant = attempt.variant if attempt else ""
        trained = self._learner.train(train.round.number, activity, variant)
        model = self._learner.model
        note = UpdateNote(
            round_id=train.round.round_id,
            layout_digest=b"",
            rank=model.rank,
            scaling=model.scaling,
            example_count=self.counted,
            train_loss=trained.loss if self._me.protection.strategy.shows_factors else 0.0,
            train_s=trained.seconds,
            encrypt_s=0.0,
            overlap=overlap,
        )
        began = train.base.round_id or f"{federation_of(train.round.round_id)}.initial"
        figures = figures_of(base, trained.loss, self._me.examples_a_round)
        return Made(note=note, weights=trained.weights, base=began, variant=variant, figures=figures)

    def protect(
        self,
        number: int,
        made: Made,
        layout: Layout,
        plan: Plan | None,
        secrets: EpochSecrets,
        dealer: Dealer | None,
        activity: Activity,
    ) -> Spool:
        """Protects what was trained in the round of that number, and spools it. Raises: as `spool_update`."""
        note, weights = made.note, made.weights
        known = round_context(self._learner.model, layout, plan, self._me.budget, secrets)
        deal: Callable[[Sequence[bytes]], bytes] | None = None
        if dealer is not None:
            round_ = dealer.context
            weight = min(note.example_count, round_.most_weight)
            known = summing(known, dealer, weight, self._me.largest_move)
            if layout.sums is not None and layout.sums.figures:
                told = self._state.measured.once(made.base, made.variant, made.figures)
                known = replace(known, figures=told)
            deal = partial(_dealt, dealer, weight)
            if self._sums:
                known = replace(known, reference=self._learner.start_of(number))
                self._sums.take(round_.instance, round_.round_number)
                _log.info("client_privacy_spent", round=note.round_id, epsilon=round(self._sums.spent(), 3))
        return spool_update(
            self._state,
            layout,
            weights,
            self._with_base(replace(note, layout_digest=layout.digest), secrets),
            strategy=self._strategy,
            context=known,
            deal=deal,
            activity=activity,
        )

    def _with_base(self, note: UpdateNote, secrets: EpochSecrets) -> UpdateNote:
        """The note with how it was made, and what others compare their base model by."""
        note = replace(note, privacy=self._learner.privacy)
        base = self._learner.base
        if base is None:
            return note
        tags = {
            part: secrets.obfuscation.tag(part, digest).hex()
            for part, digest in asdict(base).items()
            if digest
        }
        return replace(note, base=base.hex(), base_tags=tags)

    def _assessed(self, plan: Plan, vote_round_id: str, activity: Activity) -> float | None:
        """Takes a new plan into account for the next vote; what is reported of drift."""
        return assess(
            self._state,
            self._learner,
            plan,
            vote_round_id,
            floor=self._me.protection.coverage_floor,
            largest=self._me.protection.largest_vote,
            budget=self._me.budget,
            reports_drift=self._me.reports_drift,
            activity=activity,
        )


def figures_of(base: Evaluation | None, train_loss: float, examples: int) -> Figures:
    """What a client puts into a sum: its evaluation of the round's base, and its training loss.

    The latter only if it is of LEAST_EXAMPLES or more, and not 0, which means that it is kept secret. Means of few
    examples name them: everyone can compute the public model's loss on any text, and of all choices from a list of
    candidates hardly two have the same mean (`attack.losses`).
    """
    told = train_loss if train_loss and examples >= LEAST_EXAMPLES else None
    if base is None or not base.count:
        return Figures(train_loss=told)
    return Figures(accuracy=base.correct / base.count, loss=base.loss, train_loss=told)


def _dealt(dealer: Dealer, weight: int, shards: Sequence[bytes]) -> bytes:
    """The key of an update with these shards, shared among the committee."""
    return dealer.deal(shards, weight).SerializeToString()
