"""Methods that send their updates in the clear, and the two that send nothing: pooled training, each client alone."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from compare.methods.port import Outcome
from compare.state import Held, World
from shelora.lora.algebra import reparameterize
from shelora.lora.shards import FactoredUpdate, Float32, Float64, LoraFactors

PROTECTED: Final = 0.1
"""Share of columns that a budget would encrypt, for what becomes of them elsewhere."""
EVEN_ROW: Final = 1 / np.sqrt(3)
"""Norm of a row of PEFT's initial A, uniform within 1/sqrt(columns)."""


class _Clear:
    """What the methods share."""

    pooled = False
    _world: World

    def begin(self, world: World) -> Sequence[Held]:
        """B = 0 and the first rows of one A."""
        self._world = world
        return [world.initial(rank) for rank in world.ranks]

    def trains(self, number: int) -> tuple[bool, bool]:  # noqa: ARG002 - the same in every round
        """Both factors."""
        return True, True


class ExactSum(_Clear):
    """FlexLoRA (Bai et al., arXiv 2402.11505): Σ w s B A in the clear, cut to every client's rank by its SVD."""

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:  # noqa: ARG002 - the same in every round
        """As of `Method`."""
        world, began = self._world, time.process_time()
        sums = {m.name: self.altered(m.name, _sum(world, m.name, trained)) for m in world.matrices}
        head = world.mean_head(trained)
        cut = {rank: self._cut(sums, head, rank) for rank in {*world.ranks}}
        spent = time.process_time() - began
        sent = float(np.mean([world.factor_bytes(rank) for rank in world.ranks]))
        return Outcome(
            held=[cut[rank] for rank in world.ranks],
            models=[cut[world.largest]],
            up=sent,
            down=sent,
            server_s=spent,
        )

    def altered(self, name: str, update: FactoredUpdate) -> FactoredUpdate:  # noqa: ARG002
        """What becomes of a matrix's sum."""
        return update

    def _cut(self, sums: Mapping[str, FactoredUpdate], head: Mapping[str, Float32], rank: int) -> Held:
        initial = self._world.initial(rank)
        return Held(
            factors={
                name: reparameterize(update, rank, self._world.scaling, initial.factors[name].A)
                for name, update in sums.items()
            },
            head=head,
        )


class Dropped(ExactSum):
    """The columns that SHE-LoRA would encrypt are not sent: PROTECTED of them, those whose inputs are largest."""

    def altered(self, name: str, update: FactoredUpdate) -> FactoredUpdate:
        """As of `ExactSum`."""
        M = update.M.copy()
        M[:, _sensitive(self._world, name)] = 0
        return FactoredUpdate(update.Q, M)


class AsPublished(ExactSum):
    """SHE-LoRA's published code: the encrypted part is divided by the number of clients twice.

    And the columns that change places with it, the last ones, are lost.
    """

    def altered(self, name: str, update: FactoredUpdate) -> FactoredUpdate:
        """As of `ExactSum`."""
        M, columns = update.M.copy(), _sensitive(self._world, name)
        lost = np.setdiff1d(np.arange(M.shape[1] - len(columns), M.shape[1]), columns)
        M[:, columns] /= self._world.clients
        M[:, lost] = 0
        return FactoredUpdate(update.Q, M)


def _sensitive(world: World, name: str) -> NDArray[np.intp]:
    sizes = np.diagonal(world.inputs[name])
    return np.argsort(-sizes, kind="stable")[: round(PROTECTED * len(sizes))]


def _sum(world: World, name: str, trained: Sequence[Held]) -> FactoredUpdate:
    """Σ w s B A = Q M."""
    B = np.hstack(
        [w * world.scaling * h.factors[name].B for w, h in zip(world.weights, trained, strict=True)]
    )
    A = np.vstack([h.factors[name].A for h in trained]).astype(np.float64)
    Q, R = np.linalg.qr(B)
    return FactoredUpdate(Q, R @ A)


class _Averaged(_Clear):
    """Factors are averaged apart; of a component only over clients whose rank reaches it."""

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:
        """As of `Method`."""
        world, began = self._world, time.process_time()
        aligned = self.aligned(trained, number)
        whole = Held(
            factors={m.name: _mean(world, [h.factors[m.name] for h in aligned]) for m in world.matrices},
            head=world.mean_head(trained),
        )
        spent = time.process_time() - began
        held = [_first(whole, rank) for rank in world.ranks]
        both = all(self.trains(number))
        sent = float(np.mean([world.factor_bytes(rank, both=both) for rank in world.ranks]))
        return Outcome(held=held, models=[whole], up=sent, down=sent, server_s=spent)

    def aligned(self, trained: Sequence[Held], number: int) -> Sequence[Held]:  # noqa: ARG002
        """What is averaged."""
        return trained


