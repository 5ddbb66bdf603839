"""Merges an adapter of this agent into its base model: a model that loads and runs without PEFT."""

import re
import shutil
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from client_agent.adapters import CARD
from client_agent.card import BASE_WEIGHTS
from client_agent.checkpoint import Checkpoint, invalid, load_checkpoint, quiet, stored_dtype
from client_agent.fingerprint import base_digest
from client_agent.tables import first_line
from client_agent.tasks.port import Task
from client_agent.tasks.registry import tasks

_PIPELINE: Final = re.compile(r'^pipeline_tag: "([a-z-]+)"$', re.MULTILINE)
_WEIGHTS: Final = re.compile(rf"^- {BASE_WEIGHTS}: ([0-9a-f]{{64}})$", re.MULTILINE)


def export_merged(base: str, adapter: Path, to: Path) -> None:
    """Writes the base model with the adapter in it, its tokenizer and the card; in the base's own type.

    Args:
        base: As `model.path`.
        adapter: Folder of an adapter that an agent wrote.
        to: Folder to make.

    Raises: MODEL_INVALID if the base is not the one that the adapter was trained on, or either cannot be loaded.
    """
    card = (adapter / CARD).read_text(encoding="utf-8") if (adapter / CARD).is_file() else ""
    task = _task_of(card, adapter)
    labels = _labels_of(adapter) if task.has_head else ()
    checkpoint = load_checkpoint(base, task.name, labels)
    _check_base(card, checkpoint, base)
    try:
        with quiet():
            merged = PeftModel.from_pretrained(checkpoint.model, str(adapter)).merge_and_unload()
    except Exception as error:  # PEFT raises many kinds
        raise invalid(f"the adapter {adapter} does not fit the model {base}: {first_line(error)}") from error
    draft = to.with_name(f"{to.name}.draft")
    try:
        with quiet():
            _plain(merged).to(stored_dtype(base)).save_pretrained(str(draft))
            checkpoint.tokenizer.save_pretrained(str(draft))
        (draft / CARD).write_text(_merged_card(card), encoding="utf-8")
        draft.rename(to)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _task_of(card: str, adapter: Path) -> Task:
    """By the card's front matter; of two language tasks either will do."""
    named = _PIPELINE.search(card)
    found = [task for task in tasks() if named and task.pipeline == named.group(1)]
    if not found:
        raise invalid(
            f"{adapter / CARD} is not a card that an agent wrote: it names no pipeline_tag of a task"
        )
    return found[0]


def _labels_of(adapter: Path) -> tuple[str, ...]:
    known = AutoConfig.from_pretrained(str(adapter), trust_remote_code=False)
    return tuple(known.id2label[index] for index in range(known.num_labels))


def _check_base(card: str, checkpoint: Checkpoint, base: str) -> None:
    trained_on = _WEIGHTS.search(card)
    if trained_on and trained_on.group(1) != base_digest(checkpoint).weights.hex():
        raise invalid(
            f"model.path: {base} holds other weights than those that the adapter was trained on: name that model"
        )


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model that can be saved: transformers saves none that came from a GGUF file."""
    settings: dict[str, Any] = model.config.to_dict()
    if settings.pop("quantization_config", None) is None:
        return model
    plain: PreTrainedModel = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict())
    return plain


def _merged_card(card: str) -> str:
    """The adapter's card without what holds for adapters alone."""
    body = card.split("\n## Use\n", maxsplit=1)[0].replace("# LoRA adapter of", "# Model of", 1)
    return body.replace('library_name: "peft"', 'library_name: "transformers"', 1)
