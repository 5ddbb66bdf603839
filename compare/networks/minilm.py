"""The last layer of MiniLM with a head."""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch.nn import functional

from compare.data import Encoded
from compare.networks.port import Adapters, Classifier
from shelora.lora.layout import Matrix

FROZEN_LAYERS: Final = 5
"""Of MiniLM's six; the last one carries adapters."""
HEADS: Final = 12
EPSILON: Final = 1e-12
_PARTS: Final = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "attended_norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}
ADAPTED: Final = ("query", "value", "attended")
"""Matrices with adapters, all square."""


class MiniLm(Classifier):
    """Inputs: `states` [examples, positions, width], and whether a position is `present` [examples, positions]."""

    def __init__(self, weights: Mapping[str, torch.Tensor], data: Encoded) -> None:
        """Takes MiniLM's weights by name."""
        layer = f"encoder.layer.{FROZEN_LAYERS}"
        self._parts = {
            name: (weights[f"{layer}.{part}.weight"], weights[f"{layer}.{part}.bias"])
            for name, part in _PARTS.items()
        }
        self._pooler = weights["pooler.dense.weight"], weights["pooler.dense.bias"]
        self._states = torch.from_numpy(data.inputs["states"])
        self._mask = torch.where(torch.from_numpy(data.inputs["present"]), 0.0, -1e4)
        # Of the last layer only the first position is used.
        self._frozen = {
            "query": functional.linear(self._states[:, :1], *self._parts["query"]),
            **{part: functional.linear(self._states, *self._parts[part]) for part in ("key", "value")},
        }
        self._width = self._states.shape[2]
        self.matrices = tuple(Matrix(part, self._width, self._width) for part in ADAPTED)
        super().__init__(data.labels, data.classes, self._width)

    def pooled(self, adapters: Adapters, chosen: torch.Tensor) -> torch.Tensor:
        """As of `Classifier`."""
        x, mask = self._states[chosen], self._mask[chosen]
        first = x[:, :1]
        queries = _by_head(adapters.applied("query", first, self._frozen["query"][chosen]))
        values = _by_head(adapters.applied("value", x, self._frozen["value"][chosen]))
        keys = _by_head(self._frozen["key"][chosen])
        scores = queries @ keys.mT / math.sqrt(self._width / HEADS) + mask[:, None, None]
        heads = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        attended = adapters.applied("attended", heads, functional.linear(heads, *self._parts["attended"]))
        y = self._normed(attended + first, "attended_norm")
        wide = functional.gelu(functional.linear(y, *self._parts["wide"]))
        z = self._normed(functional.linear(wide, *self._parts["narrow"]) + y, "norm")
        return torch.tanh(functional.linear(z[:, 0], *self._pooler))

    def _normed(self, x: torch.Tensor, norm: str) -> torch.Tensor:
        return functional.layer_norm(x, (self._width,), *self._parts[norm], EPSILON)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)
