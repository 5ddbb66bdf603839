import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, TrainingArguments

from client_agent.config import TrainingSettings
from client_agent.data import Examples
from client_agent.drawing import batches
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.progress import Activity, Stopped
from client_agent.training import USUAL, TrainingRun, _arguments, train
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
    train(model, encoder, examples, TrainingRun(rates=[0.02] * 60, batch_size=10, seed=3), ignore)
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
    train(model, encoder, texts, TrainingRun(rates=[0.05] * 40, batch_size=10, seed=3), ignore)
    after = evaluate(model, encoder, texts, ignore)
    assert after.loss < before.loss
    assert before.correct < 0.1 * before.count < 0.7 * after.count < after.correct
    assert after.count == sum(len(row) - 1 for row in encoder.ids(texts.texts))


def test_training_changes_only_what_is_trainable(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    frozen = {n: p.detach().clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    train(model, encoder, examples, TrainingRun(rates=[0.01] * 3, batch_size=4, seed=3), ignore)
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
        train(model, encoder, examples, TrainingRun(rates=[0.01] * 4, batch_size=4, seed=3), ignore)
        results.append(model.weights())
    for name, factors in results[0].factors.items():
        np.testing.assert_array_equal(factors.B, results[1].factors[name].B)


def test_two_agents_of_one_process_train_what_each_trains_alone_and_who_waits_can_be_stopped(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold(_fraction: float) -> None:
        began.set()
        assert go_on.wait(60)

    def stop(_fraction: float) -> None:
        raise Stopped

    def trained(model: AdaptedModel, report: Callable[[float], None]) -> Weights:
        encoder = Encoder(model.tokenizer, 32, append_end=False)
        train(model, encoder, examples, TrainingRun(rates=[0.01] * 4, batch_size=4, seed=3), report)
        return model.weights()

    models = [classifier(bert_folder) for _ in range(4)]
    for model in models:
        model.initialise(obfuscation)
    alone = trained(models[0], ignore)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(trained, models[1], hold)
        assert began.wait(60)
        with pytest.raises(Stopped):
            trained(models[2], stop)
        second = pool.submit(trained, models[3], ignore)
        go_on.set()
        both = [first.result(60), second.result(60)]
    for weights in both:
        for name, factors in alone.factors.items():
            np.testing.assert_array_equal(weights.factors[name].B, factors.B)


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
        outcome = train(
            model,
            encoder,
            examples,
            TrainingRun(rates=[0.01] * 3, batch_size=10, seed=3, micro_batch=micro_batch),
            ignore,
        )
        results.append((outcome.loss, model.weights()))
    (whole_loss, whole), (parts_loss, parts) = results
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    for name, factors in whole.factors.items():
        np.testing.assert_allclose(parts.factors[name].B, factors.B, atol=1e-4)


def test_training_leaves_the_global_random_state_alone(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    before = torch.random.get_rng_state()
    train(model, encoder, examples, TrainingRun(rates=[0.01] * 2, batch_size=4, seed=3), ignore)
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
        train(model, encoder, examples, TrainingRun(rates=[0.01] * 50, batch_size=4, seed=3), report)
    assert steps == [0.0, 1 / 50]
    assert not model.module.training


def test_a_loss_that_is_not_finite_is_refused_by_name(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    with torch.no_grad():
        model.trainable()[0].fill_(math.nan)
    with pytest.raises(DomainError, match="training loss is nan at step 1") as caught:
        train(model, encoder, examples, TrainingRun(rates=[0.01] * 2, batch_size=4, seed=3), ignore)
    assert caught.value.reason is Reason.VALUE_NOT_FINITE


def test_evaluation_by_length_agrees_with_one_example_at_a_time(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    whole = evaluate(model, encoder, examples, ignore)
    single = [evaluate(model, encoder, examples.select([i]), ignore) for i in range(len(examples))]
    assert whole.correct == sum(one.correct for one in single)
    assert whole.loss == pytest.approx(sum(one.loss for one in single) / len(single), rel=1e-5)


@pytest.mark.parametrize("count", [1, 97, 150])
def test_how_far_an_evaluation_is_tells_no_number_of_examples(
    model: AdaptedModel, encoder: Encoder, examples: Examples, count: int
) -> None:
    """Attack: 64 / 150 in a heartbeat says 150, which no agent of `complete` reports."""
    told: list[float] = []
    some = examples.select([i % len(examples) for i in range(count)])
    assert evaluate(model, encoder, some, told.append).count == count
    assert set(told) <= {0.0, 0.25, 0.5, 0.75}
    assert told == sorted(told)
    assert len(told) == -(-count // 32)


def plain_loop(
    model: AdaptedModel, encoder: Encoder, examples: Examples, run: TrainingRun
) -> tuple[float, Weights]:
    """What every tutorial writes: the control for the loop of transformers."""
    optimizer = torch.optim.AdamW(model.trainable(), lr=1.0, weight_decay=0.0)
    losses = []
    model.module.train()
    torch.manual_seed(run.seed)
    for rate, chosen in zip(
        run.rates, batches(len(examples), run.batch_size, run.steps, run.seed), strict=True
    ):
        optimizer.param_groups[0]["lr"] = rate
        logits, targets = model.predict(encoder.batch(examples.select(chosen)))
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
        optimizer.step()
        losses.append(float(loss.item()))
    model.module.eval()
    return sum(losses) / len(losses), model.weights()


def same(first: Weights, second: Weights) -> bool:
    return all(
        np.array_equal(factors.B, second.factors[name].B)
        and np.array_equal(factors.A, second.factors[name].A)
        for name, factors in first.factors.items()
    ) and all(np.array_equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_the_loop_of_transformers_trains_what_a_plain_loop_trains_bit_by_bit(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    start, run = model.weights(), TrainingRun(rates=[0.0, 0.01, 0.02, 0.005], batch_size=8, seed=3)
    outcome = train(model, encoder, examples, run, ignore)
    trained = model.weights()
    model.load(start)
    loss, expected = plain_loop(model, encoder, examples, run)
    assert outcome.loss == loss
    assert same(trained, expected)
    model.load(start)
    train(model, encoder, examples, run, ignore)
    assert same(trained, model.weights())


def test_work_ends_between_two_parts_of_a_step(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    told: list[float] = []

    def report(fraction: float) -> None:
        told.append(fraction)
        if len(told) == 3:
            raise Stopped

    start = model.weights()
    with pytest.raises(Stopped):
        train(model, encoder, examples, TrainingRun(rates=[0.1], batch_size=8, seed=3, micro_batch=2), report)
    assert told == [0.0, 0.25, 0.5]
    assert same(start, model.weights())
    assert all(parameter.grad is None for parameter in model.trainable())


def test_training_leaves_the_process_and_the_model_as_they_were(
    model: AdaptedModel, encoder: Encoder, examples: Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    model.configuration.use_cache = True
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    train(model, encoder, examples, TrainingRun(rates=[0.01], batch_size=4, seed=3), ignore)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert model.configuration.use_cache is True
    assert not any(capsys.readouterr())


def test_gradient_checkpointing_trains_the_same(
    llama_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    results = []
    for checkpointing in (False, True):
        model = decoder(llama_folder)
        model.initialise(obfuscation)
        encoder = Encoder(model.tokenizer, 32, append_end=True)
        settings = TrainingSettings(gradient_checkpointing=checkpointing)
        run = TrainingRun(rates=[0.01] * 3, batch_size=4, seed=3, settings=settings)
        train(model, encoder, Examples(examples.texts), run, ignore)
        results.append(model.weights())
        assert (
            any(getattr(m, "gradient_checkpointing", False) for m in model.module.modules()) == checkpointing
        )
    for name, factors in results[0].factors.items():
        np.testing.assert_allclose(factors.B, results[1].factors[name].B, atol=1e-5)


def test_a_machine_with_two_gpus_trains_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2  # over which it would spread each batch
    for device in ("cuda", "cpu", "mps"):
        assert _arguments(USUAL, 1, str(tmp_path), torch.device(device)).n_gpu <= 1


def test_every_setting_has_its_effect(model: AdaptedModel, encoder: Encoder, examples: Examples) -> None:
    start = model.weights()
    found = {}
    for name, changed in {
        "plain": {},
        "fused": {"optimizer": "adamw_torch_fused"},
        "decayed": {"weight_decay": 0.5},
        "clipped": {"max_gradient_norm": 1e-9},
        "smoothed": {"label_smoothing": 0.3},
        "sgd": {"optimizer": "sgd"},
    }.items():
        model.load(start)
        run = TrainingRun(rates=[0.01] * 2, batch_size=4, seed=3, settings=TrainingSettings(**changed))
        train(model, encoder, examples, run, ignore)
        found[name] = model.weights()
    for name, weights in found.items():
        assert same(weights, found["plain"]) == (name == "plain"), name
    for name, factors in found["plain"].factors.items():
        np.testing.assert_allclose(found["fused"].factors[name].B, factors.B, atol=1e-5)
        moved = found["sgd"].factors[name].B - start.factors[name].B
        assert 0 < np.linalg.norm(moved) <= 0.02 * (1 + 1e-5)
    tensor = next(iter(start.tensors))
    assert np.linalg.norm(found["decayed"].tensors[tensor]) < np.linalg.norm(found["plain"].tensors[tensor])


def test_label_smoothing_is_of_the_loss_that_is_trained_alone(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    batch = encoder.batch(examples)
    logits, targets = model.predict(batch)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.4).item()
    run = TrainingRun(
        rates=[0.0], batch_size=len(examples), seed=3, settings=TrainingSettings(label_smoothing=0.4)
    )
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert train(model, encoder, examples, run, ignore).loss == pytest.approx(expected, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, targets).item()
    assert evaluate(model, encoder, examples, ignore).loss == pytest.approx(plain, rel=1e-5)


def test_evaluation_by_window_agrees_with_one_of_everything(
    model: AdaptedModel, encoder: Encoder, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, encoder, examples, ignore)
    monkeypatch.setattr(encoder, "at_once", 7)
    told: list[float] = []
    parts = evaluate(model, encoder, examples, told.append)
    assert (parts.count, parts.correct) == (whole.count, whole.correct)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert told == [0.0, 0.25, 0.5], "7 and 14 of 20, in quarters"


def test_pairs_are_framed_and_told_apart_as_the_tokenizer_does(bert_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoder = Encoder(tokenizer, 8, append_end=False)
    pairs = Examples(("good", "the movie was good the movie"), (1, 0), ("bad movie", "was bad"))
    batch = encoder.batch(pairs)
    assert tokenizer.decode(batch.input_ids[0]) == "[CLS] good [SEP] bad movie [SEP] [PAD] [PAD]"
    assert (
        tokenizer.decode(batch.input_ids[1]) == "[CLS] the movie was [SEP] was bad [SEP]"
    )  # the longer is cut
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert encoder.measure(pairs.texts, pairs.seconds) == ([6, 11], 16)
    with pytest.raises(
        DomainError, match="max_tokens of at least 5"
    ):  # a text alone has room, a pair has none
        Encoder(tokenizer, 4, append_end=False).measure(pairs.texts, pairs.seconds)
    model = classifier(bert_folder)
    with torch.inference_mode():
        expected = model.module(**tokenizer(["good"], ["bad movie"], return_tensors="pt")).logits
        torch.testing.assert_close(model.predict(batch.only(0))[0], expected, rtol=1e-4, atol=1e-7)
        blind = replace(batch.only(0), token_type_ids=None)
        assert not torch.allclose(model.predict(blind)[0], expected, rtol=1e-3, atol=1e-6)
