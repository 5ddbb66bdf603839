from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.progress import Activity, Stopped
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate
from shelora.lora.sketches import Exponents
from tests.unit.client_agent.tiny import LABELS

SPEC = TrainingSpec(
    base_model="tiny", labels=LABELS, local_steps=3, batch_size=4, learning_rate=0.01, evaluation_examples=7
)
SECRETS = EpochSecrets.unprotected("films", 1)


@pytest.fixture
def make_learner(agent_folder: Path) -> Iterator[Callable[..., Learner]]:
    states: list[AgentState] = []

    def make(**environment: str) -> Learner:
        for state in states:
            state.close()
        config = AgentConfig.load(
            agent_folder / "agent.yaml", {f"SHELORA_AGENT__{k}": v for k, v in environment.items()}
        )
        states[:] = [AgentState(config.state_dir)]
        return Learner(config, SPEC, states[0])

    yield make
    for state in states:
        state.close()


def test_runs_of_one_seed_start_alike_whatever_their_secrets(make_learner):
    learner = make_learner()
    starts = {}
    for seed in (0, 7, 8):
        learner._spec = SPEC.model_copy(update={"initial_seed": seed})
        for name in ("films", "news"):
            learner.start(EpochSecrets.unprotected(name, 1))
            factors = learner.model.weights().factors
            starts[seed, name] = np.concatenate([f.A.ravel() for f in factors.values()])
            learner._current.round_id = None
    assert np.array_equal(starts[7, "films"], starts[7, "news"])
    assert not np.array_equal(starts[7, "films"], starts[8, "films"])
    assert not np.array_equal(starts[0, "films"], starts[0, "news"])


def result(learner: Learner) -> Restored:
    """An aggregate of rank 2: less than the client's own rank."""
    rng = np.random.default_rng(2)
    return Restored(
        matrices={
            m.name: FactoredUpdate(
                np.linalg.qr(rng.normal(size=(m.out_features, 2)))[0], rng.normal(size=(2, m.in_features))
            )
            for m in learner.model.matrices
        },
        tensors={t.name: rng.normal(size=t.shape).astype(np.float32) for t in learner.model.tensors},
    )


def equal(first: Any, second: Any) -> bool:
    return all(np.array_equal(first.factors[n].B, second.factors[n].B) for n in first.factors)


