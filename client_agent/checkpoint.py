"""Loads a base model so that every agent that loads the same checkpoint has the same frozen weights."""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from client_agent.access import denial
from shelora.errors import DomainError, Reason

SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
CAUSAL_LM: Final = "causal-lm"

_LOADERS: Final[dict[str, Any]] = {
    SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    CAUSAL_LM: AutoModelForCausalLM,
}
_POOLER: Final = "pooler"
"""Checkpoints of language models often lack the pooler that classification puts on top; it is trained then."""
_LOADING: Final = threading.RLock()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model in float32 on the CPU, its tokenizer, and the modules that must be trained whole."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: tuple[str, ...]
    """Names of modules that are trained and averaged whole, in the model's order: the classification head, and a
    pooler that the checkpoint lacks. None for causal-lm."""


def load_checkpoint(path: str, task: str, labels: Sequence[str]) -> Checkpoint:
    """Loads a folder, a `.gguf` file or a name on the hub. Reads safetensors or GGUF only, never pickles.

    Raises: DomainError MODEL_INVALID if it may not be read, cannot be loaded, has no padding token, or lacks a weight
    that would stay frozen: it would be random, and different at every agent.
    """
    if task not in _LOADERS:
        raise invalid(f"task {task!r} is not known; known are {', '.join(_LOADERS)}")
    if why := denial(Path(path)):
        raise invalid(f"model.path: {why}")
    with quiet():
        model, missing = _load_model(path, task, labels)
        tokenizer = _load_tokenizer(path)
    _set_padding(path, model, tokenizer)
    head = _head(model) if task == SEQUENCE_CLASSIFICATION else ()
    return Checkpoint(model, tokenizer, _with_poolers(path, model, head, missing))


def invalid(message: str) -> DomainError:
    """A MODEL_INVALID error."""
    return DomainError(Reason.MODEL_INVALID, message)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers and PEFT print while they load, and a deprecation between the two of them.

    What it changes belongs to the process, so one thread at a time is in here.
    """
    with _LOADING, _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def _source(path: str) -> tuple[str, dict[str, Any]]:
    """The arguments that name a checkpoint to transformers: a GGUF file is named inside its folder."""
    if path.endswith(".gguf"):
        file = Path(path)
        return str(file.parent), {"gguf_file": file.name}
    return path, {"local_files_only": True} if Path(path).exists() else {}


def _load_model(path: str, task: str, labels: Sequence[str]) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the names of its parameters that the checkpoint does not give."""
    place, options = _source(path)
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    if task == SEQUENCE_CLASSIFICATION:
        names = dict(enumerate(labels))
        options |= {
            "num_labels": len(labels),
            "id2label": names,
            "label2id": {v: k for k, v in names.items()},
        }
    try:
        model, info = _LOADERS[task].from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise invalid(f"model.path: {path} cannot be loaded for {task}: {error}") from error
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model, frozenset(info["missing_keys"]) | mismatched


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    place, options = _source(path)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise invalid(f"model.path: the tokenizer of {path} cannot be loaded: {error}") from error


def _set_padding(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise invalid(f"model.path: the tokenizer of {path} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _head(model: PreTrainedModel) -> tuple[str, ...]:
    """Top-level modules with parameters beside the base model: what the task puts on top of it."""
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


def _with_poolers(
    path: str, model: PreTrainedModel, head: tuple[str, ...], missing: Iterable[str]
) -> tuple[str, ...]:
    """The head, and every missing pooler. Raises: MODEL_INVALID if anything else is missing or cannot be drawn."""
    trained = set(head)
    for parameter in sorted(missing):
        if under(parameter, trained):
            continue
        parts = parameter.split(".")
        if not head or _POOLER not in parts:
            raise invalid(
                f"model.path: {path} lacks {parameter}, which would be random and differ between agents; "
                "use a checkpoint that holds it"
            )
        trained.add(".".join(parts[: parts.index(_POOLER) + 1]))
    order = tuple(name for name, _ in model.named_modules() if name in trained)
    for name in order:
        _check_linear(name, model.get_submodule(name))
    return order


def under(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_linear(name: str, module: nn.Module) -> None:
    for inner_name, inner in module.named_modules(prefix=name):
        if not isinstance(inner, nn.Linear) and any(True for _ in inner.parameters(recurse=False)):
            raise invalid(
                f"the head module {inner_name} is a {type(inner).__name__}; only linear layers are supported"
            )
