"""What all networks share: every client's factors in one batch, and how a cohort trains.

Written out rather than taken from PEFT: clients differ in their factors alone, so their batches share every frozen
product, and what frozen matrices make of an example is computed once. Ranks are filled up with zeros, whose gradients
are zero. AdamW, clipping by each client's own norm, no decay of weights: as agents train.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from compare.settings import MAX_GRADIENT_NORM
from compare.state import Held
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import Float64, LoraFactors

AT_ONCE = 500
"""Examples that are measured at once."""


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
        self.head = {name: _stacked([h.head[name] for h in clients]) for name in clients[0].head}
        """Empty where the model's own head is frozen."""
        self.seen: dict[str, torch.Tensor] = {}
        """What each matrix saw last [clients, rows, in]."""

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(next(iter(self.A.values())))

    def applied(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A matrix's output with what the clients' adapters add to it.

        Args:
            name: Of the matrix.
            x: What the matrix sees [clients * batch, positions, in], one client after the other.
            output: What the frozen matrix makes of it [clients * batch, positions, out].
        """
        rows = x.reshape(self.clients, -1, x.shape[-1])
        self.seen[name] = rows
        change = self.scaling * (rows @ self.A[name].mT) @ self.B[name].mT
        if name in self.beside:
            change = change + rows @ self.beside[name].mT
        return output + change.reshape(output.shape)

    def trainable(self, *, A: bool, B: bool) -> list[torch.Tensor]:
        """What an optimiser moves: the head always."""
        return [*(self.A.values() if A else ()), *(self.B.values() if B else ()), *self.head.values()]

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
                head={name: values[i].detach().numpy().copy() for name, values in self.head.items()},
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """A model's figures on some examples; the metric is the ratio of the sums."""

    totals: Float64
    """By example: 1 for one that is told rightly, or the nats of all that is predicted."""
    counts: Float64
    """By example: how much is predicted."""

    @property
    def mean(self) -> float:
        """Over all that is predicted."""
        return float(self.totals.sum() / self.counts.sum())


class Network(ABC):
    """The layers that are trained, and the examples they see."""

    matrices: tuple[Matrix, ...]
    """Those with adapters."""
    tensors: tuple[Tensor, ...]
    """The head; none where it is frozen."""

    @abstractmethod
    def loss(self, adapters: Adapters, indices: torch.Tensor) -> torch.Tensor:
        """Sum over clients of the mean loss of their examples [clients, batch]."""

    @abstractmethod
    def figures(self, adapters: Adapters, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Totals and counts, as of `Measured`, of one client's examples [batch]."""

    def train(self, clients: Sequence[Held], schedule: Schedule, scaling: float) -> list[Held]:
        """Every client after its local steps."""
        adapters = Adapters(self.matrices, clients, scaling)
        moved = adapters.trainable(A=schedule.train_A, B=schedule.train_B)
        for tensor in moved:
            tensor.requires_grad_()
        optimizer = torch.optim.AdamW(moved, lr=schedule.learning_rate, weight_decay=0.0)
        for chosen in zip(*schedule.batches, strict=True):
            self.loss(adapters, torch.tensor(chosen)).backward()  # type: ignore[no-untyped-call]
            _clip(moved)
            optimizer.step()
            optimizer.zero_grad()
        return adapters.held(clients)

    @torch.no_grad()
    def measured(self, held: Held, examples: NDArray[np.int64], scaling: float) -> Measured:
        """A model on some examples."""
        adapters = Adapters(self.matrices, [held], scaling)
        parts = [self.figures(adapters, part) for part in torch.split(torch.from_numpy(examples), AT_ONCE)]
        totals, counts = (torch.cat(each).double().numpy() for each in zip(*parts, strict=True))
        return Measured(totals=totals, counts=counts)

    @torch.no_grad()
    def moments(self, held: Held, examples: NDArray[np.int64], scaling: float) -> dict[str, Float64]:
        """Second moments [in, in] of what each matrix sees on some examples."""
        adapters = Adapters(self.matrices, [held], scaling)
        self.figures(adapters, torch.from_numpy(examples))
        rows = {name: x[0].double() for name, x in adapters.seen.items()}
        return {name: (x.mT @ x).numpy() for name, x in rows.items()}


class Classifier(Network):
    """A network whose trained head tells labels from one vector an example."""

    def __init__(self, labels: NDArray[np.int64], classes: int, width: int) -> None:
        """Takes labels by example, their number, and the width of the vector."""
        self._labels = torch.from_numpy(labels)
        self.tensors = (Tensor("weight", (classes, width)), Tensor("bias", (classes,)))

    @abstractmethod
    def pooled(self, adapters: Adapters, chosen: torch.Tensor) -> torch.Tensor:
        """[clients * batch, width] of examples [clients * batch], one client after the other."""

    def loss(self, adapters: Adapters, indices: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        logits, labels = self._logits(adapters, indices), self._labels[indices]
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / indices.shape[1]

    def figures(self, adapters: Adapters, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 for an example that is told rightly."""
        hits = self._logits(adapters, indices[None])[0].argmax(dim=1) == self._labels[indices]
        return hits, torch.ones_like(hits)

    def _logits(self, adapters: Adapters, indices: torch.Tensor) -> torch.Tensor:
        """[clients, batch, classes]."""
        pooled = self.pooled(adapters, indices.flatten()).view(*indices.shape, -1)
        return torch.baddbmm(adapters.head["bias"][:, None], pooled, adapters.head["weight"].mT)


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
