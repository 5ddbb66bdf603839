"""Differential privacy of each example: what a step does to one, what it costs, that no cost is forgotten."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from opacus.accountants import RDPAccountant
from scipy.stats import beta, kstest

from client_agent.config import AgentConfig, LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoded, Encoder
from client_agent.inspection import inspect, report
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.model import AdaptedModel
from client_agent.noise import Randomness
from client_agent.privacy import LEDGER, ORDERS, Budget, Ledger, Mechanism, epsilon_of, noise_for
from client_agent.private_training import (
    NoisyOptimizer,
    gradients_by_example,
    poisson_sample,
    private_step,
    rehearse_privately,
    train_privately,
)
from client_agent.progress import Activity, Stopped
from client_agent.state import AgentState
from client_agent.training import TrainingRun
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import LABELS, classifier, decoder

SPEC = TrainingSpec(
    base_model="tiny", labels=LABELS, local_steps=3, batch_size=4, learning_rate=0.01, calibration_examples=4
)
SECRETS = EpochSecrets.unprotected("films", 1)
ROUNDS = 4
EPSILON = {"PRIVACY__EPSILON": "8", "PRIVACY__DELTA": "1e-3"}
KEY = bytes(range(32))
NORM = 0.05


def ignore(_fraction: float) -> None:
    pass


@pytest.fixture
def configured(agent_folder: Path) -> Callable[..., AgentConfig]:
    def make(**environment: str) -> AgentConfig:
        given = {f"SHELORA_AGENT__{k}": v for k, v in environment.items()}
        return AgentConfig.load(agent_folder / "agent.yaml", given)

    return make


@pytest.fixture
def make_learner(configured: Callable[..., AgentConfig]) -> Iterator[Callable[..., Learner]]:
    states: list[AgentState] = []

    def make(rounds: int = ROUNDS, **environment: str) -> Learner:
        for state in states:
            state.close()
        config = configured(**environment)
        states[:] = [AgentState(config.state_dir)]
        learner = Learner(config, SPEC, states[0], rounds)
        learner.start(SECRETS)
        return learner

    yield make
    for state in states:
        state.close()


def mechanism(noise: float, rate: float = 0.2, norm: float = NORM) -> Mechanism:
    return Mechanism(noise_multiplier=noise, sample_rate=rate, max_gradient_norm=norm)


def plain_gradient(model: AdaptedModel, encoder: Encoder, examples: Examples, index: int) -> torch.Tensor:
    """The gradient of one example's mean loss, by plain backpropagation."""
    logits, targets = model.predict(encoder.batch(examples.select([index])))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    flat = torch.cat([p.grad.flatten() for p in model.trainable()])
    for parameter in model.trainable():
        parameter.grad = None
    return flat


def summed(model: AdaptedModel, parts: list, noise: float = 1e-9, norm: float = NORM) -> torch.Tensor:
    """What one step hands to the inner optimizer, times its expected batch size."""
    inner = torch.optim.SGD(model.trainable(), lr=0.0)
    optimizer = NoisyOptimizer(
        inner, mechanism(noise, norm=norm), expected_batch_size=4, randomness=Randomness(KEY)
    )
    model.module.train()
    with gradients_by_example(model):
        private_step(model, parts, optimizer)
    model.module.eval()
    return torch.cat([4 * p.grad.flatten() for p in model.trainable()])


@pytest.fixture(params=["classifier", "decoder"])
def task(
    request: pytest.FixtureRequest, bert_folder: Path, llama_folder: Path, examples: Examples
) -> tuple[AdaptedModel, Encoder, Examples]:
    causal = request.param == "decoder"
    model = decoder(llama_folder) if causal else classifier(bert_folder)
    model.initialise(Obfuscation(bytes(range(32)), 1))
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():  # with B = 0 the gradients of A are 0
        for parameter in model.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return (
        model,
        Encoder(model.tokenizer, 32, append_end=causal),
        Examples(examples.texts) if causal else examples,
    )


