"""Families x tasks: each is checked as an agent does, trained a round, and compared with PEFT by itself.

What trains gives the logits of PEFT's own model with the saved adapter; what cannot train is refused in one sentence.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.config import DataConfig, LoraSettings
from client_agent.data import Examples
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.packing import packed, require_packable
from client_agent.preparation import rehearse
from client_agent.tasks.registry import task_of
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.lora.shards import LoraFactors
from shelora.obfuscation import Obfuscation
from tests.models.families import CONVOLUTIONS, DECODERS, ENCODERS, IMAGES, save
from tests.unit.client_agent.tiny import BAD, GOOD, LABELS

CASES = [
    *((kind, "causal-lm") for kind in DECODERS),
    *((kind, "chat") for kind in DECODERS),
    *((kind, "sequence-classification") for kind in (*ENCODERS, *DECODERS)),
    *((kind, "image-classification") for kind in IMAGES),
]
UNCLASSIFIED = {"cohere", "granite"}
"""Decoders that transformers has no classifier for."""
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Only the attention of these can be adapted."""
ATTENTION = ("q_proj", "v_proj")


def specification(kind: str, task: str) -> TrainingSpec:
    labels = LABELS if task_of(task).has_head else ()
    targets = ATTENTION if kind in EXPERTS else CONVOLUTIONS.get(kind, ("all-linear",))
    fields = {"base_model": kind, "task": task, "labels": labels, "target_modules": targets, "max_tokens": 32}
    return TrainingSpec.model_validate(fields)


def write_data(folder: Path, task: str) -> DataConfig:
    if task == "image-classification":
        rng = np.random.default_rng(0)
        for index in range(8):
            place = folder / "images" / LABELS[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")
        return DataConfig(train=folder / "images")
    rows: list[dict[str, Any]] = [
        {"text": f"the movie was {w}", "label": LABELS[w in GOOD]} for w in GOOD + BAD
    ]
    if task == "chat":
        rows = [{"prompt": "the movie was", "completion": word} for word in GOOD + BAD]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=folder / "data.jsonl")


def adapted(folder: Path, spec: TrainingSpec) -> AdaptedModel:
    model = AdaptedModel(
        load_checkpoint(str(folder), spec.task, spec.labels),
        task=spec.task,
        target_modules=spec.target_modules,
        lora=LoraSettings(rank=2, alpha=4),
        device=torch.device("cpu"),
    )
    model.initialise(Obfuscation(bytes(32), 1))
    return model


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_family_learns_a_task_and_its_round_is_right(kind: str, task: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model", chat=task == "chat")
    spec = specification(kind, task)
    if task == "sequence-classification" and kind in UNCLASSIFIED:
        with pytest.raises(
            DomainError, match=f"is a {kind} model and cannot be trained for {task}"
        ) as refused:
            adapted(folder, spec)
        assert "\n" not in refused.value.message
        return
    model = adapted(folder, spec)
    data = write_data(tmp_path, task)
    examples = model.task.read(data.train, data, spec)
    encoder = model.task.encoder(model.tokenizer, min(spec.max_tokens, model.most_positions), spec)
    model.task.survey(data.train, data, examples, encoder)
    batch = encoder.batch(examples)
    rehearse(model, encoder.batch(examples.select([0])))

    start = model.weights()
    trained = []
    for seed in (1, 2):
        model.load(start)
        outcome = train(
            model, encoder, examples, TrainingRun(rates=[0.02] * 3, batch_size=4, seed=seed), lambda _: None
        )
        assert np.isfinite(outcome.loss)
        trained.append(model.weights())
    model.load(mean_of_one_A(*trained))
    with torch.inference_mode():
        ours, _ = model.predict(batch)
    model.save_adapter(tmp_path / "adapter")
    base = load_checkpoint(str(folder), task, spec.labels).model
    with quiet(), torch.inference_mode():
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch.inputs).logits
        expected, _ = model.task.predictions(theirs, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    trained_on = model.module.get_base_model()
    for name, value in load_checkpoint(str(folder), task, spec.labels).model.named_buffers():
        assert torch.equal(trained_on.get_buffer(name), value), name
    moved = [float(np.abs(f.B).max()) for f in trained[0].factors.values()]
    assert max(moved) > 0


MIXING = {"bloom", "falcon", "opt"}
"""Decoders whose attention does not keep packed texts apart."""


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_texts_give_the_gradients_of_padded_ones_or_are_refused(kind: str, tmp_path: Path) -> None:
    model = adapted(save(kind, tmp_path / "model"), specification(kind, "causal-lm"))
    encoder = model.task.encoder(model.tokenizer, 32, specification(kind, "causal-lm"))
    batch = encoder.batch(Examples(("the movie was good", "bad", "awful movie")))
    if kind in MIXING:
        with pytest.raises(DomainError, match=r"leave training\.packing off"):
            require_packable(model, batch)
        return
    require_packable(model, batch)
    both = []
    for one in (batch, packed(batch)):
        model.module.zero_grad(set_to_none=True)
        logits, targets = model.predict(one)
        model.task.loss(logits, targets).backward()  # type: ignore[no-untyped-call]
        both.append([p.grad.clone() for p in model.trainable() if p.grad is not None])
    for expected, found in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)


def mean_of_one_A(first: Weights, second: Weights) -> Weights:
    """A sum of two clients' updates with the same A: the mean of B A, and of tensors."""
    factors = {
        name: LoraFactors(B=(f.B + second.factors[name].B) / 2, A=f.A) for name, f in first.factors.items()
    }
    tensors = {name: (value + second.tensors[name]) / 2 for name, value in first.tensors.items()}
    return Weights(factors=factors, tensors=tensors)


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_stacked_experts_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model")
    spec = TrainingSpec(base_model=kind, task="causal-lm", target_modules=("experts",))
    with pytest.raises(DomainError, match=r"only linear layers and plain .* and no experts") as refused:
        adapted(folder, spec)
    assert refused.value.reason is Reason.MODEL_INVALID


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_encoders_are_refused_for_language_modelling(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model")
    data = write_data(tmp_path, "causal-lm")
    spec = specification(kind, "causal-lm")

    def checked() -> None:
        model = adapted(folder, spec)
        encoder = model.task.encoder(model.tokenizer, 32, spec)
        rehearse(model, encoder.batch(model.task.read(data.train, data, spec).select([0])))

    with pytest.raises(DomainError) as refused:
        checked()
    assert refused.value.reason is Reason.MODEL_INVALID
    assert "\n" not in refused.value.message
