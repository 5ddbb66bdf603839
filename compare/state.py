"""What a client holds of the model: low-rank factors, what is frozen beside them, a head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import Float32, Float64, LoraFactors
from shelora.obfuscation import Obfuscation

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """ΔW = s B A + beside for every matrix, and the head."""

    factors: Mapping[str, LoraFactors]
    head: Mapping[str, Float32]
    beside: Mapping[str, Float32] = field(default_factory=dict)
    """What is added and not trained [out, in], by matrix; none where nothing is."""

    @property
    def rank(self) -> int:
        """Of the factors."""
        return int(next(iter(self.factors.values())).A.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """What every method knows of a run."""

    matrices: tuple[Matrix, ...]
    tensors: tuple[Tensor, ...]
    """The head."""
    ranks: tuple[int, ...]
    weights: Float64
    """Of the clients, of sum one."""
    scaling: float
    obfuscation: Obfuscation
    """Initial values: the same for every method."""
    steps_per_round: int
    learning_rate: float
    inputs: Mapping[str, Float64] = field(default_factory=dict)
    """Second moments of what each matrix sees on all clients' data before training [in, in]."""

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.ranks)

    @property
    def largest(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def initial(self, rank: int, A: Mapping[str, Float32] | None = None) -> Held:
        """B = 0, and A as PEFT draws it, or the first rows of a given one."""
        factors = {
            m.name: LoraFactors(
                np.zeros((m.out_features, rank), np.float32),
                self.obfuscation.initial_A(m.name, rank, m.in_features) if A is None else A[m.name][:rank],
            )
            for m in self.matrices
        }
        return Held(
            factors=factors,
            head={t.name: self.obfuscation.initial_tensor(t.name, t.shape) for t in self.tensors},
        )

    def mean_head(self, trained: Sequence[Held]) -> dict[str, Float32]:
        """The weighted mean of the heads."""
        return {
            t.name: np.tensordot(self.weights, np.stack([h.head[t.name] for h in trained]), axes=1).astype(
                np.float32
            )
            for t in self.tensors
        }

    def factor_bytes(self, rank: int, *, both: bool = True) -> int:
        """Bytes of factors of that rank and the head, in float32; of B alone if not both."""
        sides = sum(m.out_features + (m.in_features if both else 0) for m in self.matrices)
        return FLOAT_BYTES * (rank * sides + sum(t.size for t in self.tensors))


def dense(held: Held, name: str, scaling: float) -> Float64:
    """ΔW of one matrix [out, in]."""
    factors = held.factors[name]
    change: Float64 = scaling * (factors.B.astype(np.float64) @ factors.A)
    return change + held.beside[name] if name in held.beside else change


def effective_rank(change: Float64) -> float:
    """(Σ σ²)² / Σ σ⁴ of its singular values: how many directions carry an update; 0 if none does."""
    gram = change @ change.T
    squares = float(np.trace(gram))
    return squares**2 / float((gram**2).sum()) if squares else 0.0
