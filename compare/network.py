"""The last layer of MiniLM with a head, for a whole cohort at once: every client's factors in one batch.

Written out rather than taken from PEFT: clients differ in their factors alone, so their batches share every frozen
product, and what the frozen queries, keys and values make of an example is computed once. Ranks are filled up with
zeros, whose gradients are zero. AdamW, clipping by each client's own norm, no decay of weights: as agents train.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import functional

from compare.data import FROZEN_LAYERS, Encoded, encoded
from compare.settings import MAX_GRADIENT_NORM
from compare.state import Held
from examples.reuters.assets import MINILM, fetch
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import Float64, LoraFactors

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


class Adapters:
    """Clients' trainable values as tensors with a first axis of clients."""

    def __init__(self, matrices: Sequence[Matrix], clients: Sequence[Held], scaling: float) -> None:
        rank = max(held.rank for held in clients)
        self.scaling = scaling
        self.A = {
            m.name: _stacked([_padded(h.factors[m.name].A, 0, rank) for h in clients]) for m in matrices
        }
        self.B = {
            m.name: _stacked([_padded(h.factors[m.name].B, 1, rank) for h in clients]) for m in matrices
        }
        self.beside = {
            m.name: _stacked([h.beside[m.name] for h in clients])
            for m in matrices
            if m.name in clients[0].beside
        }
        self.weight = _stacked([h.head["weight"] for h in clients])
        self.bias = _stacked([h.head["bias"] for h in clients])

    def added(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What a client's adapter adds to a matrix's output; x [clients, rows, in]."""
        change = self.scaling * (x @ self.A[name].mT) @ self.B[name].mT
        return change + x @ self.beside[name].mT if name in self.beside else change

    def trainable(self, *, A: bool, B: bool) -> list[torch.Tensor]:
        """What an optimiser moves: the head always."""
        sides = [*(self.A.values() if A else ()), *(self.B.values() if B else ())]
        return [*sides, self.weight, self.bias]

    def held(self, clients: Sequence[Held]) -> list[Held]:
        """The values by client, cut to its rank."""
        return [
            Held(
                factors={
                    name: LoraFactors(
                        self.B[name][i, :, : held.rank].detach().numpy().copy(),
                        self.A[name][i, : held.rank].detach().numpy().copy(),
                    )
                    for name in self.A
                },
                head={
                    "weight": self.weight[i].detach().numpy().copy(),
                    "bias": self.bias[i].detach().numpy().copy(),
                },
                beside=held.beside,
            )
            for i, held in enumerate(clients)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a cohort trains in a round."""

    batches: Sequence[Sequence[Sequence[int]]]
    """Examples by client and step; as many in each."""
    learning_rate: float
    train_A: bool = True
    train_B: bool = True


class Network:
    """The frozen layers, and the examples they see."""

    def __init__(self, weights: Mapping[str, torch.Tensor], data: Encoded) -> None:
        """Takes MiniLM's weights by name."""
        layer = f"encoder.layer.{FROZEN_LAYERS}"
        self._parts = {
            name: (weights[f"{layer}.{part}.weight"], weights[f"{layer}.{part}.bias"])
            for name, part in _PARTS.items()
        }
        self._pooler = weights["pooler.dense.weight"], weights["pooler.dense.bias"]
        self._states = torch.from_numpy(data.states)
        self._mask = torch.where(torch.from_numpy(data.present), 0.0, -1e4)
        self._labels = torch.from_numpy(data.labels)
        # Of the last layer only the first position is used.
        self._frozen = {
            "query": functional.linear(self._states[:, :1], *self._parts["query"]),
            **{part: functional.linear(self._states, *self._parts[part]) for part in ("key", "value")},
        }
        self.width = data.states.shape[2]
        self.matrices = tuple(Matrix(part, self.width, self.width) for part in ADAPTED)
        self.tensors = (Tensor("weight", (data.classes, self.width)), Tensor("bias", (data.classes,)))

    def train(self, clients: Sequence[Held], schedule: Schedule, scaling: float) -> list[Held]:
        """Every client after its local steps."""
        adapters = Adapters(self.matrices, clients, scaling)
        moved = adapters.trainable(A=schedule.train_A, B=schedule.train_B)
        for tensor in moved:
            tensor.requires_grad_()
        optimizer = torch.optim.AdamW(moved, lr=schedule.learning_rate, weight_decay=0.0)
        for chosen in zip(*schedule.batches, strict=True):
            indices = torch.tensor(chosen)
            logits = self._logits(adapters, indices)
            loss = functional.cross_entropy(
                logits.flatten(0, 1), self._labels[indices].flatten(), reduction="sum"
            )
            (loss / indices.shape[1]).backward()  # type: ignore[no-untyped-call]
            _clip(moved)
            optimizer.step()
            optimizer.zero_grad()
        return adapters.held(clients)

    @torch.no_grad()
    def hits(self, held: Held, examples: NDArray[np.int64], scaling: float) -> NDArray[np.bool_]:
        """Whether each example is told rightly."""
        adapters = Adapters(self.matrices, [held], scaling)
        parts = torch.split(torch.from_numpy(examples), 500)
        found = torch.cat([self._logits(adapters, part[None])[0].argmax(dim=1) for part in parts])
        hits: NDArray[np.bool_] = (found == self._labels[torch.from_numpy(examples)]).numpy()
        return hits

    @torch.no_grad()
    def moments(self, held: Held, examples: NDArray[np.int64], scaling: float) -> dict[str, Float64]:
        """Second moments [in, in] of what each matrix sees on some examples."""
        seen: dict[str, torch.Tensor] = {}
        self._logits(Adapters(self.matrices, [held], scaling), torch.from_numpy(examples)[None], seen)
        return {
            name: (x.flatten(0, -2).double().mT @ x.flatten(0, -2).double()).numpy()
            for name, x in seen.items()
        }

    def _logits(
        self, adapters: Adapters, indices: torch.Tensor, seen: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[clients, batch, classes] of examples [clients, batch]."""
        clients, batch = indices.shape

        def adapted(part: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            """What the frozen part makes of x [clients * batch, positions, width], and the adapter's share."""
            if seen is not None:
                seen[part] = x
            return output + adapters.added(part, x.reshape(clients, -1, self.width)).reshape(output.shape)

        chosen = indices.flatten()
        x, mask = self._states[chosen], self._mask[chosen]
        first = x[:, :1]
        queries = _by_head(adapted("query", first, self._frozen["query"][chosen]))
        values = _by_head(adapted("value", x, self._frozen["value"][chosen]))
        keys = _by_head(self._frozen["key"][chosen])
        scores = queries @ keys.mT / math.sqrt(self.width / HEADS) + mask[:, None, None]
        heads = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        attended = adapted("attended", heads, functional.linear(heads, *self._parts["attended"]))
        y = self._normed(attended + first, "attended_norm")
        wide = functional.gelu(functional.linear(y, *self._parts["wide"]))
        z = self._normed(functional.linear(wide, *self._parts["narrow"]) + y, "norm")
        pooled = torch.tanh(functional.linear(z[:, 0], *self._pooler)).view(clients, batch, self.width)
        return torch.baddbmm(adapters.bias[:, None], pooled, adapters.weight.mT)

    def _normed(self, x: torch.Tensor, norm: str) -> torch.Tensor:
        return functional.layer_norm(x, (self.width,), *self._parts[norm], EPSILON)


@cache
def network(name: str, assets: Path, store: Path) -> Network:
    """The network that sees a data set; one for all cells of a process."""
    return Network(load_file(fetch(MINILM, assets) / "model.safetensors"), encoded(name, assets, store))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def _clip(tensors: Sequence[torch.Tensor]) -> None:
    """Scales every client's gradients to a norm of MAX_GRADIENT_NORM at most."""
    gradients = [t.grad for t in tensors if t.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0).sqrt()
    factors = (MAX_GRADIENT_NORM / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def _padded(values: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    width = [(0, 0), (0, 0)]
    width[axis] = (0, size - values.shape[axis])
    return np.pad(values, width)


def _stacked(values: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(values).astype(np.float32))
