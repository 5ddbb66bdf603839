"""Whether a result serves this client: by its loss on a few of its own examples, before and after.

Only sums that servers could not screen are judged so (`client_agent.moderating`); the rule is `plausibility`'s.
"""

import math
from collections.abc import Callable
from dataclasses import asdict

import structlog

from client_agent.learning import Weights
from client_agent.moderating import Moderator
from client_agent.plausibility import FEW, LENIENT, MOST_LENIENT, MUCH_TO_LEARN, Losses, require_useful
from shelora.errors import DomainError

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
        """The round whose result was accepted last, and the loss after it."""
        self._refused = 0
        """The training round whose result was refused last, if none was applied since."""
        self._leniency = 1.0
        """Grows with each result that was refused alone."""

    def require_useful(
        self, weights: Weights, moderator: Moderator, *, start: str | None, round_id: str, number: int
    ) -> None:
        """Loads the result of a round if it is useful; leaves other weights loaded if it is not.

        Args:
            weights: The result, cut to this client's rank.
            moderator: What it was bounded by.
            start: Name of the round whose result the model holds.
            round_id: Of the result.
            number: Of the training round; 0 if it is not known.

        Raises: RESULT_REFUSED.
        """
        before = self._loss_before(moderator, start)
        may_learn = before > MUCH_TO_LEARN and moderator.contributors <= FEW and self._leniency == 1
        own = self._loss_with(moderator.own) if may_learn else None
        after = self._loss_with(weights)
        best = min(before, self._best_loss)
        losses = Losses(best=best, before=before, own=own, after=after, leniency=self._leniency)
        _log.info("result_judged", round=round_id, **asdict(losses))
        self._decide(losses, number)
        self._judged = (round_id, after)

    def _loss_before(self, moderator: Moderator, start: str | None) -> float:
        """Mean loss of the state that the round began with, which is known if a result led to it."""
        round_id, loss = self._judged
        return loss if round_id == start else self._loss_with(moderator.before)

    def _decide(self, losses: Losses, number: int) -> None:
        """Refuses a useless result, and the repetitions of its round; not what most others went on from.

        Who has data unlike the others' finds honest sums useless, and by refusing them for ever would leave the
        federation. That it went on to a later round says that most find them useful. From then on this client refuses
        less.

        Raises: RESULT_REFUSED.
        """
        try:
            require_useful(losses)
        except DomainError as error:
            if not (0 < self._refused < number and math.isfinite(losses.after)):
                self._refused = number
                raise
            _log.warning(
                "useless_result_applied", why=error.message, but="most others went on from the last one"
            )
            self._best_loss = losses.after
            self._leniency = min(MOST_LENIENT, self._leniency * LENIENT)
        else:
            self._best_loss = min(losses.best, losses.after)
        self._refused = 0
