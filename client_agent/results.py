"""Brings the results of rounds into the model: bounded, cut to this client's rank, judged by its own examples."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from client_agent.current import CurrentState
from client_agent.judging import Judge
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.moderating import Moderator
from client_agent.moments import followed
from client_agent.plausibility import Expectation, plausible
from client_agent.schedule import Schedule
from client_agent.state import AgentState
from shelora.lora.algebra import remainder, reparameterize
from shelora.lora.restore import Restored
from shelora.lora.shards import Float32, LoraFactors
from shelora.lora.sketches import Exponents
from shelora.obfuscation import Obfuscation


class Results:
    """Makes results current. Not thread-safe.

    Args:
        model: What takes them.
        state: What this client trained is kept there.
        current: The state that the model holds.
        schedule: How far a round's training can move a value.
        judge: Says whether a result serves this client; None: nobody does.
    """

    def __init__(
        self,
        model: AdaptedModel,
        state: AgentState,
        current: CurrentState,
        schedule: Schedule,
        judge: Judge | None,
    ) -> None:
        self._model = model
        self._state = state
        self._current = current
        self._schedule = schedule
        self._judge = judge

    def apply(self, round_id: str, parts: Iterable[Restored], values: Obfuscation, number: int) -> None:
        """Makes the result of a round current, cut to this client's rank, and keeps it.

        What servers could not screen is bounded by what this client trained from the state that it holds.

        Args:
            round_id: Names the result from now on.
            parts: The result, a part at a time.
            values: Where initial factors come from, for rows of A that a result of a smaller rank leaves.
            number: Of the training round, to tell how many this client missed; 0 if it is not known.

        Raises: RESULT_REFUSED if it is not plausible beside what this client trained.
        """
        trained = self._current.trained_here()
        moderator = self._moderator(trained, number)
        expected = self._expectation(number)
        parts = plausible(parts, expected)
        checked = moderator.parts(parts) if moderator else parts
        weights = cut_to_rank(checked, self._model.rank, self._model.scaling, values)
        if moderator:
            weights = replace(weights, changes=moderator.changes)
        if trained:
            own = trained[1]
            weights = replace(weights, moments=followed(own.moments, own.factors, weights.factors))
        objection = self._load(round_id, weights, moderator, expected.doubts)
        left_out_since = expected.since if expected.left_out else 0
        self._current.applied(round_id, weights, objection, left_out_since)

    def start_of(self, number: int) -> Weights | None:
        """What this client trained in that round from, if it still holds it: the state that results alone lead to.

        Args: number: of the round; 0 for whichever it trained last.
        """
        trained = self._current.trained_here()
        if trained is None or number not in {0, int(trained[0]["number"])}:
            return None
        return self._model.weights()

    def _load(
        self, round_id: str, weights: Weights, moderator: Moderator | None, doubts: Sequence[str]
    ) -> str:
        """Loads a result; says what speaks against it, if servers could only add. Raises: RESULT_REFUSED."""
        if moderator is None or not moderator.summed or self._judge is None:
            self._model.load(weights)
            return ""
        start, overruled = self._current.round_id, bool(self._current.objection)
        try:
            useless = self._judge.objection(
                weights, moderator, start=start, round_id=round_id, overruled=overruled
            )
            return "; ".join([*doubts, *([useless] if useless else [])])
        except BaseException:
            self._model.load(moderator.before)
            raise

    def _moderator(self, trained: tuple[dict[str, str], Weights] | None, number: int) -> Moderator | None:
        """What bounds the result of that round; None if this client trained nothing from the state that it holds.

        Args: trained: What it trained from there; number: of the round, as servers say.
        """
        if trained is None:
            return None
        rounds = 1 + number - int(trained[0]["number"]) if number else 1
        return Moderator(
            before=self._model.weights(), own=trained[1], scaling=self._model.scaling, rounds=rounds
        )

    def _expectation(self, number: int) -> Expectation:
        """What is known of the round whose result comes next: the present state, and what was trained from it.

        Args: number: of that round, as servers say; 0 if it is not known.
        """
        saved, last = self._state.trained(), 1
        trained = None
        if saved is not None and saved[0].get("round") == (self._current.round_id or ""):
            trained, last = saved[1], int(saved[0]["number"])
        since = self._current.left_out_since or last
        longest = max(self._schedule.travel(last), self._schedule.travel(max(number, 1)))
        return Expectation(
            base=self._model.weights(),
            trained=trained,
            scaling=self._model.scaling,
            step=math.fsum(self._schedule.travel(each) for each in range(since, last + 1)),
            missed=max(0, number - last) * longest,
            since=since,
        )


def cut_to_rank(parts: Iterable[Restored], rank: int, scaling: float, values: Obfuscation) -> Weights:
    """A result as weights of that rank. Takes one part at a time, for results have many times the rank.

    Args: values: of the rows of A that a result of a smaller rank leaves.

    Under a strategy that keeps it, what the result has beyond the rank becomes the frozen part.
    """
    factors: dict[str, LoraFactors] = {}
    frozen: dict[str, LoraFactors] = {}
    tensors: dict[str, Float32] = {}
    exponents: dict[str, Exponents] = {}
    for part in parts:
        tensors |= part.tensors
        exponents |= part.exponents
        for name, update in part.matrices.items():
            fill_A = values.initial_A(name, rank, update.M.shape[1])
            factors[name] = reparameterize(update, rank, scaling, fill_A)
            if part.summed:
                frozen[name] = remainder(update, rank)
    return Weights(factors=factors, tensors=tensors, frozen=frozen, exponents=exponents)