def test_each_example_moves_the_sum_by_its_own_gradient_scaled_to_the_norm(task) -> None:
    model, encoder, examples = task
    chosen = [0, 5, 12, 19]  # of two lengths
    alone = [plain_gradient(model, encoder, examples, index) for index in chosen]
    assert all(gradient.norm() > NORM for gradient in alone)
    expected = sum(gradient * NORM / gradient.norm() for gradient in alone)
    whole = summed(model, [encoder.batch(examples.select(chosen))])
    torch.testing.assert_close(whole, expected, rtol=2e-3, atol=1e-5)
    without = summed(model, [encoder.batch(examples.select(chosen[1:]))])
    assert (whole - without).norm() <= NORM * (1 + 1e-3)
    control = summed(model, [encoder.batch(examples.select(chosen))], norm=1e6)
    kept = summed(model, [encoder.batch(examples.select(chosen[1:]))], norm=1e6)
    torch.testing.assert_close(
        control - kept, alone[0], rtol=2e-3, atol=1e-5
    )  # unclipped, it has its whole say


def test_parts_of_a_batch_add_up_to_the_whole_one(task) -> None:
    model, encoder, examples = task
    whole = summed(model, [encoder.batch(examples.select([0, 5, 12, 19, 3]))])
    parts = summed(model, [encoder.batch(examples.select(part)) for part in ([0, 5], [12, 19], [3])])
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-6)


