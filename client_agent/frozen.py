"""The part of an adapter that is not trained: it is added to what a layer computes, and saved with the trained part."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from client_agent.checkpoint import invalid
from client_agent.layers import product
from client_agent.starting import CONFIG, PREFIX, WEIGHTS
from shelora.lora.layout import Matrix
from shelora.lora.shards import LoraFactors


class Frozen:
    """Adds a fixed B A to what an adapted module computes. Not a PEFT adapter: those share scaling and are trained."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - PEFT's layers are untyped
        self.factors: LoraFactors | None = None
        self._base: nn.Module = layer.get_base_layer()
        self._A = self._B = torch.zeros(0)
        layer.register_forward_hook(self)

    def hold(self, factors: LoraFactors | None, device: torch.device) -> None:
        """Replaces the factors; None or none of them add nothing."""
        self.factors = factors if factors is not None and factors.A.size else None
        if self.factors is not None:
            self._A = torch.from_numpy(np.array(self.factors.A, dtype=np.float32)).to(device)
            self._B = torch.from_numpy(np.array(self.factors.B, dtype=np.float32)).to(device)

    def __call__(
        self, _layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        if self.factors is None:
            return output
        x = inputs[0].to(self._A.dtype)
        return output + product(self._base, x, self._B, self._A).to(output.dtype)


def joined(*pairs: LoraFactors | None) -> LoraFactors | None:
    """Factors of the sum; None of nothing."""
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None
    return LoraFactors(B=np.hstack([pair.B for pair in there]), A=np.vstack([pair.A for pair in there]))


def require_shapes(matrix: Matrix, frozen: LoraFactors | None) -> None:
    """Raises: MODEL_INVALID if the factors do not fit the matrix; their rank may be any."""
    if frozen is None:
        return
    width = frozen.A.shape[0] if frozen.A.ndim == 2 else 0
    shapes = (matrix.out_features, width), (width, matrix.in_features)
    if (frozen.B.shape, frozen.A.shape) != shapes:
        raise invalid(f"the weights are of another model: the frozen part of {matrix.name} has other shapes")


def widen(folder: Path, beside: Mapping[str, LoraFactors | None], scaling: float) -> None:
    """Puts frozen factors into a saved adapter, padded to one rank: B_frozen / s beside B, A_frozen under A.

    Args:
        folder: Of the adapter, as PEFT saved it.
        beside: The frozen factors by matrix name; None where there are none.
        scaling: The s of the trained part.
    """
    width = max((len(pair.A) for pair in beside.values() if pair), default=0)
    if not width:
        return
    weights_file, config_file = folder / WEIGHTS, folder / CONFIG
    arrays = safetensors.numpy.load_file(weights_file)
    for name, frozen in beside.items():
        A_key, B_key = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
        _, *columns = arrays[A_key].shape  # of a convolution [rank, in, height, width]
        rows, _, *point = arrays[B_key].shape
        A, B = np.zeros((width, *columns)), np.zeros((rows, width, *point))
        if frozen is not None:
            own = len(frozen.A)
            A[:own] = frozen.A.reshape(own, *columns)
            B[:, :own] = (frozen.B / scaling).reshape(rows, own, *point)
        arrays[A_key] = np.concatenate([arrays[A_key], A]).astype(np.float32)
        arrays[B_key] = np.concatenate([arrays[B_key], B], axis=1).astype(np.float32)
    config = json.loads(config_file.read_text())
    config["r"] += width
    config["lora_alpha"] = scaling * (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    safetensors.numpy.save_file(arrays, weights_file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
