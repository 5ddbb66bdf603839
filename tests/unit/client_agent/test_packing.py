"""Texts of a batch end to end: what is computed stays the same, and models that mix them are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from client_agent.checkpoint import load_checkpoint
from client_agent.config import AgentConfig, LoraSettings, TrainingSettings
from client_agent.data import Examples
from client_agent.encoding import NOT_LEARNT, Batch, Encoder
from client_agent.model import AdaptedModel
from client_agent.packing import packed, require_packable
from client_agent.preparation import prepare
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import decoder, save_model

TEXTS = Examples(("the movie was good", "bad", "awful sad poor angry movie was the", "nice great"))
PACKED = TrainingSettings(packing=True)


@pytest.fixture
def language(llama_folder, obfuscation) -> AdaptedModel:
    model = decoder(llama_folder)
    model.initialise(obfuscation)
    return model


def encoder_of(model: AdaptedModel) -> Encoder:
    return Encoder(model.tokenizer, 32, append_end=True)


def gradients(model: AdaptedModel, batch) -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch, and its gradient by parameter."""
    model.module.zero_grad(set_to_none=True)
    logits, targets = model.predict(batch)
    loss = model.task.loss(logits, targets) / len(targets)
    loss.backward()
    return float(loss.item()), [parameter.grad.clone() for parameter in model.trainable()]


@contextmanager
def tokens_computed(model: AdaptedModel) -> Iterator[list[int]]:
    """Tokens, padding included, of each call of the network."""
    seen: list[int] = []
    hook = model.module.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_texts_lie_end_to_end_with_positions_of_their_own():
    batch = Batch(
        input_ids=torch.tensor([[2, 7, 9], [2, 8, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        targets=torch.tensor([], dtype=torch.int64),
    )
    together = packed(batch)
    assert together.input_ids.tolist() == [[2, 7, 9, 2, 8]]
    assert together.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert together.targets.tolist() == [[NOT_LEARNT, 7, 9, NOT_LEARNT, 8]]
    assert len(together) == 2
    assert together.only(1).input_ids.tolist() == [[2, 8]]
    answers = Batch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        targets=torch.tensor([[NOT_LEARNT, NOT_LEARNT, 9], [NOT_LEARNT, 8, NOT_LEARNT]]),
    )
    assert packed(answers).targets.tolist() == [[NOT_LEARNT, NOT_LEARNT, 9, NOT_LEARNT, 8]]


def test_loss_and_gradients_are_those_of_the_padded_batch(language):
    batch = encoder_of(language).batch(TEXTS)
    loss, expected = gradients(language, batch)
    found_loss, found = gradients(language, packed(batch))
    assert found_loss == pytest.approx(loss, rel=1e-4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    together = packed(batch)
    one_text = replace(together, position_ids=torch.arange(together.input_ids.shape[1])[None])
    _, mixed = gradients(language, one_text)
    assert not all(map(partial(torch.allclose, rtol=1e-2), mixed, expected)), "the control: as one text"


def test_training_computes_no_padding(language):
    encoder = encoder_of(language)
    count = sum(len(one.ids) for one in encoder.encoded(TEXTS))
    run = {"rates": [0.01] * 2, "batch_size": len(TEXTS), "seed": 1}
    with tokens_computed(language) as padded:
        train(language, encoder, TEXTS, TrainingRun(**run), lambda _: None)
    with tokens_computed(language) as seen:
        outcome = train(language, encoder, TEXTS, TrainingRun(**run, settings=PACKED), lambda _: None)
    assert seen == [count] * 2
    assert min(padded) > count
    assert outcome.loss > 0


def test_models_that_mix_packed_texts_are_refused(tmp_path):
    torch.manual_seed(1)
    config = BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0)
    folder = save_model(BloomForCausalLM(config), tmp_path)
    model = AdaptedModel(
        load_checkpoint(str(folder), "causal-lm", ()),
        task="causal-lm",
        target_modules=("query_key_value",),
        lora=LoraSettings(),
        device=torch.device("cpu"),
    )
    with pytest.raises(DomainError, match=r"training.packing: .*: leave training.packing off") as refused:
        require_packable(model, encoder_of(model).batch(TEXTS.select([0, 1])))
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    assert "\n" not in refused.value.message


def test_an_agent_tries_it_before_the_first_round(agent_folder: Path, llama_folder: Path):
    environment = {
        "SHELORA_AGENT__MODEL__PATH": str(llama_folder),
        "SHELORA_AGENT__TRAINING__PACKING": "true",
    }
    config = AgentConfig.load(agent_folder / "agent.yaml", environment)
    spec = TrainingSpec(base_model="b", task="causal-lm", target_modules=("q_proj",))
    assert prepare(config, spec).model.task.predicts_next
    config = AgentConfig.load(agent_folder / "agent.yaml", {"SHELORA_AGENT__TRAINING__PACKING": "true"})
    with pytest.raises(DomainError, match="packing: it is for language models, not for sequence-class"):
        prepare(config, TrainingSpec(base_model="b", labels=("bad", "good"), target_modules=("query",)))
    with pytest.raises(DomainError, match=r"without label_smoothing, .*packing"):
        AgentConfig.load(
            agent_folder / "agent.yaml",
            environment | {"SHELORA_AGENT__PRIVACY": "{epsilon: 8, delta: 1e-5}"},
        )