def test_an_example_without_targets_or_with_a_broken_gradient_adds_nothing(
    llama_folder: Path, obfuscation: Obfuscation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(llama_folder)
    model.initialise(obfuscation)
    encoder = Encoder(model.tokenizer, 32, append_end=False)
    long = encoder.collated([Encoded(row) for row in [[5, 6, 7, 8]]])
    both = encoder.collated([Encoded(row) for row in [[5, 6, 7, 8], [5]]])
    torch.testing.assert_close(summed(model, [long]), summed(model, [both]), rtol=1e-3, atol=1e-6)
    real = AdaptedModel.losses
    broken_first = torch.tensor([math.nan, 1.0])
    monkeypatch.setattr(AdaptedModel, "losses", lambda m, b: real(m, b) * broken_first)
    two = encoder.collated([Encoded(row) for row in [[7, 8], [5, 6, 7, 8]]])
    broken = summed(model, [two])
    monkeypatch.undo()
    torch.testing.assert_close(broken, summed(model, [long]), rtol=1e-3, atol=1e-6)


def test_an_empty_batch_is_noise_of_the_stated_deviation(model: AdaptedModel) -> None:
    noise = summed(model, [], noise=3.0).double().numpy() / (3.0 * NORM)
    assert kstest(noise, "norm").pvalue > 0.01
    assert noise.std() == pytest.approx(1, abs=4 / math.sqrt(2 * noise.size))


def test_noise_is_normal_and_sampling_is_poisson_and_no_two_streams_are_alike() -> None:
    drawn = Randomness(KEY).normal(100_001)
    assert drawn.shape == (100_001,)
    assert kstest(drawn, "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:50_000], drawn[50_000:100_000])[0, 1]) < 0.02
    randomness = Randomness(KEY)
    taken = np.zeros(50)
    sizes = []
    for _ in range(4000):
        chosen = poisson_sample(50, 0.02, randomness)
        taken[chosen] += 1
        sizes.append(len(chosen))
    assert np.abs(taken / 4000 - 0.02).max() < 4.5 * math.sqrt(0.02 * 0.98 / 4000)
    assert np.var(sizes) == pytest.approx(50 * 0.02 * 0.98, rel=0.15)  # a fixed size would have none
    assert sizes.count(0) / 4000 == pytest.approx(0.98**50, abs=0.03)
    assert Randomness().seed() != Randomness().seed()


def test_training_is_never_the_same_twice_and_leaves_no_hooks(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    before = model.weights()
    run = TrainingRun(rates=[0.01] * 3, batch_size=4, seed=3, micro_batch=2)
    results = []
    for _ in range(2):
        model.load(before)
        train_privately(model, encoder, examples, run, mechanism(1.0), ignore)
        results.append(model.weights())
    assert any(
        not np.array_equal(results[0].factors[n].B, results[1].factors[n].B) for n in results[0].factors
    )
    assert not any(hasattr(p, "grad_sample") for p in model.trainable())
    assert not any(m._backward_hooks for m in model.module.modules())


def test_with_little_noise_it_still_learns(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    from client_agent.evaluation import evaluate  # noqa: PLC0415

    model = classifier(bert_folder, LoraSettings(rank=4, alpha=8, dropout=0.05))
    model.initialise(obfuscation)
    encoder = Encoder(model.tokenizer, 32, append_end=False)
    train_privately(
        model,
        encoder,
        examples,
        TrainingRun(rates=[0.02] * 60, batch_size=10, seed=0),
        mechanism(1e-5, 0.5, 1.0),
        ignore,
        Randomness(KEY),
    )
    assert evaluate(model, encoder, examples, ignore).correct > 0.7 * len(examples)


def test_layers_whose_examples_are_mixed_are_refused_in_one_sentence(task) -> None:
    model, encoder, examples = task
    pair = encoder.batch(examples.select([0, 12]))
    rehearse_privately(model, pair)  # control
    layer = list(model.layers.values())[-1]
    mixing = layer.register_forward_hook(lambda _m, _i, out: out + 0.5 * out.mean(dim=0, keepdim=True))
    with pytest.raises(DomainError, match="depends on what else is in its batch") as refused:
        rehearse_privately(model, pair)
    assert refused.value.reason is Reason.MODEL_INVALID
    mixing.remove()
    layer.lora_A["default"].register_buffer("running", torch.zeros(3))
    with pytest.raises(DomainError, match="privacy: this model's gradients cannot be told apart"):
        rehearse_privately(model, pair)


def test_the_whole_schedule_costs_what_opacus_says_and_no_more_than_epsilon(
    configured: Callable[..., AgentConfig],
) -> None:
    config = configured(**EPSILON)
    config.state_dir.mkdir(exist_ok=True)
    budget = Budget(config, SPEC, examples=20, rounds=ROUNDS)
    assert (budget.mechanism.sample_rate, budget.rounds_left()) == (0.2, ROUNDS)
    opacus = RDPAccountant()
    for _ in range(ROUNDS):
        budget.require_round()
        spent = budget.spend()
        for _ in range(SPEC.local_steps):
            opacus.step(noise_multiplier=budget.mechanism.noise_multiplier, sample_rate=0.2)
        assert spent == pytest.approx(opacus.get_epsilon(1e-3, alphas=ORDERS), rel=1e-9)
    assert 7.9 < spent <= 8
    assert spent == pytest.approx(opacus.get_epsilon(1e-3), rel=0.03)  # at its own orders
    with pytest.raises(DomainError) as refused:
        budget.require_round()
    assert refused.value.reason is Reason.PRIVACY_EXHAUSTED
    assert not any(character.isdigit() for character in refused.value.message)


def test_more_steps_or_a_smaller_epsilon_need_more_noise_also_far_out() -> None:
    noises = [noise_for(epsilon, 1e-5, 0.01, 500) for epsilon in (0.05, 1.0, 8.0)]
    assert noises == sorted(noises, reverse=True)
    assert noise_for(8.0, 1e-5, 0.01, 5000) > noises[2]
    for epsilon, noise in zip((0.05, 1.0, 8.0), noises, strict=True):
        assert 0.99 * epsilon < epsilon_of(((noise, 0.01, 500),), 1e-5) <= epsilon
    with pytest.raises(DomainError, match=r"privacy\.epsilon = 0\.0001"):
        noise_for(0.0001, 1e-5, 0.01, 500)


def test_what_is_spent_survives_a_restart_and_ends_training_also_when_the_federation_is_extended(
    make_learner: Callable[..., Learner],
) -> None:
    first = make_learner(**EPSILON)
    for number in (1, 2):
        first.train(number, Activity())
    again = make_learner(rounds=100, **EPSILON)  # extended
    assert again.privacy == first.privacy
    for number in (3, 4):
        again.train(number, Activity())
    with pytest.raises(DomainError) as refused:
        again.train(5, Activity())
    assert refused.value.reason is Reason.PRIVACY_EXHAUSTED
    assert again.train(4, Activity()).loss == 0  # what is kept is sent again: it costs nothing more


def test_a_round_trained_anew_is_spent_again_and_a_kept_or_stopped_one_is_not(
    make_learner: Callable[..., Learner], configured: Callable[..., AgentConfig]
) -> None:
    folder = configured(**EPSILON).state_dir

    def steps() -> int:
        return sum(entry[2] for entry in Ledger.read(folder).spent)

    learner = make_learner(**EPSILON)
    learner.train(1, Activity(), "one")
    learner.train(1, Activity(), "one")
    assert steps() == SPEC.local_steps
    stopped = Activity()
    stopped.stop()
    with pytest.raises(Stopped):
        learner.train(1, stopped, "other")
    assert steps() == SPEC.local_steps
    learner.train(1, Activity(), "other")
    assert steps() == 2 * SPEC.local_steps


def test_the_cost_is_on_disk_before_the_weights_are(
    make_learner: Callable[..., Learner],
    configured: Callable[..., AgentConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = make_learner(**EPSILON)

    def refuse(*_args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(AgentState, "save_trained", refuse)
    with pytest.raises(OSError, match="no space"):
        learner.train(1, Activity())
    assert Ledger.read(configured(**EPSILON).state_dir).spent
    monkeypatch.undo()
    monkeypatch.setattr(Ledger, "write", refuse)
    with pytest.raises(OSError, match="no space"):
        learner.train(2, Activity())
    assert learner._state.trained() is None


def test_a_damaged_ledger_is_refused_not_begun_anew(
    make_learner: Callable[..., Learner], configured: Callable[..., AgentConfig]
) -> None:
    make_learner(**EPSILON).train(1, Activity())
    path = configured(**EPSILON).state_dir / LEDGER
    whole = json.loads(path.read_text())
    for damaged in (
        "",
        "[]",
        "{}",
        json.dumps({**whole, "spent": [[1, 0.2, -5]]}),
        json.dumps({**whole, "spent": [[math.inf, 0.2, 5]]}),
        json.dumps({**whole, "plan": None}),
    ):
        path.write_text(damaged)
        with pytest.raises(DomainError, match="how much of the privacy budget is spent") as refused:
            make_learner(**EPSILON)
        assert refused.value.reason is Reason.CONFIGURATION_INVALID


def test_other_settings_or_another_federation_plan_anew_and_what_was_spent_stays(
    make_learner: Callable[..., Learner], configured: Callable[..., AgentConfig]
) -> None:
    learner = make_learner(**EPSILON)
    for number in range(1, ROUNDS + 1):
        learner.train(number, Activity())
    for changed in ({"FEDERATION": "other"}, {"PRIVACY__EPSILON": "4"}):
        with pytest.raises(DomainError) as refused:
            make_learner(**{**EPSILON, **changed}).train(1, Activity(), "anew")
        assert refused.value.reason is Reason.PRIVACY_EXHAUSTED
    make_learner(**{**EPSILON, "PRIVACY__EPSILON": "12"}).train(1, Activity(), "anew")


def test_without_the_section_nothing_changes_and_with_it_neither_loss_nor_scores_tell_of_examples(
    make_learner: Callable[..., Learner], agent_folder: Path
) -> None:
    plain = make_learner()
    assert plain.privacy == ""
    known = plain.train(1, Activity())
    scores = plain.score(Activity())
    private = make_learner(**EPSILON)
    hidden = private.train(1, Activity())  # what was trained without noise is not reused
    assert (known.loss > 0, hidden.loss) == (True, 0)
    assert not np.array_equal(
        next(iter(hidden.weights.tensors.values())), next(iter(known.weights.tensors.values()))
    )
    lines = (agent_folder / "train.jsonl").read_text().splitlines(keepends=True)
    (agent_folder / "other.jsonl").write_text("".join(lines[:7]))
    other = make_learner(**{**EPSILON, "DATA__TRAIN": "other.jsonl"})
    for name, values in private.score(Activity()).items():
        np.testing.assert_array_equal(values, other.score(Activity())[name])
        assert not np.array_equal(values, scores[name])
    again = make_learner()
    assert np.array_equal(
        next(iter(again.train(1, Activity()).weights.tensors.values())),
        next(iter(known.weights.tensors.values())),
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"DELTA": "1e-3"}, "exactly one"),
        ({"DELTA": "1e-3", "EPSILON": "1", "NOISE_MULTIPLIER": "1"}, "exactly one"),
        ({"EPSILON": "1"}, "delta"),
        ({"EPSILON": "0", "DELTA": "1e-3"}, "epsilon"),
        ({"EPSILON": ".nan", "DELTA": "1e-3"}, "epsilon"),
    ],
)
def test_settings_that_promise_nothing_clear_are_refused(
    configured: Callable[..., AgentConfig], settings: dict[str, str], why: str
) -> None:
    with pytest.raises(DomainError, match=why):
        configured(**{f"PRIVACY__{name}": value for name, value in settings.items()})


def test_a_delta_that_gives_an_example_away_is_refused(make_learner: Callable[..., Learner]) -> None:
    with pytest.raises(DomainError, match=r"promises nothing for 20 examples"):
        make_learner(PRIVACY__EPSILON="8", PRIVACY__DELTA="0.05")


def test_the_agent_tells_what_the_budget_buys(
    configured: Callable[..., AgentConfig], make_learner: Callable[..., Learner]
) -> None:
    told = inspect(configured(**EPSILON), SPEC, ProtectionSpec(), ROUNDS).privacy
    assert told.startswith(
        "epsilon 8 at delta 0.001 buys 4 more rounds of the federation's 4; spent so far: 0;"
    )
    noisy = configured(PRIVACY__NOISE_MULTIPLIER="1.5", PRIVACY__DELTA="1e-3")
    found = inspect(noisy, SPEC, ProtectionSpec(), ROUNDS)
    assert f"{epsilon_of(((1.5, 0.2, 12),), 1e-3):.3g} at delta 0.001 after 4 more rounds" in found.privacy
    assert report(SPEC, found).renderables
    with structlog.testing.capture_logs() as logs:
        make_learner(**EPSILON).train(1, Activity())
    (spent,) = [log for log in logs if log["event"] == "privacy_spent"]
    assert (0 < spent["epsilon"] < 8, spent["rounds_left"]) == (True, 3)
    assert not any("loss" in log for log in logs)


def test_an_audit_with_canaries_finds_less_than_the_accountant_admits_and_much_without_noise(
    model: AdaptedModel, encoder: Encoder
) -> None:
    """A lower bound of epsilon from how well trainings with and without a canary are told apart.

    Jagielski, Ullman and Oprea, "Auditing differentially private machine learning" (NeurIPS 2020): with Clopper and
    Pearson's bounds, 95 % sure of both rates together.
    """
    before = model.weights()
    without = Examples(("the movie was good", "the movie was bad"), (1, 0))
    canary = Examples((*without.texts, "angry angry angry"), (*without.labels, 1))
    probe = encoder.batch(Examples(("angry angry angry",), (1,)))
    run, trials, delta = TrainingRun(rates=[0.05] * 1, batch_size=2, seed=0), 100, 1e-2

    def seen(examples: Examples, noise: float) -> float:
        model.load(before)
        train_privately(model, encoder, examples, run, mechanism(noise, rate=1.0, norm=1.0), ignore)
        with torch.no_grad():
            logits, _ = model.predict(probe)
        return float(logits[0, 1] - logits[0, 0])

    def found(noise: float) -> float:
        with_it = np.array([seen(canary, noise) for _ in range(trials)])
        without_it = np.array([seen(without, noise) for _ in range(trials)])
        threshold = np.median(np.concatenate([with_it[::2], without_it[::2]]))  # chosen on the one half
        hits, alarms = (with_it[1::2] > threshold).sum(), (without_it[1::2] > threshold).sum()
        count = trials // 2
        least_hits = beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
        most_alarms = beta.ppf(0.975, alarms + 1, count - alarms) if alarms < count else 1.0
        return max(0.0, math.log(max(least_hits - delta, 1e-12) / most_alarms))

    admitted = epsilon_of(((4.0, 1.0, 1),), delta)
    assert found(4.0) < admitted
    assert found(0.01) > admitted  # the control: the canary is there to be found, and the noise hides it
