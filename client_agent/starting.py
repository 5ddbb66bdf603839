"""What training starts from beside the base model: an adapter that somebody trained, a classifier that it holds.

An adapter stays as it is, added to what each of its layers computes; what the federation trains comes on top, and the
adapter that it results in holds both. All agents must start alike: they compare a keyed digest, as of the base model.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_agent.checkpoint import Checkpoint, invalid
from client_agent.tables import first_line, listed
from shelora.errors import DomainError
from shelora.lora.shards import Float32, LoraFactors

PREFIX: Final = "base_model.model."
"""What PEFT puts before the name of a module of the base model."""
WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
"""Files of a PEFT adapter."""
_SIDES: Final = ("A", "B")
_KERNEL: Final = 4
"""Dimensions of a convolution's weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where training starts. Nothing: from the base model alone."""

    factors: Mapping[str, LoraFactors] = field(default_factory=dict)
    """By matrix name, what is added to it for good: B A, the scaling in B."""
    tensors: Mapping[str, Float32] = field(default_factory=dict)
    """By name, first values of tensors that are trained whole."""

    def __bool__(self) -> bool:
        return bool(self.factors or self.tensors)

    @property
    def digest(self) -> bytes:
        """SHA-256 of names, shapes and values; empty for nothing."""
        if not self:
            return b""
        hashed = hashlib.sha256()
        for name, value in _arrays(self):
            hashed.update(json.dumps([name, list(value.shape)]).encode())
            hashed.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
        return hashed.digest()


def _arrays(start: Start) -> Iterator[tuple[str, Float32]]:
    for name in sorted(start.factors):
        yield f"{name}.A", start.factors[name].A
        yield f"{name}.B", start.factors[name].B
    for name in sorted(start.tensors):
        yield name, start.tensors[name]


class _AdapterConfig(BaseModel):
    """What an adapter's configuration says that decides what it computes. Other fields are not read."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    rank_pattern: dict[str, Any] = {}
    alpha_pattern: dict[str, Any] = {}
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[Any] | None = None

    def unsupported(self) -> str:
        """What of it is not plain LoRA; "" for nothing."""
        if self.peft_type != "LORA":
            return f"peft_type {self.peft_type}"
        odd = {
            "use_dora": self.use_dora,
            f"bias {self.bias}": self.bias != "none",
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layer_replication": self.layer_replication,
            "alora_invocation_tokens": self.alora_invocation_tokens,
        }
        return ", ".join(name for name, value in odd.items() if value)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_adapter(folder: Path) -> Start:
    """A LoRA adapter as PEFT and `client-agent export` write it; no pickles. Raises: MODEL_INVALID."""
    config = _read_config(folder)
    if odd := config.unsupported():
        raise _refused(folder, f"has {odd}; only plain LoRA can be trained on from, without {odd}")
    factors: dict[str, dict[str, Float32]] = {}
    tensors: dict[str, Float32] = {}
    for key, value in _read_weights(folder).items():
        if not np.isfinite(value).all():
            raise _refused(folder, f"holds values in {key} that are not finite")
        name = key.removeprefix(PREFIX)
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        if module and side in _SIDES:
            factors.setdefault(module, {})[side] = value
        elif ".lora_" in name:
            raise _refused(
                folder,
                f"holds {key}, and only factors of linear layers and convolutions can be trained on from",
            )
        else:
            tensors[name] = value
    return Start({name: _pair(folder, name, pair, config) for name, pair in factors.items()}, tensors)


def _pair(folder: Path, name: str, pair: Mapping[str, Float32], config: _AdapterConfig) -> LoraFactors:
    if set(pair) != set(_SIDES):
        raise _refused(folder, f"holds one factor of {name} alone")
    A, B = pair["A"], pair["B"]
    kernels = A.ndim == B.ndim == _KERNEL and B.shape[2:] == (1, 1)  # factors of a convolution
    if not (kernels or A.ndim == B.ndim == 2) or not len(A) == B.shape[1] == config.r:
        raise _refused(folder, f"holds factors of {name} that are not of rank {config.r}")
    A, B = A.reshape(config.r, -1), B.reshape(-1, config.r)
    return LoraFactors(B=(config.scaling * B).astype(np.float32), A=A)


def _read_config(folder: Path) -> _AdapterConfig:
    try:
        return _AdapterConfig.model_validate_json((folder / CONFIG).read_bytes())
    except OSError as error:
        why = f"holds no {CONFIG} that can be read ({error.strerror}): name the folder of a LoRA adapter"
        raise _refused(folder, why) from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or CONFIG
        raise _refused(
            folder, f"has a {CONFIG} that is no LoRA adapter's: {where}: {problem['msg']}"
        ) from None


def _read_weights(folder: Path) -> dict[str, Float32]:
    try:
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    except OSError as error:
        why = f"holds no {WEIGHTS} that can be read: save the adapter with safetensors"
        raise _refused(folder, why) from error
    except (
        safetensors.SafetensorError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # or types that numpy lacks
        raise _refused(
            folder, f"{WEIGHTS} cannot be read: {first_line(error)}; save it in float32"
        ) from error
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def require_fit(
    start: Start, shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises: MODEL_INVALID if the start holds what the federation does not train, or of another shape.

    Args:
        start: What is started from.
        shapes: [out, in] of the adapted matrices, by name.
        tensors: Shapes of the tensors trained whole, by name.
    """
    others = sorted((start.factors.keys() - shapes.keys()) | (start.tensors.keys() - tensors.keys()))
    if others:
        raise invalid(
            f"model.adapter: it changes {listed(others)}, which the federation does not train: merge it into its base "
            "model and name that as model.path at every agent, or have the operator name the same target_modules and "
            "modules_to_save"
        )
    for name, pair in start.factors.items():
        found = (pair.B.shape[0], pair.A.shape[1])
        _require_shape(name, found, shapes[name])
    for name, value in start.tensors.items():
        _require_shape(name, value.shape, tensors[name])


