"""In which numbers the frozen base model is held. What is trained, and what goes into sums, stays float32.

The base is digested as it lies on disk and lowered afterwards, so that agents of one federation may differ here: each
trains the same factors beside its own rounding of the same weights.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from client_agent.checkpoint import Checkpoint, invalid, under
from client_agent.config import ModelConfig, Quantization, TrainingSettings
from client_agent.layers import keeps_statistics
from shelora.errors import DomainError, Reason

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZED_ON: Final = ("cpu", "cuda")
_OUTLIER: Final = 6.0
"""Activations beyond are multiplied in 16 bits under 8-bit weights (Dettmers et al., LLM.int8(), NeurIPS 2022)."""

_LEAST_WEIGHTS: Final = 4096
"""Smaller layers gain nothing, and bitsandbytes 0.50 rounds them to 4 bits with up to four times the error on a CPU."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Numbers of the base model."""

    dtype: torch.dtype = torch.float32
    """Of weights that are not quantized, and of activations."""
    quantization: Quantization = "none"
    """Of linear layers but the head and the output embeddings."""

    @property
    def is_full(self) -> bool:
        """Whether everything is float32."""
        return self.dtype == torch.float32 and self.quantization == "none"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return dtype if self.quantization == "none" else f"{self.quantization}, the rest {dtype}"


FULL: Final = Precision()


def choose_precision(model: ModelConfig, training: TrainingSettings, device: torch.device) -> Precision:
    """The precision that the configuration asks for.

    Raises: DomainError CONFIGURATION_INVALID if that device cannot train in it, or a package is not installed.
    """
    if training.optimizer.endswith("8bit"):
        _require_bitsandbytes("training.optimizer", training.optimizer)
        if device.type != "cuda":
            raise _refused(
                "training.optimizer", training.optimizer, "runs only on CUDA devices: take adamw_torch"
            )
    if model.dtype == "float16" and device.type != "cuda":
        raise _refused(
            "model.dtype",
            model.dtype,
            f"loses small gradients unless losses are scaled, which needs a CUDA device, not {device.type}: take "
            "bfloat16, which takes as little memory",
        )
    if model.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise _refused("model.dtype", model.dtype, "is not supported by this CUDA device: take float16")
    if model.quantization != "none":
        _require_bitsandbytes("model.quantization", model.quantization)
        if device.type not in _QUANTIZED_ON:
            raise _refused(
                "model.quantization", model.quantization, f"does not run on {device.type}: take none"
            )
    return Precision(_DTYPES[model.dtype], model.quantization)


def lower(checkpoint: Checkpoint, whole: Sequence[str], precision: Precision, device: torch.device) -> None:
    """Lowers the base model in place, a layer at a time; modules that are trained whole become float32.

    Args: whole: Names of modules that are trained whole, the head's included.
    Raises: MODEL_INVALID if there is no layer to quantize.
    """
    model = checkpoint.model
    if precision.quantization != "none":
        _quantize(model, whole, precision, device)
    kept = _kept_whole(model, precision)
    norms = [name for name, module in model.named_modules() if keeps_statistics(module)]
    for name in norms:
        model.get_submodule(name).float()  # torch normalizes activations of any type with these
    for name, parameter in model.named_parameters():
        if under(name, [*whole, *norms]) or kept(name):
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point() and not _is_quantized(parameter):
            parameter.data = parameter.data.to(precision.dtype)
    model.config.dtype = precision.dtype


def compute_in_float32(module: nn.Module, given: torch.dtype | None) -> None:
    """Has a module of float32 take activations of another type.

    Args: given: The type of its results; None leaves them float32, as the head's.
    """
    module.register_forward_pre_hook(_widened, with_kwargs=True)
    if given is not None:
        module.register_forward_hook(lambda _module, _args, result: _cast(result, given))


def plain_weight(layer: Any) -> torch.Tensor:  # noqa: ANN401 - of torch or of bitsandbytes
    """The weight of a linear layer as numbers, also of a quantized one; [as it is stored], no copy of a plain one."""
    weight: nn.Parameter = layer.weight
    if not _is_quantized(weight):
        return weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight  # noqa: PLC0415 - needs bitsandbytes

    plain: torch.Tensor = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return plain.detach()


def _refused(field: str, value: str, why: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, f"{field} = {value}: {why}")


def _require_bitsandbytes(field: str, value: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise _refused(
            field,
            value,
            "needs the package bitsandbytes, which is not installed: pip install 'shelora[agent,quantized]'",
        )


def _quantize(
    model: PreTrainedModel, whole: Sequence[str], precision: Precision, device: torch.device
) -> None:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.numel() >= _LEAST_WEIGHTS
        and module is not output
        and not under(name, whole)
    ]
    if not chosen:
        raise invalid(
            f"model.quantization = {precision.quantization}: the model has no linear layer that bitsandbytes "
            f"quantizes (of {_LEAST_WEIGHTS:,} weights or more; GPT-2 and its like have none): set it to none"
        )
    for name in chosen:
        model.set_submodule(name, _quantized(model.get_submodule(name), precision, device))
    # What PEFT chooses its layers by.
    setattr(model, f"is_loaded_in_{precision.quantization}", True)


def _quantized(layer: nn.Linear, precision: Precision, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb  # noqa: PLC0415 - an extra of its own

    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    made: Any
    if precision.quantization == "4bit":
        made = bnb.nn.Linear4bit(
            *shape,
            compute_dtype=precision.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            layer.weight.data.to(precision.dtype),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=made,
        )
        # Evaluating on some processors would repack the weights for good, into a form that gives no gradients.
        made.support_avx512bf16_for_cpu = False
    else:
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=_OUTLIER, device="meta")
        made.weight = bnb.nn.Int8Params(
            layer.weight.data.float(), requires_grad=False, has_fp16_weights=False
        )
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(precision.dtype), requires_grad=False)
    moved: nn.Module = made.to(device)
    return moved


def _is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ in {"Params4bit", "Int8Params"}


def _kept_whole(model: PreTrainedModel, precision: Precision) -> Callable[[str], bool]:
    """What transformers holds in float32 whatever the rest is in: some models overflow otherwise."""
    words = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if precision.dtype == torch.float16:
        words |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name: bool(words & set(name.split(".")))


def _widened(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    wide = torch.float32
    return tuple(_cast(value, wide) for value in args), {k: _cast(v, wide) for k, v in kwargs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - whatever a module takes and gives
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
