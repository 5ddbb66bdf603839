"""Loads a base model so that every agent that loads the same checkpoint has the same frozen weights."""

import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from client_agent.access import denial
from client_agent.hub import absence_on_hub
from client_agent.layers import hold_statistics
from client_agent.tables import first_line
from client_agent.tasks.port import Task
from client_agent.tasks.registry import task_of, tasks
from shelora.errors import DomainError, Reason

_POOLER: Final = "pooler"
"""Checkpoints of language models often lack the pooler that classification puts on top; it is trained then."""
_MOST_LAYERS: Final = 4096
_LOADING: Final = threading.RLock()
_CONVOLUTIONAL: Final[Mapping[str, Sequence[str]]] = {
    "convnext": ("pwconv1", "pwconv2"),
    "convnextv2": ("pwconv1", "pwconv2"),
    "efficientnet": ("expand_conv", "project_conv"),
    "mobilenet_v2": ("expand_1x1.convolution", "reduce_1x1.convolution"),
    "regnet": ("layer.0.convolution", "shortcut.convolution"),
    "resnet": ("convolution",),
}
"""What to adapt in families that PEFT has no names for: where spatial convolutions are grouped, those of 1 x 1, as
PEFT's own example of a model without attention does (PoolFormer's `mlp.fc1` and `mlp.fc2`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model on the CPU, its tokenizer, and the modules that must be trained whole."""

    model: PreTrainedModel
    tokenizer: Any
    """Its tokenizer, or what prepares images for it."""
    head: tuple[str, ...]
    """Names of modules that are trained and averaged whole, in the model's order: the classifier, and what else of the
    head or of a pooler the checkpoint lacks. None for tasks without a head."""
    trained_head: tuple[str, ...] = ()
    """Of the head, what the checkpoint holds trained: it is a classifier already, perhaps of other labels."""
    head_fits: bool = True
    """Whether it has as many outputs as there are labels."""
    known_labels: tuple[str, ...] = ()
    """The labels of that classifier, in order; none if it names none."""


def load_checkpoint(path: str, task: str, labels: Sequence[str], *, as_stored: bool = False) -> Checkpoint:
    """Loads a folder, a `.gguf` file or a name on the hub. Reads safetensors or GGUF only, never pickles.

    Args: as_stored: Load the weights of a folder in their own type where that holds them all exactly, for callers that
        lower them afterwards; otherwise in float32.
    Raises: DomainError MODEL_INVALID if there is nothing, it may not be read, is not made for the task, cannot be
    loaded, has no padding token, or lacks a weight that would stay frozen: it would be random, and different at every
    agent.
    """
    what = task_of(task)
    if why := _absence(path) or denial(Path(path)):
        raise invalid(f"model.path: {why}")
    with quiet():
        _check_kind(path, what)
        dtype = stored_dtype(path) if as_stored else torch.float32
        model, absent, misshapen = _load_model(path, what, labels, dtype)
        tokenizer = _load_processor(path, what)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        _check_words(path, tokenizer)
        _set_padding(path, model, tokenizer)
    hold_statistics(model)
    missing = absent | misshapen
    head = _head(model, missing) if what.has_head else ()
    whole = _with_poolers(path, model, head, missing)
    trained = tuple(_trained(model, head, absent))
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        head=whole,
        trained_head=trained,
        head_fits=not any(under(name, trained) for name in misshapen),
        known_labels=_labels(path) if trained else (),
    )


def configuration(path: str, task: Task, labels: Sequence[str]) -> PreTrainedConfig:
    """The configuration of a checkpoint, without its weights. Raises: MODEL_INVALID, as `load_checkpoint`."""
    if why := _absence(path) or denial(Path(path)):
        raise invalid(f"model.path: {why}")
    place, options = _source(path)
    with quiet():
        _check_kind(path, task)
        with _loading(path, "the configuration"):
            return AutoConfig.from_pretrained(place, **options, **task.loading(labels))


def usual_targets(path: str) -> tuple[str, ...]:
    """What PEFT adapts in models of that architecture, or convolutions that hold most of its weights; query and value
    where it is not known. Raises: MODEL_INVALID.
    """
    if why := _absence(path) or denial(Path(path)):
        raise invalid(f"model.path: {why}")
    place, options = _source(path)
    with quiet(), _loading(path, "the configuration"):
        kind = AutoConfig.from_pretrained(place, **options).model_type
    known = _CONVOLUTIONAL | TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return tuple(known.get(kind, ("query", "value")))


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
            for known in (r"`is_gradient_checkpointing` is deprecated", "fan_in_fan_out is set to False"):
                warnings.filterwarnings("ignore", message=known)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def _absence(path: str) -> str:
    """Why nothing is at that path; "" if something is, or if it may be a name on the hub."""
    if _exists(path):
        if (Path(path) / "adapter_config.json").is_file():
            return f"{path} holds an adapter: name its base model, and the adapter as model.adapter"
        return ""
    if path.startswith(("/", ".", "~")) or path.endswith(".gguf") or path.count("/") > 1:
        return (
            f"there is no folder or file {path} (relative paths start from the configuration file's folder)"
        )
    return ""


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except PermissionError:
        return True
    except (OSError, ValueError):  # no name that a file can have
        return False


