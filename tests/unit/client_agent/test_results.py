"""What an agent holds the tensors of a result against: real state on disk and a real tiny model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client_agent.current import CurrentState
from client_agent.model import AdaptedModel
from client_agent.plausibility import STEP_MARGIN
from client_agent.results import Results
from client_agent.schedule import Schedule
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import LABELS

SPEC = TrainingSpec(base_model="tiny", labels=LABELS, local_steps=10, learning_rate=0.01)
TRAVEL = SPEC.local_steps * SPEC.learning_rate
KEY = bytes(16)


class Member:
    """An agent's results since it started, as it learns from them."""

    def __init__(self, model: AdaptedModel, state: AgentState, values: Obfuscation) -> None:
        self._model, self._state, self._values = model, state, values
        self.current = CurrentState(model, state, {})
        self.results = Results(model, state, self.current, Schedule(SPEC, 9), None)
        if not self.current.resume("films.1"):
            self.current.start(KEY, values)

    def trained(self, number: int) -> None:
        """Every value of a tensor moves up by half of what the recipe moves it."""
        weights = self._model.weights()
        up = {name: value + np.float32(TRAVEL / 2) for name, value in weights.tensors.items()}
        key = self.current.key() | {"number": str(number)}
        self._state.save_trained(key, replace(weights, tensors=up))

    def takes_over(self, name: str, number: int, by: float, **terms: Any) -> bool:
        """Whether it takes over a result whose tensors are that far, in travels, from those that it holds."""
        held = self._model.weights()
        matrices = {
            matrix.name: FactoredUpdate(np.eye(matrix.out_features, 1), np.zeros((1, matrix.in_features)))
            for matrix in self._model.matrices
        }
        tensors = {each: (value + by * TRAVEL).astype(np.float32) for each, value in held.tensors.items()}
        self.results.apply(
            name, [Restored(matrices=matrices, tensors=dict(tensors), **terms)], self._values, number
        )
        now = self._model.weights().tensors
        return all(np.array_equal(now[each], value) for each, value in tensors.items())


@pytest.fixture
def member(model: AdaptedModel, state: AgentState, obfuscation: Obfuscation) -> Member:
    return Member(model, state, obfuscation)


def test_who_missed_rounds_takes_over_what_they_moved(member: Member) -> None:
    """One that was away for two rounds would leave their tensors out, and call an honest member hostile."""
    member.trained(1)
    assert member.takes_over("films.3", 3, by=2.5, summed=True)


@pytest.mark.parametrize(("number", "share"), [(1, 0.0), (1, 0.25), (3, 0.25), (2**31, 0.25)])
def test_who_missed_no_rounds_leaves_as_much_out(member: Member, number: int, share: float) -> None:
    """Also if a server says that it missed some: its own update is in the sum."""
    member.trained(1)
    assert not member.takes_over("films.1", number, by=2.5, summed=True, own_share=share)


def test_where_sums_are_not_opened_nothing_that_a_server_says_of_missed_rounds_counts(member: Member) -> None:
    member.trained(1)
    assert not member.takes_over("films.3", 3, by=2.5)


@pytest.mark.parametrize("restarted", [False, True])
def test_who_left_a_rounds_tensors_out_gets_back_to_those_of_the_others(
    member: Member, model: AdaptedModel, state: AgentState, obfuscation: Obfuscation, restarted: bool
) -> None:
    """One with unusual labels: the others go on, and are farther away in every round that follows."""
    member.trained(1)
    assert not member.takes_over("films.1", 1, by=-0.1), "against its own step"
    if restarted:
        member = Member(model, state, obfuscation)
    member.trained(2)
    assert member.takes_over("films.2", 2, by=1.9 * STEP_MARGIN)
    member.trained(3)
    assert not member.takes_over("films.3", 3, by=1.9 * STEP_MARGIN), (
        "it is back, and nothing is left to allow for"
    )


def test_what_was_trained_from_is_known_by_its_round_or_as_the_last(member: Member) -> None:
    """Under client privacy a result is bounded by it; a server that states another round must not lift the bound."""
    assert member.results.start_of(0) is None
    member.trained(2)
    assert [member.results.start_of(number) is not None for number in (0, 1, 2, 3)] == [
        True,
        False,
        True,
        False,
    ]
