"""What an optimizer goes on from after a result: in the result's own directions, bounded, kept with the state."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import safetensors.numpy
import torch

from client_agent.config import AgentConfig, TrainingSettings
from client_agent.data import Examples
from client_agent.drawing import batches
from client_agent.encoding import Encoder
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Weights, weight_bytes
from client_agent.memory import MOMENT_SIZES, round_bytes
from client_agent.model import AdaptedModel
from client_agent.moments import NONE, REMEMBERED, Estimates, Moments, followed
from client_agent.optimizer_state import resume
from client_agent.plausibility import STEP_MARGIN
from client_agent.progress import Activity
from client_agent.state import AgentState
from client_agent.training import TrainingOutcome, TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate, LoraFactors
from tests.unit.client_agent.tiny import LABELS

KEEP: Final = TrainingSettings(optimizer_state="keep")
SPEC: Final = TrainingSpec(base_model="tiny", labels=LABELS, local_steps=3, batch_size=4, learning_rate=0.01)
SECRETS: Final = EpochSecrets.unprotected("films", 1)
NAME: Final = "layer"


def ignore(_fraction: float) -> None:
    pass


def drawn(seed: int, rank: int = 3) -> LoraFactors:
    rng = np.random.default_rng(seed)
    return LoraFactors(
        B=rng.normal(size=(7, rank)).astype(np.float32), A=rng.normal(size=(rank, 5)).astype(np.float32)
    )


def estimated(gradients: np.ndarray, factors: LoraFactors) -> Moments:
    """Mean and mean square, over some gradients [k, out, in] of the matrix, of what each factor sees of them."""
    of_B = np.einsum("koi,ri->kor", gradients, factors.A)
    of_A = np.einsum("koi,or->kri", gradients, factors.B)
    return Moments(
        steps=5,
        mean=Estimates(factors={NAME: LoraFactors(B=of_B.mean(0), A=of_A.mean(0))}),
        square=Estimates(factors={NAME: LoraFactors(B=(of_B**2).mean(0), A=(of_A**2).mean(0))}),
    )


def test_estimates_follow_a_result_into_its_own_directions() -> None:
    """The mean exactly: it is linear. Without following, it is that of other values."""
    rng = np.random.default_rng(0)
    turn = rng.normal(size=(3, 3))
    old = drawn(1)
    new = LoraFactors(B=old.B @ np.linalg.inv(turn), A=turn @ old.A)
    gradients = rng.normal(size=(6, 7, 5)) + 1
    kept = estimated(gradients, old)
    moved, expected = followed(kept, {NAME: old}, {NAME: new}), estimated(gradients, new)
    for side in ("A", "B"):
        found, right, unmoved = (getattr(m.mean.factors[NAME], side) for m in (moved, expected, kept))
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
        assert np.abs(unmoved - right).max() > 0.5
    assert moved.steps == 5


def test_estimates_of_a_result_that_is_what_was_trained_stay_as_they_are() -> None:
    factors = {NAME: drawn(1)}
    kept = estimated(np.random.default_rng(0).normal(size=(6, 7, 5)), factors[NAME])
    moved = followed(kept, factors, factors)
    for before, after in ((kept.mean, moved.mean), (kept.square, moved.square)):
        np.testing.assert_allclose(after.factors[NAME].A, before.factors[NAME].A, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after.factors[NAME].B, before.factors[NAME].B, rtol=1e-4, atol=1e-5)


def test_what_new_directions_will_see_is_as_uncertain_as_what_old_ones_saw() -> None:
    """Else the first gradient there would be divided by almost nothing. A single gradient has no spread of its own."""
    gradients = np.random.default_rng(0).normal(size=(1, 7, 5))
    old = LoraFactors(B=np.eye(7, 2, dtype=np.float32), A=np.eye(2, 5, dtype=np.float32))
    new = LoraFactors(B=np.eye(7, 2, -2, dtype=np.float32), A=np.eye(2, 5, 2, dtype=np.float32))
    moved = followed(estimated(gradients, old), {NAME: old}, {NAME: new})
    assert not moved.mean.factors[NAME].B.any()
    expected = np.broadcast_to((gradients[0, :, :2] ** 2).mean(axis=1, keepdims=True), (7, 2))
    np.testing.assert_allclose(moved.square.factors[NAME].B, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_that_only_goes_on_is_no_longer_than_a_learning_rate(seed: int) -> None:
    kept = estimated(np.random.default_rng(seed).normal(size=(2, 7, 5)), drawn(1))
    moved = followed(kept, {NAME: drawn(1)}, {NAME: drawn(2)})
    for side in ("A", "B"):
        mean, square = (getattr(e.factors[NAME], side) for e in (moved.mean, moved.square))
        assert (np.abs(mean) <= np.sqrt(square) * (1 + 1e-5)).all()


def longest_step(model: AdaptedModel, remembered: int) -> float:
    """In learning rates: of a value whose gradient has been tiny, and then jumps."""
    tiny = model.gathered(lambda parameter: torch.full_like(parameter, 1e-4))
    squares = model.gathered(lambda parameter: torch.full_like(parameter, 1e-8))
    optimizer = torch.optim.AdamW(model.trainable(), lr=1.0, weight_decay=0.0)
    resume(optimizer, model, Moments(steps=remembered, mean=tiny, square=squares))
    value, steps = model.trainable()[0], []
    for _ in range(40):
        before = value.detach().clone()
        for parameter in model.trainable():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        steps.append(float((value.detach() - before).abs().max()))
    return max(steps)


def test_a_gradient_that_jumps_after_a_result_moves_no_value_beyond_the_bounds_of_sums(
    model: AdaptedModel,
) -> None:
    """The control is what AdamW does with moments of as many steps as they rest on: it looks like an attack."""
    assert longest_step(model, REMEMBERED) < 1.13 < STEP_MARGIN
    assert longest_step(model, 1000) > 3


def unbroken(model: AdaptedModel, encoder: Encoder, examples: Examples, runs: list[TrainingRun]) -> Weights:
    """One AdamW over several runs: the control."""
    optimizer = torch.optim.AdamW(model.trainable(), lr=1.0, weight_decay=0.0)
    for run in runs:
        model.module.train()
        torch.manual_seed(run.seed)
        drawn_batches = batches(len(examples), run.batch_size, run.steps, run.seed)
        for rate, chosen in zip(run.rates, drawn_batches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            logits, targets = model.predict(encoder.batch(examples.select(chosen)))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
            optimizer.step()
    return model.weights()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (KEEP, True),
        (TrainingSettings(optimizer="adamw_torch_fused", optimizer_state="keep"), True),
        (TrainingSettings(), False),
    ],
)
def test_two_rounds_without_a_result_between_are_one_training_where_the_state_is_kept(
    model: AdaptedModel, encoder: Encoder, examples: Examples, settings: TrainingSettings, kept: bool
) -> None:
    runs = [TrainingRun(rates=[0.01] * 4, batch_size=8, seed=seed, settings=settings) for seed in (3, 4)]
    start = model.weights()
    for run in runs:
        train(model, encoder, examples, run, ignore)
    trained = model.weights()
    model.load(start)
    expected = unbroken(model, encoder, examples, runs)
    differences = [np.abs(f.B - expected.factors[name].B).max() for name, f in trained.factors.items()]
    assert max(differences) < 1e-4 if kept else max(differences) > 1e-3
    assert bool(trained.moments.steps) is kept


@pytest.fixture
def make_learner(agent_folder: Path) -> Iterator[Callable[..., Learner]]:
    states: list[AgentState] = []

    def make(kind: type[Learner] = Learner, **environment: str) -> Learner:
        for state in states:
            state.close()
        changed = {"TRAINING__OPTIMIZER_STATE": "keep"} | environment
        config = AgentConfig.load(
            agent_folder / "agent.yaml", {f"SHELORA_AGENT__{k}": v for k, v in changed.items()}
        )
        states[:] = [AgentState(config.state_dir)]
        return kind(config, SPEC, states[0])

    yield make
    for state in states:
        state.close()


def result(learner: Learner, seed: int) -> Restored:
    """A sum that is near what this client trained, cut otherwise."""
    trained = learner._state.trained()
    assert trained is not None
    rng, matrices = np.random.default_rng(seed), {}
    for name, factors in trained[1].factors.items():
        Q, R = np.linalg.qr(factors.B.astype(np.float64))
        M = learner.model.scaling * R @ factors.A
        matrices[name] = FactoredUpdate(Q, M + 0.01 * np.abs(M).max() * rng.normal(size=M.shape))
    return Restored(matrices=matrices, tensors=dict(trained[1].tensors), summed=True)


def values(moments: Moments) -> np.ndarray:
    sides = (moments.mean, moments.square)
    return np.concatenate(
        [
            part.ravel()
            for each in sides
            for part in (
                *(side for f in each.factors.values() for side in (f.A, f.B)),
                *each.tensors.values(),
            )
        ]
    )


def test_the_state_is_that_of_a_result_survives_a_restart_and_goes_when_the_result_is_taken_back(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    assert learner.model.moments is NONE
    first = learner.train(1, Activity())
    assert learner.model.moments is NONE, "training does not move the state that it starts from"
    learner.apply("films.1", [result(learner, 1)], SECRETS.obfuscation, 1)
    one = learner.model.moments
    assert one.steps == first.weights.moments.steps == SPEC.local_steps
    for name, value in first.weights.moments.mean.tensors.items():
        np.testing.assert_array_equal(one.mean.tensors[name], value)

    restarted = make_learner()
    assert restarted.holds("films.1")
    np.testing.assert_array_equal(values(restarted.model.moments), values(one))
    second = restarted.train(2, Activity())
    restarted.apply("films.2", [result(restarted, 2)], SECRETS.obfuscation, 2)
    assert not np.array_equal(values(restarted.model.moments), values(one))

    again = make_learner()
    assert again.holds("films.1")
    np.testing.assert_array_equal(values(again.model.moments), values(one))
    repeated = again.train(2, Activity())
    np.testing.assert_array_equal(values(repeated.weights.moments), values(second.weights.moments))
    reset = make_learner(TRAINING__OPTIMIZER_STATE="reset")
    assert reset.holds("films.1")
    anew = reset.train(2, Activity())
    assert anew.weights.moments is NONE
    name = reset.model.matrices[0].name
    assert not np.array_equal(anew.weights.factors[name].B, second.weights.factors[name].B)


def test_what_is_kept_takes_as_much_as_disk_and_memory_are_asked_for(
    make_learner: Callable[..., Learner], agent_folder: Path
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    learner.train(1, Activity())
    written = safetensors.numpy.load_file(agent_folder / "state" / "trained.safetensors")
    size = sum(value.nbytes for value in written.values())
    assert size - written["moments/steps"].nbytes == MOMENT_SIZES * weight_bytes(learner.model)
    more = round_bytes(learner.model, None, keeps_moments=True) - round_bytes(learner.model, None)
    held = 2 * (MOMENT_SIZES - 1)  # beside the state before and the one after
    assert more >= held * weight_bytes(learner.model)


def test_a_client_that_did_not_train_a_round_begins_the_next_one_anew(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    learner.train(1, Activity())
    theirs = result(learner, 1)
    learner.apply("films.1", [theirs], SECRETS.obfuscation, 1)
    assert learner.model.moments.steps
    learner.apply("films.2", [theirs], SECRETS.obfuscation, 2)
    assert learner.model.moments is NONE


def test_code_of_ones_own_keeps_no_state_and_is_told_so(make_learner: Callable[..., Learner]) -> None:
    class Own(Learner):
        def fit(self, *_: object) -> TrainingOutcome:
            raise NotImplementedError

    with pytest.raises(DomainError, match="optimizer_state = keep: only the agent's own loop") as caught:
        make_learner(Own)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TRAINING__OPTIMIZER": "sgd"}, "optimizer_state keep goes with adamw_torch"),
        ({"TRAINING__OPTIMIZER": "adamw_8bit"}, "optimizer_state keep goes with adamw_torch"),
        ({"PRIVACY": "{epsilon: 8, delta: 1.0e-5}"}, "optimizer_state reset"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused_by_name(
    make_learner: Callable[..., Learner], changed: dict[str, str], message: str
) -> None:
    with pytest.raises(DomainError, match=message) as caught:
        make_learner(**changed)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
