from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import LoraFactors
from shelora.lora.sketches import Exponents
from shelora.obfuscation import Obfuscation
from shelora.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from tests.unit.client_agent.tiny import LABELS, classifier, decoder


def random_weights(model: AdaptedModel, seed: int = 5) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Weights(
        factors={
            m.name: LoraFactors(draw(m.out_features, model.rank), draw(model.rank, m.in_features))
            for m in model.matrices
        },
        tensors={t.name: draw(*t.shape) for t in model.tensors},
    )


def logits(model: AdaptedModel, encoder: Encoder, examples: Examples) -> torch.Tensor:
    with torch.inference_mode():
        return model.predict(encoder.batch(examples))[0]


def test_matrices_and_tensors_carry_the_base_models_names_and_shapes(model: AdaptedModel) -> None:
    assert model.matrices == tuple(
        Matrix(f"bert.encoder.layer.{layer}.attention.self.{name}", 32, 32)
        for layer in (0, 1)
        for name in ("query", "value")
    )
    assert model.tensors == (Tensor("classifier.weight", (2, 32)), Tensor("classifier.bias", (2,)))


def test_factors_survive_a_round_trip(model: AdaptedModel) -> None:
    weights = random_weights(model)
    model.load(weights)
    back = model.weights()
    for name, factors in weights.factors.items():
        np.testing.assert_array_equal(back.factors[name].A, factors.A)
        np.testing.assert_array_equal(back.factors[name].B, factors.B)
    for name, value in weights.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], value)