def _mean(world: World, factors: Sequence[LoraFactors]) -> LoraFactors:
    rows, columns = factors[0].B.shape[0], factors[0].A.shape[1]
    B, A = np.zeros((rows, world.largest)), np.zeros((world.largest, columns))
    weights = np.zeros(world.largest)
    for weight, own in zip(world.weights.tolist(), factors, strict=True):
        rank = own.A.shape[0]
        B[:, :rank] += weight * own.B
        A[:rank] += weight * own.A
        weights[:rank] += weight
    return LoraFactors((B / weights).astype(np.float32), (A / weights[:, None]).astype(np.float32))


def _first(held: Held, rank: int) -> Held:
    factors = {name: LoraFactors(f.B[:, :rank], f.A[:rank]) for name, f in held.factors.items()}
    return replace(held, factors=factors)


class FedIt(_Averaged):
    """FedIT (Zhang et al., arXiv 2305.05644): A and B averaged apart. Means of products they are not."""


class FrozenA(_Averaged):
    """FFA-LoRA (Sun et al., ICLR 2024): B alone is trained, under one A at random."""

    def trains(self, number: int) -> tuple[bool, bool]:  # noqa: ARG002 - the same in every round
        """B."""
        return False, True


class PrincipalA(FrozenA):
    """FFA-LoRA with A along the leading directions of what the matrices see, pooled over clients."""

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`."""
        super().begin(world)
        A = {name: EVEN_ROW * _leading(moments, world.largest) for name, moments in world.inputs.items()}
        return [world.initial(rank, A) for rank in world.ranks]


def _leading(moments: Float64, count: int) -> Float32:
    """Eigenvectors [count, n] of the largest eigenvalues."""
    _, vectors = np.linalg.eigh(moments)
    return vectors[:, ::-1][:, :count].T.astype(np.float32)


class Alternating(_Averaged):
    """RoLoRA (Chen et al., arXiv 2502.01755): B and A in turn, so that means of products are exact (of equal ranks)."""

    def trains(self, number: int) -> tuple[bool, bool]:
        """B in odd rounds, A in even ones."""
        return number % 2 == 0, number % 2 == 1


class Rotated(_Averaged):
    """FedRot-LoRA: factors are turned towards the last global ones before they are averaged apart.

    Turning changes no product: B Rᵀ and R A with an orthogonal R, the one that comes closest to the last A in odd
    rounds and to the last B in even ones (orthogonal Procrustes; Schönemann, 1966).
    """

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`."""
        self._last = world.initial(world.largest)
        return super().begin(world)

    def aligned(self, trained: Sequence[Held], number: int) -> Sequence[Held]:
        """As of `_Averaged`."""
        return [
            replace(
                h,
                factors={
                    n: _turned(f, self._last.factors[n], by_A=number % 2 == 1) for n, f in h.factors.items()
                },
            )
            for h in trained
        ]

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:
        """As of `Method`."""
        outcome = super().combine(trained, number)
        (self._last,) = outcome.models
        return outcome


def _turned(own: LoraFactors, last: LoraFactors, *, by_A: bool) -> LoraFactors:
    rank = own.A.shape[0]
    match = last.A[:rank] @ own.A.T if by_A else last.B[:, :rank].T @ own.B
    left, _, right = np.linalg.svd(match.astype(np.float64))
    R = (left @ right).astype(np.float32)
    return LoraFactors(own.B @ R.T, R @ own.A)


class Stacked(_Clear):
    """FLoRA (Wang et al., NeurIPS 2024): everybody's factors are handed to everybody and merged into the model.

    Every round begins with fresh factors, and clients fetch as many directions as all of them together have.
    """

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`."""
        held = super().begin(world)
        self._merged = {m.name: np.zeros((m.out_features, m.in_features), np.float32) for m in world.matrices}
        return held

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:  # noqa: ARG002 - the same in every round
        """As of `Method`."""
        world, began = self._world, time.process_time()
        head = world.mean_head(trained)
        spent = time.process_time() - began  # servers pass factors on; clients merge
        for m in world.matrices:
            update = _sum(world, m.name, trained)
            self._merged[m.name] = (self._merged[m.name] + update.Q @ update.M).astype(np.float32)
        held = [replace(world.initial(rank), head=head, beside=dict(self._merged)) for rank in world.ranks]
        model = replace(world.initial(world.largest), head=head, beside=dict(self._merged))
        up = float(np.mean([world.factor_bytes(rank) for rank in world.ranks]))
        down = float(world.factor_bytes(sum(world.ranks)))
        return Outcome(held=held, models=[model], up=up, down=down, server_s=spent)


class Pooled(_Clear):
    """One model of the largest rank on everybody's data: what federation is measured against."""

    pooled = True

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`: one client."""
        self._world = world
        return [world.initial(world.largest)]

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:  # noqa: ARG002 - the same in every round
        """As of `Method`."""
        return Outcome(held=trained, models=trained, up=0.0, down=0.0)


class Alone(_Clear):
    """Every client trains on its own data and shares nothing."""

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:  # noqa: ARG002 - the same in every round
        """As of `Method`."""
        return Outcome(held=trained, models=trained, up=0.0, down=0.0)
