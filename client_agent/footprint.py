"""How much memory training would take, found before the model is loaded, for any settings.

The model is built on torch's `meta` device, whose tensors have shapes and no values: weights are counted, and what the
forward pass keeps for gradients is seen by autograd's hooks. So it can be asked of a model that does not fit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import psutil
import torch
from torch import nn

from client_agent.checkpoint import configuration, invalid, quiet
from client_agent.config import AgentConfig
from client_agent.layers import LINEAR, hold_statistics, matrix_shape, obstacle
from client_agent.memory import Memory, memory_here, weight_copies
from client_agent.tables import first_line
from client_agent.tasks.port import Task
from client_agent.tasks.registry import task_of
from shelora.federation import ALL_LINEAR, TrainingSpec

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED: Final = {"8bit": 1.0, "4bit": 0.5 + 1 / 64}
"""Bytes a weight, its share of the scales included: one byte for 64 weights of NF4 whose scales are quantized, too."""
_LOGIT_COPIES: Final = 4
"""Times that the logits of all tokens lie in memory in float32: chosen, widened, as probabilities, as gradients."""
_FLOAT: Final = 4
_SLACK: Final = 1.4
"""For what is not counted: gradients on their way, copies for factors in float32, what the allocator holds. With it
estimates are between 14 % below and 11 % above the measured peaks of `python -m bench.training_memory`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides how much memory training takes."""

    dtype: str
    quantization: str
    checkpointing: bool
    micro_batch: int
    """Examples computed at once."""
    keeps_moments: bool = False
    """Whether the optimizer goes on from round to round."""

    def __str__(self) -> str:
        bits = "" if self.quantization == "none" else f", model.quantization {self.quantization}"
        again = ", training.gradient_checkpointing" if self.checkpointing else ""
        return f"model.dtype {self.dtype}{bits}{again}, resources.micro_batch {self.micro_batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Sizes of a model and of one example's pass through it, in values."""

    linear: int
    """Weights of linear layers that can be quantized."""
    other: int
    """Other weights of the base model."""
    whole: int
    """Weights of the head and of modules that are trained whole."""
    factors: int
    """LoRA factors."""
    kept: int
    """Bytes that the forward pass of one example keeps for gradients, in float32."""
    layer: int
    """Bytes of activations between two layers."""
    layers: int
    """Layers whose activations checkpointing computes twice."""
    logits: int
    """Logits of one example."""
    checkpoints: bool = True
    """Whether transformers can compute the model's activations twice."""

    def needed(self, setting: Setting) -> int:
        """Bytes that a training step takes, about: the model, what is trained, activations."""
        wide = _BYTES[setting.dtype]
        linear = self.linear * _QUANTIZED.get(setting.quantization, wide)
        copies = weight_copies(keeps_moments=setting.keeps_moments)
        trained = _FLOAT * (self.factors + self.whole) * copies
        kept = self.kept
        if setting.checkpointing:
            kept = min(kept, kept // self.layers + self.layers * self.layer)
        example = kept * wide // _FLOAT + _LOGIT_COPIES * _FLOAT * self.logits
        return int(_SLACK * (linear + self.other * wide + trained + setting.micro_batch * example))


def blueprint(path: str, spec: TrainingSpec, rank: int) -> Blueprint:
    """Of a checkpoint, with factors of that rank and the longest examples that the federation allows.

    Raises: MODEL_INVALID if there is no such model, or if it cannot be built without its weights.
    """
    task = task_of(spec.task)
    settings = configuration(path, task, spec.labels)
    try:
        with quiet(), torch.device("meta"):
            model = task.loader.from_config(settings)
            return _measured(model, task, spec, rank)
    except Exception as error:  # a model can make torch raise anything
        raise invalid(f"its size is not known before it is loaded: {first_line(error)}") from error


def setting_of(config: AgentConfig, spec: TrainingSpec) -> Setting:
    """What the configuration says."""
    return Setting(
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        checkpointing=config.training.gradient_checkpointing,
        micro_batch=min(config.resources.micro_batch or spec.batch_size, spec.batch_size),
        keeps_moments=config.training.keeps_moments,
    )


def alternatives(now: Setting, *, private: bool = False, checkpoints: bool = True) -> Iterator[Setting]:
    """Settings that take less memory, those first that change less of what is learnt.

    Args:
        now: What is configured.
        private: Whether `privacy` is configured, which goes with float32 and without checkpointing.
        checkpoints: Whether the model's activations can be computed twice.
    """
    if private:
        yield replace(now, micro_batch=1)
        return
    again = replace(now, checkpointing=checkpoints)
    single = replace(again, micro_batch=1)
    yield from (again, single)
    if now.dtype == "float32":
        yield replace(single, dtype="bfloat16")
    for bits in ("8bit", "4bit"):
        yield replace(single, dtype="bfloat16" if now.dtype == "float32" else now.dtype, quantization=bits)


def free_memory(device: torch.device) -> Memory:
    """What training on that device may take: of the GPU, or of this process, which holds its libraries already."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total=total, free=free)
    return memory_here()


def own_bytes() -> int:
    """What this process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held


def _measured(model: Any, task: Task, spec: TrainingSpec, rank: int) -> Blueprint:  # noqa: ANN401
    head = (
        [name for name, _ in model.named_children() if name != model.base_model_prefix]
        if task.has_head
        else []
    )
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    whole = (*head, *spec.modules_to_save)
    model.requires_grad_(requires_grad=False)
    linear = factors = 0
    for name, module in model.named_modules():
        if obstacle(module) or module is output or _is_of(name, whole):
            continue
        is_linear = isinstance(module, LINEAR)
        linear += module.weight.numel() if is_linear else 0
        if _ends(name, spec.target_modules) or (is_linear and ALL_LINEAR in spec.target_modules):
            factors += rank * sum(matrix_shape(module))
            module.weight.requires_grad = True  # needs what the gradients of factors do: the layer's input
    counts = {name: value.numel() for name, value in model.named_parameters()}
    trained = sum(count for name, count in counts.items() if _is_of(name, whole))
    tokens = min(spec.max_tokens, getattr(model.config, "max_position_embeddings", None) or spec.max_tokens)
    kept, result = _kept(model, task.sized_inputs(model.config, tokens))
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return Blueprint(
        linear=linear,
        other=sum(counts.values()) - linear - trained,
        whole=trained,
        factors=factors,
        kept=kept,
        layer=_FLOAT * tokens * hidden,
        layers=max(1, layers),
        logits=result.numel() if task.predicts_next else 0,
        checkpoints=model.supports_gradient_checkpointing,
    )


def _kept(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes that a forward pass keeps for the gradients of its activations, and its logits."""
    weights = {_storage(value) for value in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        if key not in weights and key not in sizes:
            sizes[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or another storage could come to lie at its address
        return tensor

    hold_statistics(model)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits: torch.Tensor = model(**inputs).logits
    return sum(sizes.values()), logits


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - its address; on `meta` no data has one
    return address


def _is_of(name: str, modules: tuple[str, ...]) -> bool:
    return any(f".{name}.".find(f".{module}.") >= 0 for module in modules)


def _ends(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
