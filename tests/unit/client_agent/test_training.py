import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.model import AdaptedModel
from client_agent.progress import Activity, Stopped
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.obfuscation import Obfuscation
from shelora.protocol import Stage
from tests.unit.client_agent.tiny import classifier, decoder


def ignore(_fraction: float) -> None:
    pass


def test_training_lowers_the_loss_and_learns_the_labels(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    before = evaluate(model, encoder, examples, ignore)
    train(model, encoder, examples, TrainingRun(60, 10, 0.02, seed=3), ignore)
    after = evaluate(model, encoder, examples, ignore)
    assert after.loss < before.loss / 2
    assert after.correct > 0.9 * after.count == 0.9 * len(examples)


def test_training_a_decoder_lowers_the_loss_of_next_tokens(
    llama_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    model = decoder(llama_folder)
    model.initialise(obfuscation)
    encoder = Encoder(model.tokenizer, 32, append_end=True)
    texts = Examples(examples.texts)
    before = evaluate(model, encoder, texts, ignore)
    train(model, encoder, texts, TrainingRun(40, 10, 0.05, seed=3), ignore)
    after = evaluate(model, encoder, texts, ignore)
    assert after.loss < before.loss
    assert before.correct < 0.1 * before.count < 0.7 * after.count < after.correct
    assert after.count == sum(len(row) - 1 for row in encoder.ids(texts.texts))


def test_training_changes_only_what_is_trainable(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    frozen = {n: p.detach().clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    train(model, encoder, examples, TrainingRun(3, 4, 0.01, seed=3), ignore)
    now = dict(model.module.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


def test_the_same_seed_trains_the_same_weights_whatever_the_global_state(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model = classifier(bert_folder)
        model.initialise(obfuscation)
        encoder = Encoder(model.tokenizer, 32, append_end=False)
        train(model, encoder, examples, TrainingRun(4, 4, 0.01, seed=3), ignore)
        results.append(model.weights())
    for name, factors in results[0].factors.items():
        np.testing.assert_array_equal(factors.B, results[1].factors[name].B)


@pytest.mark.parametrize("make", [classifier, decoder])
def test_gradients_of_small_parts_add_up_to_the_step_of_the_whole_batch(
    make: Callable[[Path], AdaptedModel],
    bert_folder: Path,
    llama_folder: Path,
    obfuscation: Obfuscation,
    examples: Examples,
) -> None:
    results = []
    for micro_batch in (0, 3):
        model = make(bert_folder if make is classifier else llama_folder)
        model.initialise(obfuscation)
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):  # drawn anew for every part
                module.p = 0.0
        encoder = Encoder(model.tokenizer, 32, append_end=make is decoder)
        outcome = train(model, encoder, examples, TrainingRun(3, 10, 0.01, 3, micro_batch), ignore)
        results.append((outcome.loss, model.weights()))
    (whole_loss, whole), (parts_loss, parts) = results
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    for name, factors in whole.factors.items():
        np.testing.assert_allclose(parts.factors[name].B, factors.B, atol=1e-4)


def test_training_leaves_the_global_random_state_alone(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    before = torch.random.get_rng_state()
    train(model, encoder, examples, TrainingRun(2, 4, 0.01, seed=3), ignore)
    assert torch.equal(before, torch.random.get_rng_state())


def test_stopped_work_ends_within_a_step(model: AdaptedModel, encoder: Encoder, examples: Examples) -> None:
    activity = Activity()
    steps = []

    def report(fraction: float) -> None:
        activity.report(Stage.TRAINING, fraction)
        steps.append(fraction)
        if len(steps) == 2:
            activity.stop()

    with pytest.raises(Stopped):
        train(model, encoder, examples, TrainingRun(50, 4, 0.01, seed=3), report)
    assert steps == [0.0, 1 / 50]
    assert not model.module.training


def test_a_loss_that_is_not_finite_is_refused_by_name(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    with torch.no_grad():
        model.trainable()[0].fill_(math.nan)
    with pytest.raises(DomainError, match="training loss is nan at step 1") as caught:
        train(model, encoder, examples, TrainingRun(2, 4, 0.01, seed=3), ignore)
    assert caught.value.reason is Reason.VALUE_NOT_FINITE


def test_evaluation_by_length_agrees_with_one_example_at_a_time(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    whole = evaluate(model, encoder, examples, ignore)
    single = [evaluate(model, encoder, examples.select([i]), ignore) for i in range(len(examples))]
    assert whole.correct == sum(one.correct for one in single)
    assert whole.loss == pytest.approx(sum(one.loss for one in single) / len(single), rel=1e-5)
