"""What `check`, `doctor` and `run` find out before an agent joins: lengths, special tokens, models that do not fit."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from client_agent.config import AgentConfig
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.model import AdaptedModel
from client_agent.preparation import Prepared, prepare
from client_agent.survey import survey
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import LABELS, bert_config, classifier, decoder, save_model

CLS, SEP = 2, 3


def ids(folder: Path, text: str, limit: int = 12, *, causal: bool = False) -> list[int]:
    return Encoder(AutoTokenizer.from_pretrained(folder), limit, append_end=causal).ids([text])[0]


def prepared(agent_folder: Path, model: Path | str, spec: TrainingSpec) -> Prepared:
    config = AgentConfig.load(agent_folder / "agent.yaml", {"SHELORA_AGENT__MODEL__PATH": str(model)})
    return prepare(config, spec)


def refusal(
    agent_folder: Path, model: Path | str, spec: TrainingSpec, reason: Reason = Reason.MODEL_INVALID
) -> str:
    with pytest.raises(DomainError) as caught:
        prepared(agent_folder, model, spec)
    assert caught.value.reason is reason
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value.message


def spec(*targets: str, **fields: object) -> TrainingSpec:
    return TrainingSpec(
        **{"base_model": "tiny", "labels": LABELS, "target_modules": targets or ("query", "value"), **fields}
    )


def causal(*targets: str, **fields: object) -> TrainingSpec:
    return spec(*(targets or ("q_proj", "v_proj")), task="causal-lm", labels=(), **fields)


# Special tokens and lengths


def test_a_text_that_is_cut_has_no_end_token(llama_folder: Path) -> None:
    whole = ids(llama_folder, "good " * 4, causal=True)
    assert (whole[0], whole[-1], len(whole)) == (CLS, SEP, 6)
    cut = ids(llama_folder, "good " * 50, causal=True)
    assert len(cut) == 12
    assert SEP not in cut
    exact = ids(llama_folder, "good " * 11, causal=True)  # the whole text, and no room for its end
    assert len(exact) == 12
    assert SEP not in exact


def test_a_classifier_reads_its_special_tokens_around_a_text_that_is_cut(bert_folder: Path) -> None:
    cut = ids(bert_folder, "good " * 50)
    assert (cut[0], cut[-1], len(cut)) == (CLS, SEP, 12)


@pytest.mark.parametrize(
    "text", ["[CLS] the movie was good [SEP]", "[CLS] the movie was good", "the movie was good [SEP]"]
)
@pytest.mark.parametrize("causal_lm", [True, False])
def test_special_tokens_that_a_text_holds_are_not_doubled(
    bert_folder: Path, text: str, causal_lm: bool
) -> None:
    assert ids(bert_folder, text, causal=causal_lm) == ids(
        bert_folder, "the movie was good", causal=causal_lm
    )
    long = text.replace("good", "good " * 50)
    assert ids(bert_folder, long, causal=causal_lm) == ids(
        bert_folder, "the movie was" + " good" * 50, causal=causal_lm
    )


def test_a_limit_without_room_for_a_text_is_refused(bert_folder: Path) -> None:
    assert len(ids(bert_folder, "good good", 3)) == 3
    with pytest.raises(DomainError, match="max_tokens of at least 3") as caught:
        ids(bert_folder, "good", 2)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_survey_counts_what_is_cut(bert_folder: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(bert_folder), 6, append_end=False)
    texts = Examples(tuple("good " * count for count in (1, 4, 5, 100)), (1,) * 4)
    found = survey(Path("unread"), "text", texts, encoder)
    assert found.lengths.tolist() == [3, 6, 7, 102]
    assert (found.cut, found.longest, found.limit) == (2, 3, 6)
    assert found.percentiles() == {50: 7, 90: 102, 99: 102, 100: 102}


def test_texts_are_cut_to_the_positions_of_the_model(
    agent_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    """A tokenizer of a model made at home states no limit, and a long text ended in a traceback of torch."""
    shutil.copytree(bert_folder, tmp_path / "unlimited")
    stated = json.loads((tmp_path / "unlimited" / "tokenizer_config.json").read_text())
    del stated["model_max_length"]
    (tmp_path / "unlimited" / "tokenizer_config.json").write_text(json.dumps(stated))
    with (agent_folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "good " * 360, "label": "good"}) + "\n")
    found = prepared(agent_folder, tmp_path / "unlimited", spec(max_tokens=1024))
    assert (found.lengths.limit, found.lengths.cut) == (64, 1)


def test_a_text_that_gives_no_second_token_is_named(
    agent_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    bare = json.loads((llama_folder / "tokenizer.json").read_text())
    bare["post_processor"] = None
    folder = shutil.copytree(llama_folder, tmp_path / "bare")
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (agent_folder / "train.jsonl").write_text('{"text": "good movie"}\n\n{"text": "good"}\n')
    said = refusal(agent_folder, folder, causal(), Reason.DATA_INVALID)
    assert "train.jsonl, line 3: the text in field 'text' has no second token to predict" in said


def test_a_batch_without_targets_is_named_not_nan(llama_folder: Path, obfuscation: Obfuscation) -> None:
    model = decoder(llama_folder)
    model.initialise(obfuscation)
    encoder = Encoder(model.tokenizer, 12, append_end=True)
    encoder.limit = 1
    with pytest.raises(DomainError, match="no text of step 1 has a second token") as caught:
        train(
            model,
            encoder,
            Examples(("good",)),
            TrainingRun(rates=[0.01] * 1, batch_size=1, seed=1),
            lambda _: None,
        )
    assert caught.value.reason is Reason.DATA_INVALID


def test_a_tokenizer_of_another_model_is_refused(
    agent_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["movie"] = 4000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "gives token 4000, and the model knows 32 tokens" in refusal(agent_folder, folder, spec())


def test_a_tokenizer_that_fails_on_a_text_is_refused_in_one_line(
    agent_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    """tokenizers raises a bare Exception where the token for unknown words is not in the vocabulary."""
    folder = shutil.copytree(bert_folder, tmp_path / "damaged")
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["unk_token"] = "[NONE]"
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    assert "the tokenizer fails on a text: WordLevel error" in refusal(agent_folder, folder, spec())


def test_a_token_for_padding_that_the_model_does_not_know_is_refused(
    agent_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    """One example is not padded: check passed, and the first batch of unequal lengths ended in an IndexError."""
    folder = shutil.copytree(bert_folder, tmp_path / "padded")
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["vocab"]["[FILL]"] = 4000
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[FILL]"}))
    said = refusal(agent_folder, folder, spec())
    assert "pads with token 4000, and the model knows 32 tokens" in said


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of the kinds that people bring."""
    folder = tmp_path_factory.mktemp("models")
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    size = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    modern = ModernBertConfig(**size, **special, cls_token_id=2, sep_token_id=3, max_position_embeddings=64)
    torch.manual_seed(1)
    save_model(ModernBertModel(modern), folder / "modern")
    save_model(ModernBertForMaskedLM(modern), folder / "modern-mlm")
    save_model(BertForSequenceClassification(bert_config()), folder / "tuned")
    save_model(BertForMaskedLM(bert_config()), folder / "mlm")
    experts = MixtralConfig(
        **size, **special, num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64
    )
    save_model(MixtralForCausalLM(experts), folder / "experts")
    t5 = T5Config(
        vocab_size=32,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        **special,
        decoder_start_token_id=0,
    )
    save_model(T5ForConditionalGeneration(t5), folder / "t5")
    return folder


