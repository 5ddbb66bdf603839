"""Clients of unequal ranks learn together in complete mode: real models and encryption, no servers, no committee."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from client_agent.config import AgentConfig
from client_agent.evaluation import evaluate
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Weights
from client_agent.plausibility import FEW, Losses, objection_to
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.lora.shards import LoraFactors
from tests.disk import no_file_larger_than
from tests.insiders.hostile_agent import LEAST_WAY, along, farthest, quietest
from tests.unit.client_agent.tiny import LABELS
from tests.unit.strategies.runs import SumProtection
from tests.unit.strategies.sums import Round

RANKS = (1, 2, 4)
SPEC = TrainingSpec(base_model="tiny", labels=LABELS, local_steps=20, batch_size=10, learning_rate=0.05)
MOVE = SPEC.local_steps * SPEC.learning_rate
SECRETS = EpochSecrets.unprotected("films", 1)


@dataclass(frozen=True)
class Sender:
    """What a learner trained, as the harness sends it."""

    model: object
    weight: int
    weights: Weights

    def __getattr__(self, name: str) -> object:
        return getattr(self.weights, name)


@pytest.fixture
def learners(agent_folder: Path, tmp_path: Path) -> Iterator[list[Learner]]:
    made, states = [], []
    for rank in RANKS:
        environment = {"LORA__RANK": rank, "LORA__ALPHA": 2 * rank, "STATE_DIR": tmp_path / str(rank)}
        config = AgentConfig.load(
            agent_folder / "agent.yaml", {f"SHELORA_AGENT__{k}": str(v) for k, v in environment.items()}
        )
        states.append(AgentState(config.state_dir))
        made.append(Learner(config, SPEC, states[-1]))
        made[-1].start(SECRETS)
    yield made
    for state in states:
        state.close()


def logits(learner: Learner) -> torch.Tensor:
    tokens = torch.tensor([[2, 16, 17, 18, 5, 3], [2, 16, 17, 18, 10, 3]])
    with torch.inference_mode():
        return learner.model.module(input_ids=tokens).logits


def test_clients_of_any_rank_hold_one_global_model_after_every_round_and_it_learns(
    learners: list[Learner],
) -> None:
    losses = []
    for number in (1, 2, 3):
        trained = [learner.train(number, Activity()) for learner in learners]
        losses.append(np.mean([outcome.loss for outcome in trained]))
        senders = [
            Sender(learner.model, weight, outcome.weights)
            for learner, weight, outcome in zip(learners, (256, 100, 30), trained, strict=True)
        ]
        round_ = Round(
            senders, SumProtection(tensor_bound=4.0), SECRETS.obfuscation, number=number, largest_move=MOVE
        )
        # At this learning rate a round may move more than the last one by what bounds leave room for.
        assert round_.clipping.clipped < 0.05 * round_.clipping.values
        for index, learner in enumerate(learners):
            learner.apply(f"films.{number}", round_.parts(client=index), SECRETS.obfuscation, number)
        shown = [logits(learner) for learner in learners]
        for other in shown[1:]:
            torch.testing.assert_close(other, shown[0], rtol=1e-3, atol=1e-3)
        frozen = [len(learner.model.weights().frozen) for learner in learners]
        assert frozen[0] == len(learners[0].model.matrices)
        assert frozen[2] == 0, "the largest rank holds all of it in its adapter"
    assert losses[-1] < 0.7 * losses[0]


def summed(number: int, senders: list[Sender]) -> Round:
    protection = SumProtection(tensor_bound=4.0)
    return Round(senders, protection, SECRETS.obfuscation, number=number, largest_move=MOVE)


def sent(learners: list[Learner], number: int) -> list[Sender]:
    return [Sender(each.model, 100, each.train(number, Activity()).weights) for each in learners]


def poisoned_third(learners: list[Learner]) -> tuple[list[Sender], Round]:
    """What all send in the third round, and the sum in which the last one sent nine times the opposite."""
    learn_two_rounds(learners)
    honest = sent(learners, 3)
    hostile = honest[2].weights
    return honest, summed(3, [*honest[:2], Sender(learners[2].model, 256, opposite(hostile))])


def learn_two_rounds(learners: list[Learner]) -> None:
    """The loss is near zero then, and what poison does is far beyond the limit."""
    for number in (1, 2):
        result = summed(number, sent(learners, number))
        for index, learner in enumerate(learners):
            apply(learner, index, result, f"films.{number}", number)


def apply(learner: Learner, index: int, result: Round, name: str, number: int) -> str:
    """Applies a sum; what the learner objects."""
    learner.apply(name, result.parts(client=index), SECRETS.obfuscation, number)
    return learner.objection


def test_who_objects_to_a_poisoned_sum_holds_it_and_goes_back_from_it_if_most_do(
    learners: list[Learner],
) -> None:
    honest, poisoned = poisoned_third(learners)
    for index, learner in enumerate(learners[:2]):
        before, remembered = logits(learner), learner.model.weights().changes
        assert "loss on this client's own examples" in apply(learner, index, poisoned, "films.3", 3)
        assert not torch.allclose(logits(learner), before, atol=0.1)
        learner.train(4, Activity())  # it takes part all the same
        assert learner.holds("films.2")
        assert not learner.objection
        torch.testing.assert_close(logits(learner), before)
        found = learner.model.weights().changes
        assert found.keys() == remembered.keys()
        assert all(found[name] == pytest.approx(last) for name, last in remembered.items())
        assert not learner.holds("films.3"), "it was taken back"
    again = sent(learners[:2], 3)
    repeated = summed(3, [*again, honest[2]])
    for index, learner in enumerate(learners[:2]):
        assert not apply(learner, index, repeated, "films.5", 3)


def test_what_is_thrown_as_far_as_agents_take_it_over_is_objected_to_by_all_others(
    learners: list[Learner],
) -> None:
    """Nothing of that sum is cut: only what it does to their losses tells."""
    learn_two_rounds(learners)
    honest, hostile = sent(learners, 3), learners[2]
    thrown = farthest(hostile.model.weights(), honest[2].weights, hostile.model.scaling, share=2 / 5)
    poisoned = summed(3, [*honest[:2], Sender(hostile.model, 133, thrown)])
    with capture_logs() as logs:
        objections = [apply(learner, i, poisoned, "films.3", 3) for i, learner in enumerate(learners[:2])]
    assert ["loss on this client's own examples" in why for why in objections] == [True, True]
    assert not [log for log in logs if log["event"] == "change_cut"]


def test_tensors_that_no_honest_members_move_are_left_out_and_objected_to(learners: list[Learner]) -> None:
    """Left out alone they cost a round's learning: taken back, the round is repeated without who sent them."""
    honest = sent(learners, 1)
    weights = honest[2].weights
    bound = {name: np.copysign(np.float32(4.0), -value) for name, value in weights.tensors.items()}
    result = summed(1, [*honest[:2], Sender(learners[2].model, 256, replace(weights, tensors=bound))])
    before = learners[0].model.weights().tensors
    assert "moved farther than honest members" in apply(learners[0], 0, result, "films.1", 1)
    after = learners[0].model.weights().tensors
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert not apply(learners[1], 1, summed(1, honest), "films.2", 1), "the control"


