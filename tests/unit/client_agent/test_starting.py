"""Training that goes on from an adapter, or from the classifier of the base model."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.config import AgentConfig, LoraSettings
from client_agent.inspection import inspect
from client_agent.learner import Learner
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.preparation import load_model
from client_agent.starting import CONFIG, WEIGHTS, Start, read_adapter
from client_agent.state import AgentState
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.shards import LoraFactors
from tests.unit.client_agent.tiny import LABELS, bert_config, classifier, decoder, save_tokenizer

IDS = torch.tensor([[2, 14, 15, 16, 4]])
FILMS = TrainingSpec(base_model="tiny", labels=LABELS)


def stirred(model, seed=0) -> Weights:
    """Other weights than it starts with."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    factors = {
        m.name: LoraFactors(B=draw(m.out_features, model.rank), A=draw(model.rank, m.in_features))
        for m in model.matrices
    }
    return Weights(factors=factors, tensors={t.name: draw(*t.shape) for t in model.tensors})


def decoder_from(folder, start=None, rank=4):
    return AdaptedModel(
        load_checkpoint(str(folder), "causal-lm", ()),
        task="causal-lm",
        target_modules=("q_proj", "v_proj"),
        lora=LoraSettings(rank=rank, alpha=8),
        device=torch.device("cpu"),
        **({} if start is None else {"start": start}),
    )


@pytest.fixture
def adapter(llama_folder, tmp_path):
    """A folder with a trained adapter of rank 4, and the logits it gives."""
    model = decoder(llama_folder)
    model.load(stirred(model))
    model.save_adapter(tmp_path / "adapter")
    with torch.inference_mode():
        return tmp_path / "adapter", model.logits(IDS)


def test_training_starts_where_the_adapter_is_and_the_result_holds_both(
    llama_folder, adapter, obfuscation, tmp_path
):
    folder, logits = adapter
    model = decoder_from(llama_folder, read_adapter(folder), rank=2)
    model.initialise(obfuscation)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(IDS), logits, atol=1e-4, rtol=1e-4)
        plain = decoder(llama_folder)
        plain.initialise(obfuscation)
        assert (plain.logits(IDS) - logits).abs().max() > 0.01, "the adapter matters"
        model.load(stirred(model, seed=1))
        trained = model.logits(IDS)
    assert (trained - logits).abs().max() > 0.01
    model.save_adapter(tmp_path / "result")
    with quiet(), torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(str(llama_folder))
        found = PeftModel.from_pretrained(base, str(tmp_path / "result"))(IDS).logits
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
    assert read_adapter(tmp_path / "result").factors.keys() == model.start.factors.keys()


def test_agents_that_start_alike_have_the_same_digest(llama_folder, adapter):
    folder, _ = adapter
    start = read_adapter(folder)
    model, plain = decoder_from(llama_folder, start), decoder(llama_folder)
    assert model.base.start == read_adapter(folder).digest != b""
    assert plain.base.start == b""
    assert model.base.weights == plain.base.weights
    assert model.base.hex() != plain.base.hex()
    name = next(iter(start.factors))
    pair = start.factors[name]
    other = Start({**start.factors, name: LoraFactors(B=pair.B, A=pair.A + np.float32(1e-6))}, {})
    assert other.digest != start.digest


def test_the_trained_head_of_an_adapter_is_where_a_classifier_starts(bert_folder, tmp_path, obfuscation):
    before = classifier(bert_folder)
    before.load(stirred(before))
    before.save_adapter(tmp_path / "adapter")
    model = AdaptedModel(
        load_checkpoint(str(bert_folder), "sequence-classification", LABELS),
        task="sequence-classification",
        target_modules=("query", "value"),
        lora=LoraSettings(rank=2, alpha=8),
        device=torch.device("cpu"),
        start=read_adapter(tmp_path / "adapter"),
    )
    model.initialise(obfuscation)
    for name, value in stirred(before).tensors.items():
        np.testing.assert_array_equal(model.weights().tensors[name], value)
    assert any("trained values of classifier.bias" in note for note in model.notes)


@pytest.fixture
def bert_classifier(tmp_path):
    torch.manual_seed(2)
    folder = tmp_path / "classifier"
    config = bert_config()
    config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    with quiet():
        BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def configured(agent_folder, model, **fields):
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    changed = config.model.model_copy(update={"path": str(model), **fields})
    return config.model_copy(update={"model": changed})


