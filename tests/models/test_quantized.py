"""Base models of 8 and 4 bits: `make test-models` installs what they need."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.model import AdaptedModel
from client_agent.precision import FULL, Precision, plain_weight
from client_agent.preparation import _check_causal
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import save_model

pytest.importorskip("bitsandbytes")

BITS = ("8bit", "4bit")
TYPES = (torch.float32, torch.bfloat16)
TEXTS = Examples(tuple(f"the movie was {word}" for word in ("good", "bad", "fine", "sad") for _ in range(4)))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose layers are large enough to be quantized."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return save_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("wide"))


def adapted(folder: Path, chosen: Precision) -> AdaptedModel:
    model = AdaptedModel(
        load_checkpoint(str(folder), "causal-lm", (), as_stored=not chosen.is_full),
        task="causal-lm",
        target_modules=("q_proj", "v_proj"),
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
        precision=chosen,
    )
    model.initialise(Obfuscation(bytes(range(32)), 1))
    return model


def gradient(model: AdaptedModel) -> np.ndarray:
    encoder = Encoder(model.tokenizer, 32, append_end=True)
    logits, targets = model.predict(encoder.batch(TEXTS))
    (model.task.loss(logits, targets) / len(targets)).backward()
    grads = [p.grad.numpy().ravel() for p in model.trainable() if p.grad is not None]
    model.module.zero_grad(set_to_none=True)
    return np.concatenate(grads)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_are_near_those_of_full_precision_and_stay_so_after_an_evaluation(
    wide_folder: Path, bits: str, dtype: torch.dtype
) -> None:
    """On processors with AVX512-BF16 bitsandbytes repacks 4-bit weights when it evaluates; no gradient came through."""
    whole, small = adapted(wide_folder, FULL), adapted(wide_folder, Precision(dtype, bits))
    expected, found = gradient(whole), gradient(small)
    assert expected @ found > 0.7 * np.linalg.norm(expected) * np.linalg.norm(found) > 0
    evaluate(small, Encoder(small.tokenizer, 32, append_end=True), TEXTS, lambda _: None)
    np.testing.assert_array_equal(gradient(small), found)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_base_is_the_same_base_and_trains(wide_folder: Path, bits: str) -> None:
    small, whole = adapted(wide_folder, Precision(torch.bfloat16, bits)), adapted(wide_folder, FULL)
    assert small.base == whole.base
    assert {p.dtype for p in small.trainable()} == {torch.float32}
    encoder = Encoder(small.tokenizer, 32, append_end=True)
    before = evaluate(small, encoder, TEXTS, lambda _: None).loss
    train(small, encoder, TEXTS, TrainingRun(rates=[0.05] * 30, batch_size=8, seed=3), lambda _: None)
    assert evaluate(small, encoder, TEXTS, lambda _: None).loss < 0.8 * before


@pytest.mark.parametrize("bits", BITS)
def test_sums_of_weights_are_those_of_the_numbers_that_the_bits_stand_for(
    wide_folder: Path, bits: str
) -> None:
    small, whole = adapted(wide_folder, Precision(quantization=bits)), adapted(wide_folder, FULL)
    evaluate(small, Encoder(small.tokenizer, 32, append_end=True), TEXTS, lambda _: None)
    for name, sums in whole.base_weight_sums().items():
        np.testing.assert_allclose(small.base_weight_sums()[name], sums, rtol=0.2)
        first, second = (plain_weight(m.layers[name].get_base_layer()) for m in (whole, small))
        assert (first - second).norm() < 0.15 * first.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_decoder_of_few_bits_is_not_taken_for_an_encoder(wide_folder: Path, bits: str) -> None:
    model = adapted(wide_folder, Precision(torch.bfloat16, bits))
    _check_causal(model, Encoder(model.tokenizer, 32, append_end=True).batch(TEXTS))


def test_the_adapter_of_a_quantized_base_loads_on_the_whole_one(wide_folder: Path, tmp_path: Path) -> None:
    small = adapted(wide_folder, Precision(torch.bfloat16, "4bit"))
    encoder = Encoder(small.tokenizer, 32, append_end=True)
    train(small, encoder, TEXTS, TrainingRun(rates=[0.02] * 5, batch_size=8, seed=3), lambda _: None)
    small.save_adapter(tmp_path / "adapter")
    whole = adapted(wide_folder, FULL)
    whole.load(small.weights())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(wide_folder), tmp_path / "adapter"
    )
    ids = encoder.batch(TEXTS).input_ids
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, whole.logits(ids), rtol=1e-4, atol=1e-4)


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = GPT2Config(
        vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    folder = save_model(GPT2LMHeadModel(small), tmp_path)
    with pytest.raises(DomainError, match=r"model.quantization = 4bit: the model has no linear layer"):
        AdaptedModel(
            load_checkpoint(str(folder), "causal-lm", ()),
            task="causal-lm",
            target_modules=("c_attn",),
            lora=LoraSettings(rank=4, alpha=8),
            device=torch.device("cpu"),
            precision=Precision(quantization="4bit"),
        )