def test_the_update_of_a_layer_is_scaling_times_b_times_a(model: AdaptedModel) -> None:
    weights = random_weights(model)
    model.load(weights)
    name = model.matrices[0].name
    layer = model.layers[name]
    x = torch.randn(3, 32)
    change = layer(x) - layer.get_base_layer()(x)
    factors = weights.factors[name]
    expected = model.scaling * x.numpy() @ (factors.B @ factors.A).T
    np.testing.assert_allclose(change.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_model_change_nothing(model: AdaptedModel) -> None:
    before = model.weights()
    weights = random_weights(model)
    wrong = Weights(
        factors=weights.factors, tensors={**weights.tensors, "classifier.bias": np.zeros(3, dtype=np.float32)}
    )
    with pytest.raises(DomainError) as caught:
        model.load(wrong)
    assert caught.value.reason is Reason.MODEL_INVALID
    np.testing.assert_array_equal(
        before.tensors["classifier.weight"], model.weights().tensors["classifier.weight"]
    )


def test_agents_that_load_the_same_checkpoint_start_equal(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = classifier(bert_folder)
        adapted.initialise(obfuscation)
        outputs.append(logits(adapted, Encoder(adapted.tokenizer, 32, append_end=False), examples))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_agents_of_different_rank_start_from_rows_of_the_same_matrix(
    bert_folder: Path, obfuscation: Obfuscation
) -> None:
    small, large = (classifier(bert_folder, LoraSettings(rank=r)) for r in (2, 6))
    small.initialise(obfuscation)
    large.initialise(obfuscation)
    for name, factors in small.weights().factors.items():
        np.testing.assert_array_equal(factors.A, large.weights().factors[name].A[:2])
        assert not factors.B.any()


def test_a_saved_adapter_gives_the_same_logits_in_peft(
    model: AdaptedModel, encoder: Encoder, examples: Examples, bert_folder: Path, tmp_path: Path
) -> None:
    model.load(random_weights(model))
    model.save_adapter(tmp_path / "adapter")
    batch = encoder.batch(examples)
    with quiet():
        base = load_checkpoint(str(bert_folder), SEQUENCE_CLASSIFICATION, LABELS).model
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.inference_mode():
        again = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(again, logits(model, encoder, examples))
    assert not list((tmp_path / "adapter").glob("*.bin"))


def with_frozen(model: AdaptedModel, width: int = 3) -> Weights:
    """Random weights with a part of that rank frozen beside every matrix but the last."""
    rng = np.random.default_rng(8)
    frozen = {
        m.name: LoraFactors(
            rng.normal(size=(m.out_features, width)).astype(np.float32),
            rng.normal(size=(width, m.in_features)).astype(np.float32),
        )
        for m in model.matrices[:-1]
    }
    bounds = {m.name: Exponents(3, -2) for m in model.matrices}
    return replace(random_weights(model), frozen=frozen, exponents=bounds)


def test_a_frozen_part_is_added_to_what_the_trained_one_does_and_is_not_trained(model: AdaptedModel) -> None:
    weights, count = with_frozen(model), model.trainable_count
    model.load(weights)
    assert model.trainable_count == count
    x = torch.randn(3, 32)
    for name, factors in weights.factors.items():
        layer = model.layers[name]
        change = layer(x) - layer.get_base_layer()(x)
        update = model.scaling * factors.B @ factors.A
        if name in weights.frozen:
            update = update + weights.frozen[name].B @ weights.frozen[name].A
        np.testing.assert_allclose(change.detach().numpy(), x.numpy() @ update.T, rtol=1e-4, atol=1e-3)


def test_a_frozen_part_comes_back_with_its_bounds_and_goes_with_the_next_weights(model: AdaptedModel) -> None:
    weights = with_frozen(model)
    model.load(weights)
    back = model.weights()
    assert back.frozen.keys() == weights.frozen.keys()
    assert back.exponents == weights.exponents
    for name, factors in weights.frozen.items():
        np.testing.assert_array_equal(back.frozen[name].B, factors.B)
        np.testing.assert_array_equal(back.frozen[name].A, factors.A)
    model.load(random_weights(model))
    assert not model.weights().frozen
    assert not model.weights().exponents


def test_a_frozen_part_of_other_shapes_changes_nothing(model: AdaptedModel) -> None:
    model.load(with_frozen(model))
    before, name = model.weights(), model.matrices[0].name
    wrong = LoraFactors(np.zeros((31, 2), np.float32), np.zeros((2, 32), np.float32))
    with pytest.raises(DomainError, match="frozen part") as caught:
        model.load(replace(random_weights(model, seed=6), frozen={name: wrong}))
    assert caught.value.reason is Reason.MODEL_INVALID
    np.testing.assert_array_equal(model.weights().factors[name].A, before.factors[name].A)
    assert model.weights().frozen.keys() == before.frozen.keys()


@pytest.mark.parametrize("task", ["classifier", "decoder"])
def test_a_saved_adapter_holds_the_frozen_part_too(
    task: str, bert_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    model = classifier(bert_folder) if task == "classifier" else decoder(llama_folder)
    model.load(with_frozen(model))
    model.save_adapter(tmp_path)
    folder, kind, labels = (
        (bert_folder, SEQUENCE_CLASSIFICATION, LABELS)
        if task == "classifier"
        else (llama_folder, CAUSAL_LM, ())
    )
    tokens = torch.tensor([[2, 5, 7, 3]])
    with quiet(), torch.inference_mode():
        base = load_checkpoint(str(folder), kind, labels).model
        loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        again = loaded(input_ids=tokens).logits
        here = model.module(input_ids=tokens).logits
    torch.testing.assert_close(again, here, rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].r == 4 + 3


def test_a_missing_pooler_is_trained_whole_and_starts_equal(
    poolerless_folder: Path, obfuscation: Obfuscation
) -> None:
    adapted = classifier(poolerless_folder)
    adapted.initialise(obfuscation)
    assert [t.name for t in adapted.tensors] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    expected = obfuscation.initial_tensor("bert.pooler.dense.weight", (32, 32))
    np.testing.assert_array_equal(adapted.weights().tensors["bert.pooler.dense.weight"], expected)


def test_a_head_is_not_adapted_where_its_name_ends_like_a_target(poolerless_folder: Path) -> None:
    adapted = classifier(poolerless_folder, targets=("dense",))
    assert not [m.name for m in adapted.matrices if "pooler" in m.name]
    assert [m.name for m in adapted.matrices if "attention.output.dense" in m.name]


def test_a_checkpoint_that_lacks_a_frozen_weight_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DomainError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense\.weight") as caught:
        load_checkpoint(str(tmp_path), SEQUENCE_CLASSIFICATION, LABELS)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_pickled_checkpoint_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DomainError, match="cannot be loaded") as caught:
        load_checkpoint(str(tmp_path), SEQUENCE_CLASSIFICATION, LABELS)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match=r"model\.path") as caught:
        load_checkpoint(str(tmp_path), SEQUENCE_CLASSIFICATION, LABELS)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_targets_that_do_not_exist_are_refused(bert_folder: Path) -> None:
    with pytest.raises(DomainError, match="target_modules") as caught:
        classifier(bert_folder, targets=("q_proj",))
    assert caught.value.reason is Reason.MODEL_INVALID


def test_targets_that_are_not_linear_are_refused(bert_folder: Path) -> None:
    with pytest.raises(DomainError, match="only linear layers"):
        classifier(bert_folder, targets=("word_embeddings",))


def test_a_decoder_has_no_tensors_trained_whole(llama_folder: Path) -> None:
    adapted = decoder(llama_folder)
    assert adapted.tensors == ()
    assert [m.out_features for m in adapted.matrices] == [32, 16, 32, 16]


def test_loading_prints_nothing(bert_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    classifier(bert_folder)
    assert capfd.readouterr() == ("", "")
