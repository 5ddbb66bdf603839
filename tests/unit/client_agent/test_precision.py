"""Numbers of the base model: what is lowered, what stays float32, what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from client_agent import precision
from client_agent.checkpoint import load_checkpoint
from client_agent.config import AgentConfig, LoraSettings, ModelConfig, TrainingSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.footprint import Setting, alternatives, blueprint
from client_agent.model import AdaptedModel
from client_agent.precision import FULL, Precision, choose_precision
from client_agent.preparation import prepare
from client_agent.targets import Narrowed
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import LABELS

BFLOAT16 = Precision(torch.bfloat16)
CPU = torch.device("cpu")


def adapted(folder: Path, chosen: Precision, obfuscation: Obfuscation, **more: object) -> AdaptedModel:
    model = AdaptedModel(
        load_checkpoint(str(folder), "sequence-classification", LABELS, as_stored=not chosen.is_full),
        task="sequence-classification",
        target_modules=("query", "value"),
        lora=LoraSettings(rank=4, alpha=8),
        device=CPU,
        precision=chosen,
        **more,
    )
    model.initialise(obfuscation)
    return model


def trained(model: AdaptedModel, examples: Examples) -> tuple[float, np.ndarray]:
    encoder = Encoder(model.tokenizer, 32, append_end=False)
    outcome = train(
        model, encoder, examples, TrainingRun(rates=[0.01] * 6, batch_size=8, seed=3), lambda _: None
    )
    return outcome.loss, np.concatenate([f.B.ravel() for f in model.weights().factors.values()])


def test_a_base_of_16_bits_trains_float32_factors_that_are_close_to_those_of_32(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    whole, half = (adapted(bert_folder, chosen, obfuscation) for chosen in (FULL, BFLOAT16))
    assert {p.dtype for p in half.trainable()} == {torch.float32}
    frozen = {p.dtype for p in half.module.parameters() if not p.requires_grad}
    assert torch.bfloat16 in frozen
    assert half.layers[half.matrices[0].name].get_base_layer().weight.dtype == torch.bfloat16
    (loss, B), (other_loss, other_B) = trained(whole, examples), trained(half, examples)
    assert other_loss == pytest.approx(loss, rel=0.1)
    assert B @ other_B > 0.7 * np.linalg.norm(B) * np.linalg.norm(other_B)


def test_agents_of_other_precision_have_the_same_base(
    bert_folder: Path, obfuscation: Obfuscation, tmp_path: Path
) -> None:
    assert adapted(bert_folder, BFLOAT16, obfuscation).base == adapted(bert_folder, FULL, obfuscation).base
    stored = tmp_path / "stored"
    stored.mkdir()
    for file in bert_folder.iterdir():
        (stored / file.name).write_bytes(file.read_bytes())
    weights = {name: value.bfloat16() for name, value in load_file(stored / "model.safetensors").items()}
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    half = adapted(stored, BFLOAT16, obfuscation)
    assert half.base == adapted(stored, FULL, obfuscation).base
    assert half.base != adapted(bert_folder, FULL, obfuscation).base


def test_a_module_that_is_trained_whole_stays_float32_amid_16_bits(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    saved = Narrowed(saved=["encoder.layer.0.output.LayerNorm"])
    model = adapted(bert_folder, BFLOAT16, obfuscation, narrowed=saved)
    before = model.weights().tensors
    loss, _ = trained(model, examples)
    moved = [
        name for name, value in model.weights().tensors.items() if not np.array_equal(value, before[name])
    ]
    assert any("LayerNorm" in name for name in moved)
    assert {p.dtype for p in model.trainable()} == {torch.float32}
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("model", "optimizer", "device", "words"),
    [
        ({"dtype": "float16"}, "adamw_torch", "cpu", "model.dtype = float16: .* take bfloat16"),
        (
            {"quantization": "4bit"},
            "adamw_torch",
            "cpu",
            "model.quantization = 4bit: needs the package bitsandbytes",
        ),
        ({}, "adamw_8bit", "cpu", "training.optimizer = adamw_8bit: needs the package bitsandbytes"),
    ],
)
def test_what_this_device_cannot_do_is_refused_with_the_field_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, model: dict, optimizer: str, device: str, words: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DomainError, match=words) as caught:
        choose_precision(
            ModelConfig(path="x", **model), TrainingSettings(optimizer=optimizer), torch.device(device)
        )
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert "\n" not in caught.value.message


def test_8_bit_optimizers_and_quantization_are_refused_where_they_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "_require_bitsandbytes", lambda *_: None)
    with pytest.raises(DomainError, match="adamw_8bit: runs only on CUDA devices: take adamw_torch"):
        choose_precision(ModelConfig(path="x"), TrainingSettings(optimizer="adamw_8bit"), CPU)
    with pytest.raises(DomainError, match="4bit: does not run on mps: take none"):
        choose_precision(ModelConfig(path="x", quantization="4bit"), TrainingSettings(), torch.device("mps"))


def test_privacy_goes_with_float32_alone(agent_folder: Path) -> None:
    environment = {
        "SHELORA_AGENT__PRIVACY": "{epsilon: 8, delta: 1e-5}",
        "SHELORA_AGENT__MODEL__DTYPE": "bfloat16",
    }
    with pytest.raises(DomainError, match=r"model.dtype float32"):
        AgentConfig.load(agent_folder / "agent.yaml", environment)


def test_an_agent_prepares_in_the_precision_of_its_file(agent_folder: Path) -> None:
    config = AgentConfig.load(agent_folder / "agent.yaml", {"SHELORA_AGENT__MODEL__DTYPE": "bfloat16"})
    ready = prepare(config, TrainingSpec(base_model="tiny", labels=LABELS))
    assert ready.model.precision == BFLOAT16


def test_sizes_are_known_without_loading_and_agree_with_the_model(
    bert_folder: Path, obfuscation: Obfuscation
) -> None:
    spec = TrainingSpec(base_model="tiny", labels=LABELS, max_tokens=32)
    sizes = blueprint(str(bert_folder), spec, 4)
    model = adapted(bert_folder, FULL, obfuscation)
    frozen = sum(p.numel() for name, p in model.module.named_parameters() if "original_module" not in name)
    assert sizes.linear + sizes.other + sizes.whole + sizes.factors == pytest.approx(frozen, rel=0.01)
    assert sizes.factors + sizes.whole == pytest.approx(
        model.trainable_count, rel=0.3
    )  # the pooler is trained, too
    assert sizes.kept == pytest.approx(kept(model, 32), rel=0.1)


def kept(model: AdaptedModel, tokens: int) -> int:
    """Bytes that the real model keeps for the gradients of one example."""
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.module(input_ids=torch.ones(1, tokens, dtype=torch.int64))
    del result
    model.module.eval()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_each_alternative_takes_less_memory_than_the_one_before(bert_folder: Path) -> None:
    spec = TrainingSpec(base_model="tiny", labels=LABELS, max_tokens=32)
    sizes = blueprint(str(bert_folder), spec, 4)
    now = Setting(dtype="float32", quantization="none", checkpointing=False, micro_batch=16)
    needs = [sizes.needed(setting) for setting in (now, *alternatives(now))]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs)