def test_an_objection_outlives_a_restart_and_what_it_goes_back_to_does_too(learners: list[Learner]) -> None:
    _, poisoned = poisoned_third(learners)
    before = logits(learners[0])
    why = apply(learners[0], 0, poisoned, "films.3", 3)
    restarted = Learner(learners[0]._config, SPEC, learners[0]._state)
    assert restarted.holds("films.3")
    assert restarted.objection == why
    assert restarted.holds("films.2")
    torch.testing.assert_close(logits(restarted), before)
    assert not restarted.objection


def test_who_objected_to_a_sum_that_the_others_went_on_from_measures_by_it(learners: list[Learner]) -> None:
    """With data unlike the others' it would object for ever, and with a liar be enough to take results back."""
    _, poisoned = poisoned_third(learners)
    best = learners[0]._results._judge._best_loss
    objections = [apply(each, i, poisoned, "films.3", 3) for i, each in enumerate(learners)]
    assert objections[0]
    senders = []
    for each in learners:
        start = each.model.weights()
        little = along(start, each.train(4, Activity()).weights, each.model.scaling, 0.4)
        senders.append(Sender(each.model, 100, little))
    assert not apply(learners[0], 0, summed(4, senders), "films.4", 4)
    after = learners[0]._results._judge._judged[1]
    assert objection_to(Losses(best=best, before=best, own=None, after=after)), "the control: it would have"


def opposite(weights: Weights) -> Weights:
    """What moves the model nine times against what was learned."""
    turned = {n: LoraFactors((-9 * f.B).astype(np.float32), f.A) for n, f in weights.factors.items()}
    return Weights(
        factors=turned, tensors=weights.tensors, frozen=weights.frozen, exponents=weights.exponents
    )


def test_a_first_sum_is_held_against_what_was_trained_before_a_restart_also_when_it_is_repeated(
    learners: list[Learner],
) -> None:
    state = learners[0]._state
    for name, variant in (("films.1", ""), ("films.2", "of another draw")):
        for learner in learners:
            learner.start(SECRETS)  # the second time as the first result was taken back
        honest = [Sender(each.model, 100, each.train(1, Activity(), variant).weights) for each in learners]
        hostile = Sender(learners[2].model, 256, opposite(honest[2].weights))
        poisoned = summed(1, [*honest[:2], hostile])
        restarted = Learner(learners[0]._config, SPEC, state)
        restarted.resume(name, SECRETS)
        apply(restarted, 0, poisoned, name, 1)
        assert restarted.model.weights().changes, "it was bounded"
        assert state.applied()[0]["round"] == name
        learners[0] = restarted