def _require_shape(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if found != needed:
        raise invalid(
            f"model.adapter: {name} has shape {list(found)} there, and {list(needed)} in the model: it is of another "
            "base model, or of other labels"
        )


def start_of(adapter: Path | None, head: str, checkpoint: Checkpoint, labels: Sequence[str]) -> Start:
    """What an agent's file names to start from. Raises: MODEL_INVALID.

    Args:
        adapter: Folder of an adapter, if there is one.
        head: `base` for the classifier of the checkpoint.
        checkpoint: The base model.
        labels: The federation's.
    """
    start = read_adapter(adapter) if adapter else Start()
    if adapter and start.tensors and labels:
        _require_labels(_labels_beside(adapter), labels, f"model.adapter: {adapter}")
    if head != "base":
        return start
    if start.tensors:
        raise invalid("model.head: base, and model.adapter has trained tensors of its own: set head to new")
    if not (checkpoint.trained_head and checkpoint.head_fits):
        raise invalid(
            "model.head: base, and the base model has no classifier of as many labels as the federation: set it to new"
        )
    _require_labels(checkpoint.known_labels, labels, "model.head: the classifier of the base model")
    return replace(start, tensors=_head_of(checkpoint))


def _head_of(checkpoint: Checkpoint) -> dict[str, Float32]:
    return {
        f"{name}.{parameter}": np.array(value.detach().float().cpu().numpy(), dtype=np.float32)
        for name in checkpoint.trained_head
        for parameter, value in checkpoint.model.get_submodule(name).named_parameters()
    }


def _labels_beside(folder: Path) -> tuple[str, ...]:
    """The labels that an adapter's folder names, as an agent writes them; none if it names none."""
    try:
        known = json.loads((folder / "config.json").read_bytes())["id2label"]
        return tuple(str(known[index]) for index in sorted(known, key=int))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _require_labels(known: Sequence[str], labels: Sequence[str], what: str) -> None:
    """Raises: MODEL_INVALID if a classifier knows other labels, or in another order; one without names is believed."""
    if known and tuple(known) != tuple(labels):
        raise invalid(
            f"{what} knows the labels {listed(known)}, in this order, and the federation has {listed(labels)}: its "
            "outputs would mean something else; start from another one, or ask the operator for the same labels"
        )


def _refused(folder: Path, why: str) -> DomainError:
    return invalid(f"model.adapter: {folder} {why}")
