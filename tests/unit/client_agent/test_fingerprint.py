"""What base models are told apart by, and what they are not told apart by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertModel

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.fingerprint import base_digest
from client_agent.learning import BaseDigest
from shelora.obfuscation import Obfuscation
from shelora.tasks import SEQUENCE_CLASSIFICATION
from tests.unit.client_agent.tiny import LABELS, bert_config, classifier, save_model


def digest(folder: Path, labels: tuple[str, ...] = LABELS) -> BaseDigest:
    return base_digest(load_checkpoint(str(folder), SEQUENCE_CLASSIFICATION, labels))


def differing(folder: Path, other: Path) -> list[str]:
    first, second = digest(folder), digest(other)
    return [part for part in BaseDigest.__slots__ if getattr(first, part) != getattr(second, part)]


def edited(folder: Path, name: str, edit: Callable[[dict], object]) -> None:
    values = json.loads((folder / name).read_text())
    edit(values)
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def copy(bert_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert_folder, tmp_path / "copy")


def test_the_layout_of_files_does_not_matter(bert_folder: Path, tmp_path: Path) -> None:
    with quiet():
        model = AutoModel.from_pretrained(bert_folder)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    for file in bert_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert differing(bert_folder, tmp_path / "sharded") == []


def test_a_head_that_is_drawn_anew_does_not_matter(bert_folder: Path) -> None:
    assert digest(bert_folder, LABELS) == digest(bert_folder, ("a", "b", "c"))


def test_the_digest_is_of_the_base_and_not_of_what_is_trained(
    bert_folder: Path, obfuscation: Obfuscation
) -> None:
    model = classifier(bert_folder)
    model.initialise(obfuscation)
    assert model.base == digest(bert_folder)


def test_one_weight_is_told(bert_folder: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][5] += 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert differing(bert_folder, copy) == ["weights"]


def test_other_weights_of_the_same_shapes_are_told(bert_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    assert differing(bert_folder, save_model(BertModel(bert_config()), tmp_path / "other")) == ["weights"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t["model"]["vocab"].update(
            the=t["model"]["vocab"]["movie"], movie=t["model"]["vocab"]["the"]
        ),
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        lambda t: t.update(post_processor=None),
    ],
)
def test_a_tokenizer_that_does_something_else_is_told(bert_folder: Path, copy: Path, edit: Callable) -> None:
    edited(copy, "tokenizer.json", edit)
    assert differing(bert_folder, copy) == ["tokenizer"]


def test_how_a_tokenizer_pads_and_cuts_does_not_matter(bert_folder: Path, copy: Path) -> None:
    edited(copy, "tokenizer_config.json", lambda c: c.update(model_max_length=512, padding_side="left"))
    assert differing(bert_folder, copy) == []


def test_a_chat_template_is_told(bert_folder: Path, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert differing(bert_folder, copy) == ["chat_template"]


def test_tags_are_equal_for_equal_models_of_an_epoch_and_say_nothing_without_its_secret() -> None:
    ours, same = Obfuscation(bytes(32), 1), Obfuscation(bytes(32), 1)
    assert ours.tag("weights", b"a" * 32) == same.tag("weights", b"a" * 32)
    others = [
        ours.tag("weights", b"b" * 32),
        ours.tag("tokenizer", b"a" * 32),
        Obfuscation(bytes(32), 2).tag("weights", b"a" * 32),
        Obfuscation(b"k" * 32, 1).tag("weights", b"a" * 32),
    ]
    assert len({ours.tag("weights", b"a" * 32), *others}) == 5