@pytest.mark.parametrize(
    ("model", "whole"),
    [
        ("modern", ["head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"]),
        (
            "modern-mlm",
            ["classifier.weight", "classifier.bias"],
        ),  # its head is in the checkpoint, and stays frozen
    ],
)
def test_modernbert_is_trained_with_the_norm_in_its_head(
    agent_folder: Path, models: Path, obfuscation: Obfuscation, model: str, whole: list[str]
) -> None:
    found = prepared(agent_folder, models / model, spec("Wqkv")).model
    assert [t.name for t in found.tensors] == whole
    found.initialise(obfuscation)
    if model == "modern":
        np.testing.assert_array_equal(found.weights().tensors["head.norm.weight"], np.ones(32))
        assert found.weights().tensors["head.dense.weight"].std() > 0


@pytest.mark.parametrize("labels", [LABELS, ("a", "bad", "good")])
def test_the_head_of_a_finished_classifier_is_drawn_anew_and_named(
    agent_folder: Path, models: Path, labels: tuple[str, ...]
) -> None:
    notes = prepared(agent_folder, models / "tuned", spec(labels=labels)).model.notes
    assert len(notes) == 1
    assert "is a classifier already; the federation starts its classifier anew" in notes[0]


def test_a_checkpoint_without_a_head_needs_no_note(model: AdaptedModel) -> None:
    assert model.notes == ()