def test_a_disk_that_refuses_a_result_leaves_what_it_is_held_against(learners: list[Learner]) -> None:
    _, poisoned = poisoned_third(learners)
    learner, before = learners[0], logits(learners[0])
    with capture_logs(), no_file_larger_than(64), pytest.raises(OSError):
        apply(learner, 0, poisoned, "films.3", 3)
    learner.resume("films.3", SECRETS)
    torch.testing.assert_close(logits(learner), before)
    assert apply(learner, 0, poisoned, "films.3", 3)
    assert learner.holds("films.2")
    torch.testing.assert_close(logits(learner), before)


def test_a_sum_that_no_model_computes_with_is_not_applied(learners: list[Learner], monkeypatch) -> None:
    learner, (_, poisoned) = learners[0], poisoned_third(learners)
    before = logits(learner)
    with monkeypatch.context() as patched:
        patched.setattr(learner._results._judge, "_loss_with", lambda weights: float("nan"))
        with pytest.raises(DomainError, match="the loss with it is nan") as error:
            apply(learner, 0, poisoned, "films.3", 3)
    assert error.value.reason is Reason.RESULT_REFUSED
    torch.testing.assert_close(logits(learner), before)
    assert learner.holds("films.2")


def test_a_loss_that_is_known_or_decides_nothing_is_not_computed_again(
    learners: list[Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def counted(*arguments: object) -> object:
        result = evaluate(*arguments)
        found.append(result.loss)
        return result

    monkeypatch.setattr("client_agent.learner.evaluate", counted)
    learner = learners[2]
    counts = []
    for number in (1, 2, 3):
        result = summed(number, sent(learners, number))
        if number == 3:
            learner._results._judge._judged = (None, 0.0)
        found.clear()
        for index, each in enumerate(learners):
            before = len(found)
            each.apply(f"films.{number}", result.parts(client=index), SECRETS.obfuscation, number)
        counts.append(len(found) - before)
        if number == 2:
            led_to = found[-1]
    assert counts == [2, 1, 2], "before and after, then after alone, then both again, for nothing is known"
    assert found[-2] == led_to, (
        "the state that a result led to has the loss that was measured with the result"
    )


@pytest.mark.parametrize("least", [-1.6, LEAST_WAY, None], ids=["unseen", "seen", "absent"])
def test_one_that_knows_the_limits_slows_the_others_down_and_cannot_hold_them(
    learners: list[Learner], monkeypatch: pytest.MonkeyPatch, least: float | None
) -> None:
    """Nobody has more than a nat to learn here, so by its losses a sum may teach nothing.

    By its direction it has to move some of each member's step; one that knows this too slows the others down, and that
    is not stopped (docs/threat-model.md). The control is that all is as good without it.
    """
    if least == -1.6:
        monkeypatch.setattr("client_agent.judging.turned", lambda *_: "")
    hostile, best, losses = learners[2], float("inf"), []
    for number in (1, 2, 3):
        senders = []
        for learner in learners[:2] if least is None else learners:
            weights = learner.train(number, Activity()).weights
            if learner is hostile:
                weights, best = quietest(learner, weights, best, share=2 / 5, least=least)
            senders.append(Sender(learner.model, 133 if learner is hostile else 100, weights))
        protection = SumProtection(tensor_bound=4.0)
        result = Round(senders, protection, SECRETS.obfuscation, number=number, largest_move=MOVE)
        present = learners[: len(senders)]
        objections = [apply(each, i, result, f"films.{number}", number) for i, each in enumerate(present)]
        assert not any(objections[:2])
        losses.append(learners[0]._loss_with(learners[0].model.weights()))
    assert losses[-1] > 0.6 if least == -1.6 else losses[-1] < 0.3, losses


def test_of_more_than_a_few_clients_a_sum_need_not_teach_each_of_them(
    learners: list[Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client_agent.judging.MUCH_TO_LEARN", 0.0)
    monkeypatch.setattr("client_agent.plausibility.MUCH_TO_LEARN", 0.0)
    idle = [
        Sender(each.model, 100, start)
        for each in learners
        for start in [each.model.weights()]
        if each.train(1, Activity())
    ]
    nothing = summed(1, idle)
    assert "loss on this client's own examples" in apply(learners[0], 0, nothing, "films.1", 1)
    many = [replace(part, contributors=FEW + 1) for part in nothing.parts(client=1)]
    learners[1].apply("films.1", many, SECRETS.obfuscation, 1)
    assert not learners[1].objection
