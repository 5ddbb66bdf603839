"""Layers of large models whose linear maps all carry adapters, [out, in], as their authors publish them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bench.workload import Workload

Shapes = Mapping[str, tuple[int, int]]


def _attention(hidden: int, keys: int) -> Shapes:
    return {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}


def _feed_forward(hidden: int, inner: int, prefix: str = "") -> Shapes:
    return {
        f"{prefix}gate": (inner, hidden),
        f"{prefix}up": (inner, hidden),
        f"{prefix}down": (hidden, inner),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A stack of equal layers."""

    layers: int
    shapes: Shapes
    """Of one layer's matrices."""
    source: str


MODELS: Final[Mapping[str, Model]] = {
    "llama-7b": Model(
        layers=32,
        shapes={**_attention(4096, 4096), **_feed_forward(4096, 11008)},
        source="Llama 2, arXiv 2307.09288",
    ),
    "llama-70b": Model(
        layers=80,
        shapes={**_attention(8192, 1024), **_feed_forward(8192, 28672)},
        source="Llama 2 with grouped queries, arXiv 2307.09288",
    ),
    "mixtral-8x7b": Model(
        layers=32,
        shapes={
            **_attention(4096, 1024),
            **{
                name: shape
                for expert in range(8)
                for name, shape in _feed_forward(4096, 14336, f"expert-{expert}.").items()
            },
        },
        source="Mixtral of Experts, arXiv 2401.04088; experts as linear maps of their own, the router without adapter",
    ),
}


@dataclass(frozen=True)
class Layer(Workload):
    """One layer of a model, as a round of its own."""

    model: str = "llama-7b"

    @property
    def names(self) -> list[str]:
        """Of its matrices."""
        return list(MODELS[self.model].shapes)

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns."""
        return MODELS[self.model].shapes[name]

    @property
    def plain_bytes(self) -> int:
        """Of its factors in float32."""
        return 4 * self.rank * sum(sum(self.shape(name)) for name in self.names)