def test_a_federation_goes_on_from_the_classifier_of_the_base_model(
    agent_folder, bert_classifier, obfuscation
):
    kept = load_model(configured(agent_folder, bert_classifier, head="base"), FILMS)
    anew = load_model(configured(agent_folder, bert_classifier), FILMS)
    trained = load_checkpoint(str(bert_classifier), "sequence-classification", LABELS).model.classifier
    for model in (kept, anew):
        model.initialise(obfuscation)
    weights = trained.weight.detach().numpy()
    np.testing.assert_array_equal(kept.weights().tensors["classifier.weight"], weights)
    assert np.abs(anew.weights().tensors["classifier.weight"] - weights).max() > 1e-3
    assert kept.base.start != anew.base.start == b""
    assert any("model.head: base starts from what it is" in note for note in anew.notes)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("good", "bad"), "knows the labels bad, good, in this order"),
        (("a", "b", "c"), "no classifier of as many"),
    ],
)
def test_a_classifier_for_other_labels_is_refused(agent_folder, bert_classifier, labels, words):
    spec = FILMS.model_copy(update={"labels": labels})
    with pytest.raises(DomainError, match=words) as refusal:
        load_model(configured(agent_folder, bert_classifier, head="base"), spec)
    assert refusal.value.reason is Reason.MODEL_INVALID


def test_a_base_model_without_a_classifier_has_none_to_start_from(agent_folder, bert_folder):
    with pytest.raises(DomainError, match=r"model\.head: base, and the base model has no classifier"):
        load_model(configured(agent_folder, bert_folder, head="base"), FILMS)


def test_an_adapter_whose_head_knows_other_labels_is_refused(agent_folder, bert_folder, tmp_path):
    model = classifier(bert_folder)
    model.save_adapter(tmp_path / "adapter")
    spec = FILMS.model_copy(update={"labels": ("good", "bad")})
    with pytest.raises(DomainError, match="knows the labels bad, good, in this order"):
        load_model(configured(agent_folder, bert_folder, adapter=tmp_path / "adapter"), spec)


def with_config(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_arrays(folder, change):
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(change(dict(arrays)), folder / WEIGHTS)


def no_number(arrays):
    name = next(iter(arrays))
    return {**arrays, name: np.full_like(arrays[name], np.nan)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json that can be read"),
        (lambda f: (f / CONFIG).write_text("{"), "that is no LoRA adapter's"),
        (lambda f: with_config(f, r=None), "that is no LoRA adapter's: r"),
        (lambda f: with_config(f, peft_type="IA3"), "has peft_type IA3; only plain LoRA"),
        (lambda f: with_config(f, use_dora=True), "has use_dora"),
        (lambda f: with_config(f, rank_pattern={"q": 3}), "has rank_pattern"),
        (lambda f: with_config(f, r=3), "that are not of rank 3"),
        (lambda f: (f / WEIGHTS).unlink(), "save the adapter with safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "cannot be read"),
        (lambda f: with_arrays(f, no_number), "that are not finite"),
        (lambda f: with_arrays(f, lambda a: dict(list(a.items())[1:])), "holds one factor of"),
        (
            lambda f: with_arrays(
                f, lambda a: {**a, "base_model.model.x.lora_embedding_A": np.ones((2, 2), np.float32)}
            ),
            "only factors of linear layers",
        ),
    ],
)
def test_what_is_no_plain_adapter_is_refused_in_one_line(adapter, spoil, words):
    folder, _ = adapter
    spoil(folder)
    with pytest.raises(DomainError, match=words) as refusal:
        read_adapter(folder)
    assert refusal.value.reason is Reason.MODEL_INVALID
    assert "\n" not in refusal.value.message


def test_an_adapter_of_other_modules_or_another_model_is_refused(llama_folder, adapter):
    start = read_adapter(adapter[0])
    name, pair = next(iter(start.factors.items()))
    with pytest.raises(
        DomainError, match="it changes lm_head, which the federation does not train: merge it"
    ):
        decoder_from(llama_folder, Start({"lm_head": pair}))
    wide = LoraFactors(B=pair.B, A=np.ones((4, 99), dtype=np.float32))
    with pytest.raises(DomainError, match="of another base model"):
        decoder_from(llama_folder, Start({name: wide}))


def test_check_refuses_a_start_that_the_federation_cannot_carry(agent_folder, bert_classifier):
    config = configured(agent_folder, bert_classifier, head="base")
    inspect(config, FILMS, ProtectionSpec())
    with pytest.raises(DomainError, match=r"ask the operator to raise it, or set model\.head to new"):
        inspect(config, FILMS, ProtectionSpec(tensor_bound=1e-3))


def test_what_was_trained_from_another_start_is_not_used(agent_folder, bert_folder, tmp_path):
    before = classifier(bert_folder)
    before.load(stirred(before))
    before.save_adapter(tmp_path / "adapter")
    keys = []
    for adapter in (None, tmp_path / "adapter"):
        config = configured(agent_folder, bert_folder, adapter=adapter)
        state = AgentState(config.state_dir)
        learner = Learner(config, FILMS, state)
        state.close()
        keys.append(learner._current.key())
    shutil.rmtree(tmp_path / "adapter")
    assert keys[0] != keys[1]