def test_training_does_not_move_the_state_it_starts_from(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    before = learner.model.weights()
    trained = learner.train(1, Activity())
    assert equal(before, learner.model.weights())
    assert not equal(before, trained.weights)


def test_stopped_training_does_not_move_the_state_either(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    before = learner.model.weights()
    activity = Activity()
    activity.stop()
    with pytest.raises(Stopped):
        learner.train(1, activity)
    assert equal(before, learner.model.weights())
    assert learner.train(1, Activity()).loss > 0


def test_what_was_trained_survives_a_restart_and_another_round_is_trained(
    make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_learner()
    first.start(SECRETS)
    trained = first.train(1, Activity())
    again = make_learner()
    again.start(SECRETS)
    calls: list[tuple[int, str]] = []
    real = Learner._train
    monkeypatch.setattr(
        Learner,
        "_train",
        lambda self, number, activity, variant: (
            calls.append((number, variant)) or real(self, number, activity, variant)
        ),
    )
    reused = again.train(1, Activity())
    assert (reused.loss, reused.seconds, calls) == (trained.loss, trained.seconds, [])
    assert equal(reused.weights, trained.weights)
    again.train(2, Activity())
    assert calls == [(2, "")]


def test_another_variant_of_a_round_trains_on_other_batches_and_is_kept_for_itself(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    one, other = learner.train(1, Activity(), "one"), learner.train(1, Activity(), "other")
    assert not equal(one.weights, other.weights)
    assert equal(learner.train(1, Activity(), "other").weights, other.weights)


@pytest.mark.parametrize(
    "changed",
    [
        {"LORA__ALPHA": "4"},
        {"LORA__DROPOUT": "0.1"},
        {"LORA__RSLORA": "true"},
        {"DATA__TRAIN": "other.jsonl"},
        {"TRAINING__SEED": "1"},
        {"TRAINING__WEIGHT_DECAY": "0.1"},
    ],
)
def test_what_was_trained_otherwise_is_not_reused(
    make_learner: Callable[..., Learner], agent_folder: Path, changed: dict[str, str]
) -> None:
    lines = (agent_folder / "train.jsonl").read_text().splitlines(keepends=True)
    (agent_folder / "other.jsonl").write_text("".join(lines[1:]))
    first = make_learner()
    first.start(SECRETS)
    kept = first.train(1, Activity())
    other = make_learner(**changed)
    other.start(SECRETS)
    assert other.train(1, Activity()).seconds != kept.seconds


def test_an_applied_result_is_the_aggregate_and_survives_a_restart(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    restored = result(learner)
    learner.apply("films/1", [restored], SECRETS.obfuscation)
    weights = learner.model.weights()
    for name, update in restored.matrices.items():
        product = learner.model.scaling * weights.factors[name].B @ weights.factors[name].A
        np.testing.assert_allclose(product, update.Q @ update.M, atol=1e-4)
    again = make_learner()
    assert not again.holds("films/2")
    assert again.holds("films/1")
    assert equal(weights, again.model.weights())


def test_after_a_restart_it_goes_on_from_a_result_of_this_federation_and_not_of_one_that_had_its_name(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    initial = learner.model.weights()
    learner.apply("films.1a.3", [result(learner)], SECRETS.obfuscation)
    applied = learner.model.weights()
    resumed, anew = make_learner(), make_learner()
    resumed.resume("films.1a.4", SECRETS)
    assert equal(applied, resumed.model.weights())
    anew.resume("films.2b.1", SECRETS)
    assert equal(initial, anew.model.weights())


def test_directions_the_aggregate_leaves_free_can_be_trained(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.apply("films/1", [result(learner)], SECRETS.obfuscation)
    for factors in learner.model.weights().factors.values():
        assert not factors.B[:, 2:].any()
        assert np.abs(factors.A[2:]).max(axis=1).min() > 0


def kept(learner: Learner) -> Restored:
    """A sum of rank 6, more than the client's own 4, of a strategy that keeps the remainder."""
    rng = np.random.default_rng(3)
    return Restored(
        matrices={
            m.name: FactoredUpdate(
                np.linalg.qr(rng.normal(size=(m.out_features, 6)))[0],
                np.diag([8.0, 4, 2, 1, 0.5, 0.25]) @ np.linalg.qr(rng.normal(size=(m.in_features, 6)))[0].T,
            )
            for m in learner.model.matrices
        },
        tensors={t.name: rng.normal(size=t.shape).astype(np.float32) for t in learner.model.tensors},
        exponents={m.name: Exponents(2, -1) for m in learner.model.matrices},
        summed=True,
    )


def everything(weights: Any, scaling: float, name: str) -> np.ndarray:
    frozen = weights.frozen[name]
    return scaling * weights.factors[name].B @ weights.factors[name].A + frozen.B @ frozen.A


def test_what_lies_beyond_a_clients_rank_stays_in_its_model_and_survives_a_restart(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    restored = kept(learner)
    learner.apply("films/1", [restored], SECRETS.obfuscation)
    again = make_learner()
    assert again.holds("films/1")
    for weights in (learner.model.weights(), again.model.weights()):
        assert weights.exponents == restored.exponents
        for name, update in restored.matrices.items():
            assert weights.factors[name].A.shape[0] == 4
            assert weights.frozen[name].A.shape[0] == 2
            found = everything(weights, learner.model.scaling, name)
            np.testing.assert_allclose(found, update.Q @ update.M, atol=1e-5)


def test_training_moves_the_trained_part_alone_and_its_outcome_holds_both(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.apply("films/1", [kept(learner)], SECRETS.obfuscation)
    before = learner.model.weights()
    trained = learner.train(2, Activity())
    reused = make_learner()
    assert reused.holds("films/1")
    for weights in (trained.weights, reused.train(2, Activity()).weights):
        assert weights.exponents == before.exponents
        assert not equal(before, weights)
        for name, frozen in before.frozen.items():
            np.testing.assert_array_equal(weights.frozen[name].B, frozen.B)
            np.testing.assert_array_equal(weights.frozen[name].A, frozen.A)
    assert equal(before, learner.model.weights())


def test_a_sum_that_moves_the_model_too_far_is_cut_by_what_this_client_trained(
    make_learner: Callable[..., Learner],
) -> None:
    """The control is a client that trained nothing: it has nothing to measure by, and holds the sum as it came."""
    learner = make_learner()
    learner.apply("films/1", [kept(learner)], SECRETS.obfuscation, 1)
    before = learner.model.weights()
    far = replace(
        kept(learner),
        matrices={name: FactoredUpdate(u.Q, 1e3 * u.M) for name, u in kept(learner).matrices.items()},
    )
    learner.train(2, Activity())
    learner = make_learner()  # what bounds it is on disk
    learner.apply("films/2", [far], SECRETS.obfuscation, 2)
    name, scaling = learner.model.matrices[0].name, learner.model.scaling
    change = everything(learner.model.weights(), scaling, name) - everything(before, scaling, name)
    whole = far.matrices[name].Q @ far.matrices[name].M
    assert np.linalg.norm(change) < 0.01 * np.linalg.norm(whole)
    assert learner.model.weights().changes[name]
    other = make_learner(STATE_DIR=str(learner._state.adapters.newest.parent.parent / "other"))
    other.apply("films/2", [far], SECRETS.obfuscation, 2)
    np.testing.assert_allclose(everything(other.model.weights(), scaling, name), whole, rtol=1e-3, atol=1)


def test_a_result_without_a_remainder_leaves_nothing_frozen(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.apply("films/1", [kept(learner)], SECRETS.obfuscation)
    learner.apply("films/2", [result(learner)], SECRETS.obfuscation)
    assert not learner.model.weights().frozen


def test_a_result_applied_at_another_rank_is_not_taken_for_this_one(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.apply("films/1", [result(learner)], SECRETS.obfuscation)
    assert not make_learner(LORA__RANK="2").holds("films/1")


def test_evaluation_takes_the_federations_number_of_examples_and_all_at_the_end(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    some, everything = learner.evaluate(Activity()), learner.evaluate(Activity(), everything=True)
    assert some is not None
    assert everything is not None
    assert (some.count, everything.count) == (7, 20)


def test_scoring_before_training_changes_nothing_of_it(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.start(SECRETS)
    plain = learner.train(1, Activity())
    again = make_learner(STATE_DIR="another")
    again.start(SECRETS)
    again.score(Activity())
    scored = again.train(1, Activity())
    assert scored.loss == plain.loss
    assert equal(scored.weights, plain.weights)