@pytest.mark.parametrize("target", ["experts", "gate"])
def test_stacked_experts_are_refused_in_a_sentence(agent_folder: Path, models: Path, target: str) -> None:
    said = refusal(agent_folder, models / "experts", causal("q_proj", target))
    assert (
        "only linear layers and plain convolutions (Conv2d) can be adapted, and no experts that are stacked"
        in said
    )
    assert prepared(agent_folder, models / "experts", causal()).model.matrices


@pytest.mark.parametrize(
    ("model", "told", "said"),
    [
        (
            "t5",
            causal("q"),
            "is a t5 model and cannot be trained for causal-lm, the federation's task; it is for sequence",
        ),
        ("mlm", causal("query"), "sees the tokens that it is to predict, as an encoder does"),
        (
            "tuned",
            spec("query", "q_proj"),
            "name 'q_proj', and the model has no such module; what can be adapted is query",
        ),
        (
            "tuned",
            spec("query", "word_embeddings"),
            "word_embeddings, of the kind Embedding; only linear layers",
        ),
        ("tuned", spec("classifier"), "name 'classifier', and the model has no such module"),
    ],
)
def test_what_does_not_fit_the_federation_is_named(
    agent_folder: Path, models: Path, model: str, told: TrainingSpec, said: str
) -> None:
    assert said in refusal(agent_folder, models / model, told)


@pytest.mark.parametrize("path", ["/none/such", "./none", "../none", "none.gguf", "a/b/none"])
def test_a_path_that_leads_nowhere_is_said_to(agent_folder: Path, path: str) -> None:
    assert f"there is no folder or file {path}" in refusal(agent_folder, path, spec())


def broken(folder: Path, name: str, content: str | bytes | None) -> None:
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", '{"model_type": 7}'),
        ("config.json", b"\xff"),
        ("tokenizer.json", None),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", b"\xff"),
        ("model.safetensors", None),
        ("model.safetensors", "{}"),
    ],
)
def test_a_broken_folder_gives_one_line(
    agent_folder: Path, bert_folder: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "broken")
    broken(folder, name, content)
    said = refusal(agent_folder, folder, spec())
    assert str(folder) in said
    assert "see that the folder is whole" in said


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"hidden_act": "nothing"},
        {"vocab_size": 4},
        {"max_position_embeddings": 2},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"architectures": 5},
        {"id2label": {"0": "x"}, "problem_type": "regression"},
    ],
)
def test_an_odd_configuration_gives_one_line_or_a_model_that_trains(
    agent_folder: Path, bert_folder: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    try:
        assert prepared(agent_folder, folder, spec()).model.matrices
    except DomainError as error:
        reason, message = error.reason, error.message
    else:
        return
    assert reason is Reason.MODEL_INVALID
    assert "\n" not in message


def test_code_in_a_model_is_never_run(agent_folder: Path, bert_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "own")
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}')
    (folder / "code.py").write_text("raise SystemExit(99)")
    assert "needs code of its own, which is never run" in refusal(agent_folder, folder, spec())


def test_weights_that_are_not_finite_are_found_before_training(
    agent_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "loss is nan before any training" in refusal(agent_folder, folder, spec())


def test_an_adapter_is_no_base_model(agent_folder: Path, model: AdaptedModel, tmp_path: Path) -> None:
    model.save_adapter(tmp_path / "adapter")
    assert "holds an adapter: name its base model, and the adapter as model.adapter" in refusal(
        agent_folder, tmp_path / "adapter", spec()
    )


def test_the_model_is_ready_to_train_after_it_was_tried_out(agent_folder: Path, bert_folder: Path) -> None:
    found = prepared(agent_folder, bert_folder, spec())
    assert all(parameter.grad is None for parameter in found.model.trainable())
    plain = classifier(bert_folder)
    for name, factors in plain.weights().factors.items():
        np.testing.assert_array_equal(found.model.weights().factors[name].B, factors.B)


def write_gguf(path: Path) -> Path:
    """A language model of one layer in a GGUF file."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, 5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, ["<s>", "</s>", "a", "b", "ab"]),
        (writer.add_token_types, [3, 3, 1, 1, 1]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    shapes = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (48, 32),
    }
    shapes |= {"ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (5, 32), "output_norm.weight": (32,), "output.weight": (5, 32)}
    for name, shape in tensors.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read(agent_folder: Path, tmp_path: Path) -> None:
    """Its reader is a package of its own, which was in no extra."""
    for name in ("train.jsonl", "test.jsonl"):
        (agent_folder / name).write_text('{"text": "abba"}\n')
    found = prepared(agent_folder, write_gguf(tmp_path / "tiny.gguf"), causal())
    assert [m.name for m in found.model.matrices] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert found.lengths.limit == 64