def _source(path: str) -> tuple[str, dict[str, Any]]:
    """The arguments that name a checkpoint to transformers: a GGUF file is named inside its folder."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if path.endswith(".gguf"):
        file = Path(path)
        return str(file.parent), options | {"gguf_file": file.name}
    here = _exists(path) or bool(absence_on_hub(path))  # without the hub: what was downloaded before
    return path, options | ({"local_files_only": True} if here else {})


@contextmanager
def _loading(path: str, what: str) -> Iterator[None]:
    """Turns whatever transformers raises into one line: a checkpoint can make it raise anything."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            why = f"{path} needs code of its own, which is never run; take a model that transformers knows"
        elif _exists(path):
            why = (
                f"{what} of {path} cannot be loaded: {first_line(error)}; see that the folder is whole "
                "(config.json, tokenizer.json, model.safetensors)"
            )
        else:
            absence = absence_on_hub(path) or f"{what} of that name cannot be loaded: {first_line(error)}"
            why = f"there is no folder {path} beside the configuration file, and {absence}"
        raise invalid(f"model.path: {why}") from error


def _check_kind(path: str, task: Task) -> None:
    """Raises: MODEL_INVALID if the architecture is none for the task, or the weights are quantized."""
    place, options = _source(path)
    if "gguf_file" in options:  # a language model in any case, whose weights become float32
        return
    with _loading(path, "the configuration"):
        config = AutoConfig.from_pretrained(place, **options)
    if type(config) not in task.loader._model_mapping:  # noqa: SLF001 - its error names every class there is
        able = [t.name for t in tasks() if type(config) in t.loader._model_mapping]  # noqa: SLF001
        remedy = f"it is for {' or '.join(able)}" if able else "take a model of texts or images"
        raise invalid(
            f"model.path: {path} is a {config.model_type} model and cannot be trained for {task.name}, the "
            f"federation's task; {remedy}"
        )
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # each is made before any weight is looked for
        raise invalid(f"model.path: {path} says that it has {layers:,} layers: check its config.json")
    if getattr(config, "quantization_config", None):
        raise invalid(
            f"model.path: the weights of {path} are quantized; take the checkpoint in full precision"
        )


def _load_model(
    path: str, task: Task, labels: Sequence[str], dtype: torch.dtype
) -> tuple[PreTrainedModel, frozenset[str], frozenset[str]]:
    """The model, and the names of its parameters that the checkpoint lacks, or has in another shape."""
    place, options = _source(path)
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    options |= task.loading(labels)
    with _loading(path, "the model"):
        model, info = task.loader.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    return model, frozenset(info["missing_keys"]), frozenset(entry[0] for entry in info["mismatched_keys"])


def stored_dtype(path: str) -> torch.dtype:
    """The one type of all weights of a folder; float32 if they have several, or if it cannot be told.

    Weights that are loaded in their own type are mapped from the file, and take no memory that cannot be given back.
    """
    kinds: set[str] = set()
    try:
        for file in Path(path).glob("*.safetensors"):
            with safetensors.safe_open(file, framework="np") as weights:
                kinds |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError):  # which is said where it is loaded
        return torch.float32
    floats = kinds & {"F64", "F32", "F16", "BF16"}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get("".join(floats), torch.float32)


def _load_processor(path: str, task: Task) -> Any:  # noqa: ANN401 - as transformers has it
    place, options = _source(path)
    what = (
        "the tokenizer"
        if task.processor is AutoTokenizer
        else "the image processor (preprocessor_config.json)"
    )
    with _loading(path, what):
        return task.processor.from_pretrained(place, **options)


def _check_words(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: MODEL_INVALID for special tokens alone, which transformers makes up where there is no tokenizer."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise invalid(f"model.path: the tokenizer of {path} knows no word: add the model's tokenizer.json")


def _set_padding(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise invalid(f"model.path: the tokenizer of {path} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _head(model: PreTrainedModel, missing: Iterable[str]) -> tuple[str, ...]:
    """Top-level modules beside the base model that are trained: the classifier, which is last, and incomplete ones."""
    beside = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    lacking = [name for name in beside if any(under(parameter, [name]) for parameter in missing)]
    return tuple(name for name in beside if name in lacking or name == beside[-1])


def _trained(model: PreTrainedModel, head: Sequence[str], lacking: Iterable[str]) -> Iterator[str]:
    """The parts of a classifier that the checkpoint holds whole."""
    for name in head:
        own = {f"{name}.{parameter}" for parameter, _ in model.get_submodule(name).named_parameters()}
        if own.isdisjoint(lacking):
            yield name


def _labels(path: str) -> tuple[str, ...]:
    """The labels that a checkpoint's classifier tells apart, if it has names for them."""
    place, options = _source(path)
    with _loading(path, "the configuration"):
        known = AutoConfig.from_pretrained(place, **options).id2label or {}
    names = tuple(str(known[index]) for index in sorted(known, key=int))
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


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
                f"model.path: {path} lacks {parameter}, or has it in another shape than config.json says; it would be "
                "random and differ between agents: use a checkpoint that holds it"
            )
        trained.add(".".join(parts[: parts.index(_POOLER) + 1]))
    order = tuple(name for name, _ in model.named_modules() if name in trained)
    for name in order:
        _check_trainable(name, model.get_submodule(name))
    return order


def under(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_norm(module: nn.Module) -> bool:
    """Whether it scales and shifts what it has normalized: LayerNorm, RMSNorm and their kin."""
    return type(module).__name__.endswith("Norm")


def _check_trainable(name: str, module: nn.Module) -> None:
    for inner_name, inner in module.named_modules(prefix=name):
        known = isinstance(inner, nn.Linear) or is_norm(inner)
        if not known and any(True for _ in inner.parameters(recurse=False)):
            raise invalid(
                f"the head module {inner_name} is a {type(inner).__name__}; only linear layers and norms are supported"
            )
