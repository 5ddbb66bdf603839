"""Whether a result serves this client: by its loss on a few of its own examples, before and after.

Only sums that servers could not screen are judged so (`client_agent.moderating`); the rule is `plausibility`'s. An
agent that finds a result useless says so and still takes part; if most do, it is taken back (docs/protocol.md).
"""

import math
from collections.abc import Callable
from dataclasses import asdict

import structlog

from client_agent.learning import Weights
from client_agent.moderating import Moderator
from client_agent.plausibility import FEW, MUCH_TO_LEARN, Losses, agreement_of, objection_to, turned
from shelora.errors import DomainError, Reason

_log = structlog.get_logger(__name__)


class Judge:
    """Remembers what results did, since this process started. Not thread-safe.

    Args: loss_with: Loads weights, and returns the mean loss on some of this client's own training examples.
    """

    def __init__(self, loss_with: Callable[[Weights], float]) -> None:
        self._loss_with = loss_with
        self._best_loss = math.inf
        """The smallest loss of a result."""
        self._judged: tuple[str | None, float] = (None, math.nan)
        """The round whose result was judged last, and the loss with it."""
        self._overruled = False
        """Whether most went on from a result that was objected to."""
        self._turned: tuple[str | None, int] = (None, 0)
        """What results were objected to by their direction last began from, and how many more of them may be."""
        self._by_direction = True
        """Whether results are judged by their direction."""

    def objection(
        self, weights: Weights, moderator: Moderator, *, start: str | None, round_id: str, overruled: bool
    ) -> str:
        """Loads the result of a round; says why it serves this client badly, "" if it does not.

        Args:
            weights: The result, cut to this client's rank.
            moderator: What it was bounded by.
            start: Name of the round whose result the model holds.
            round_id: Of the result.
            overruled: Whether this client objected to that state, and most went on from it all the same.

        Raises: RESULT_REFUSED if no model computes with it.
        """
        before = self._loss_before(moderator, start)
        if overruled:  # its data is unlike the others', or it was worse off
            self._best_loss, self._overruled = before, True
        may_learn = before > MUCH_TO_LEARN and moderator.contributors <= FEW and not self._overruled
        own = self._loss_with(moderator.own) if may_learn else None
        after = self._loss_with(weights)
        losses = Losses(best=min(before, self._best_loss), before=before, own=own, after=after)
        motion = {f"moved_{name}": value for name, value in asdict(moderator.motion).items()}
        _log.info("result_judged", round=round_id, own_share=moderator.own_share, **motion, **asdict(losses))
        if not math.isfinite(after):
            raise DomainError(
                Reason.RESULT_REFUSED, f"the result is not applied: the loss with it is {after}"
            )
        self._judged = (round_id, after)
        by_direction = self._by_direction and moderator.rounds == 1
        moved = self._moved(moderator, start, agreement_of(losses)) if by_direction else ""
        why = "; ".join(filter(None, [moved, objection_to(losses)]))
        if why:
            _log.warning("result_objected_to", round=round_id, why=why)
        else:
            self._best_loss = min(losses.best, after)
        return why

    def _moved(self, moderator: Moderator, start: str | None, agreement: float) -> str:
        """What its direction says against a result, as long as one hostile member can be why.

        If results are taken back, each suspect sits one out. Those that still point elsewhere when most have, or FEW,
        do so because the honest members' data are unlike, and their direction is not judged any more. Else an honest
        federation would fail, or a liar and one honest member with unusual data could stop it.
        """
        why = turned(moderator.motion, moderator.own_share, moderator.contributors, agreement)
        if not why:
            return ""
        began, left = self._turned
        if began != start:
            left = min(moderator.contributors - 1, FEW)
        self._turned = start, left - 1
        self._by_direction = left > 0
        if not left:
            _log.warning(
                "direction_not_judged", why="whoever sat out, sums took back what this client learned"
            )
        return why if left else ""

    def _loss_before(self, moderator: Moderator, start: str | None) -> float:
        """Mean loss of the state that the round began with, which is known if a result led to it."""
        round_id, loss = self._judged
        return loss if round_id == start else self._loss_with(moderator.before)
