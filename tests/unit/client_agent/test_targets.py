"""Which modules a federation means: resolved the same at every agent, or refused in one sentence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.model import AdaptedModel
from client_agent.targets import WHOLE, Narrowed, adaptable_layers
from shelora.errors import DomainError
from shelora.federation import TrainingSpec
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import LABELS, save_model

TEXT = torch.tensor([[2, 5, 6, 7, 8, 3]])


def adapted(
    folder: Path,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    narrowed: Narrowed = WHOLE,
    lora: LoraSettings | None = None,
) -> AdaptedModel:
    made = AdaptedModel(
        load_checkpoint(str(folder), "causal-lm", ()),
        task="causal-lm",
        target_modules=targets,
        lora=lora or LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
        narrowed=narrowed,
    )
    made.initialise(Obfuscation(bytes(range(32)), 1))
    return made


def names(model: AdaptedModel) -> list[str]:
    return [matrix.name for matrix in model.matrices]


def moved(model: AdaptedModel) -> AdaptedModel:
    """With factors and tensors that are not those it starts with."""
    rng = np.random.default_rng(1)
    weights = model.weights()
    factors = {
        n: replace(f, B=rng.normal(size=f.B.shape).astype(np.float32)) for n, f in weights.factors.items()
    }
    tensors = {n: value + 0.1 for n, value in weights.tensors.items()}
    model.load(replace(weights, factors=factors, tensors=tensors))
    return model


def test_all_linear_is_every_linear_layer_but_the_output(llama_folder: Path) -> None:
    model = adapted(llama_folder, ("all-linear",))
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted({name.rpartition(".")[2] for name in names(model)}) == sorted(parts)
    assert len(names(model)) == 2 * 7
    assert adaptable_layers(load_checkpoint(str(llama_folder), "causal-lm", ())) == dict.fromkeys(parts, 2)


def test_all_linear_leaves_a_classifiers_head_out(bert_folder: Path) -> None:
    model = AdaptedModel(
        load_checkpoint(str(bert_folder), "sequence-classification", LABELS),
        task="sequence-classification",
        target_modules=("all-linear",),
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )
    assert all(name.startswith("bert.") for name in names(model))
    assert len(names(model)) == 2 * 6 + 1  # of two layers, and the pooler
    assert {tensor.name.partition(".")[0] for tensor in model.tensors} == {"classifier"}


def test_layers_and_a_pattern_narrow_what_is_adapted(llama_folder: Path) -> None:
    second = adapted(llama_folder, narrowed=Narrowed(layers=[1]))
    assert names(second) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    some = adapted(llama_folder, ("all-linear",), Narrowed(pattern=r".*\.(up|down)_proj", layers=[0]))
    assert names(some) == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("targets", "narrowed", "said"),
    [
        (("q_proj",), Narrowed(layers=[7]), "leave none of the modules"),
        (("q_proj",), Narrowed(pattern="query"), "leave none of the modules"),
        (("q_proj",), Narrowed(pattern="(a|a)*b("), "is none"),
        (("query",), Narrowed(), "no such module; what can be adapted is q_proj"),
        (("norm",), Narrowed(), "only linear layers and plain convolutions"),
        (("q_proj",), Narrowed(saved=["head"]), "modules_to_save name 'head', and the model has no such"),
        (("q_proj",), Narrowed(saved=["rotary_emb"]), "has nothing to train"),
    ],
)
def test_what_matches_nothing_or_cannot_be_carried_is_refused(
    llama_folder: Path, targets: tuple[str, ...], narrowed: Narrowed, said: str
) -> None:
    with pytest.raises(DomainError, match=said.replace("(", r"\(")) as caught:
        adapted(llama_folder, targets, narrowed)
    assert len(caught.value.message.splitlines()) == 1


def test_a_pattern_that_takes_exponential_time_is_refused(llama_folder: Path) -> None:
    """A coordinator could stop every agent with it."""
    with pytest.raises(DomainError, match="takes too long to match"):
        adapted(llama_folder, narrowed=Narrowed(pattern=r"(.|..)*[!?]"))


def test_modules_to_save_start_as_they_are_in_the_base_model_and_are_saved_with_the_adapter(
    llama_folder: Path, tmp_path: Path
) -> None:
    model = adapted(llama_folder, narrowed=Narrowed(saved=["model.norm", "lm_head"]))
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert [tensor.name for tensor in model.tensors] == ["model.norm.weight", "lm_head.weight"]
    for name, value in model.weights().tensors.items():
        np.testing.assert_array_equal(value, base.get_parameter(name).detach().numpy())
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(TEXT), base(input_ids=TEXT).logits)
        expected = moved(model).logits(TEXT)
        model.save_adapter(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=TEXT).logits, expected)


def test_weights_that_two_modules_share_are_not_trained_whole(llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.config.tie_word_embeddings = True
    tied = LlamaForCausalLM(model.config)
    with pytest.raises(DomainError, match="another module of this model shares"):
        adapted(save_model(tied, tmp_path), narrowed=Narrowed(saved=["embed_tokens"]))


def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank_and_load_elsewhere(
    llama_folder: Path, tmp_path: Path
) -> None:
    lora = LoraSettings(rank=4, alpha=8, rslora=True)
    model = moved(adapted(llama_folder, ("all-linear",), Narrowed(layers=[1]), lora))
    assert (model.scaling, LoraSettings(rank=4, alpha=8).scaling) == (4.0, 2.0)
    with torch.inference_mode():
        for beside in (False, True):
            if beside:
                weights = model.weights()
                first = next(iter(weights.factors))
                model.load(replace(weights, frozen={first: weights.factors[first]}))
            expected = model.logits(TEXT)
            model.save_adapter(tmp_path / f"adapter{beside}")
            base = AutoModelForCausalLM.from_pretrained(llama_folder)
            loaded = PeftModel.from_pretrained(base, tmp_path / f"adapter{beside}")
            torch.testing.assert_close(loaded(input_ids=TEXT).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_specification_says_what_is_wrong_with_its_modules() -> None:
    fields = {"base_model": "tiny", "labels": ("a", "b")}
    assert TrainingSpec.model_validate(fields | {"target_modules": "all-linear"}).target_modules == (
        "all-linear",
    )
    with pytest.raises(ValueError, match="all-linear stands alone"):
        TrainingSpec.model_validate(fields | {"target_modules": ["all-linear", "q_proj"]})
    with pytest.raises(ValueError, match="is not a regular expression"):
        TrainingSpec.model_validate(fields | {"target_pattern": "("})
