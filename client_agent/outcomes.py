"""Trains a round once: its outcome is kept, and what it costs of a privacy budget is spent before it is kept."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import structlog

from client_agent.current import CurrentState
from client_agent.learning import Trained
from client_agent.schedule import Schedule
from client_agent.state import AgentState

if TYPE_CHECKING:
    from client_agent.privacy import Budget

_log = structlog.get_logger(__name__)


class Outcomes:
    """The outcome of the last training. Not thread-safe.

    Args:
        state: Where it is kept.
        current: The state that training starts from.
        schedule: Of the learning rate.
        identity: What else an outcome must agree in to be used again.
        budget: Differential privacy of examples; None without.
    """

    def __init__(
        self,
        state: AgentState,
        current: CurrentState,
        schedule: Schedule,
        identity: Mapping[str, str],
        budget: "Budget | None",
    ) -> None:
        self._state = state
        self._current = current
        self._schedule = schedule
        self._identity = dict(identity)
        self._budget = budget

    def once(self, number: int, variant: str, train: Callable[[], Trained]) -> Trained:
        """The outcome of the round of that number and variant from the current state, trained if it is not kept.

        Raises: PRIVACY_EXHAUSTED; what `train` raises.
        """
        key = self._current.key() | self._identity
        key |= {"number": str(number), "variant": variant, "travel": repr(self._schedule.travel(number))}
        saved = self._state.trained()
        if saved is not None and key.items() <= saved[0].items():
            _log.info("training_reused", round_number=number, variant=variant)
            return Trained(saved[1], float(saved[0]["loss"]), float(saved[0]["seconds"]))
        if self._budget:
            self._budget.require_round()
        trained = train()
        self._spend(number)
        self._state.save_trained(
            key | {"loss": repr(trained.loss), "seconds": repr(trained.seconds)}, trained.weights
        )
        told = {} if self._budget else {"loss": trained.loss}
        _log.info("trained", round_number=number, start=self._current.round_id, variant=variant, **told)
        return trained

    def _spend(self, number: int) -> None:
        if self._budget:
            epsilon = self._budget.spend()
            left = self._budget.rounds_left()
            _log.info("privacy_spent", round_number=number, epsilon=round(epsilon, 3), rounds_left=left)
