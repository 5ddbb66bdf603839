"""A decrypted sum beside what this client held and trained: how much of its change is taken over.

`shelora.lora.moderation` has the rule; this applies it to each matrix and to the tensors of a shard together, so that a
result need not be in memory as a whole. A client that trained nothing for a round takes its result as it is: it has
nothing to measure by, and cannot tell a far step from the rounds that it missed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import structlog

from client_agent.learning import Weights
from client_agent.plausibility import Motion
from shelora.lora.moderation import moderated, remembered
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate, Float32, Float64
from shelora.lora.sketches import best_cut, joined

ROUNDING: Final = 1e-6
"""An own step over what it began from that is rounding: a client that moved nothing has nothing to measure by."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Moderator:
    """What one client knows of honest changes."""

    before: Weights
    """What it held when the rounds began whose result this is."""
    own: Weights
    """What it trained from there."""
    scaling: float
    """The s of its s B A."""
    rounds: int = 1
    """Training rounds since, as servers say: it may have missed some. Below 1 a later result was taken back, and there
    is nothing to measure by. It is 1 if this client's own update is in the result, whatever they say."""
    changes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By name, what is remembered after this result."""
    summed: bool = False
    """Whether servers could only add up the result, so that nobody has screened it, and no noise hides it."""
    contributors: int = 0
    """How many clients' updates it has."""
    own_share: float = 0.0
    """This client's share of it."""
    motion: Motion = field(default_factory=Motion)
    """How it changes the matrices, all of them together, before it is cut."""

    def parts(self, parts: Iterable[Restored]) -> Iterator[Restored]:
        """The parts of a result, what is too long cut. Raises: VALUE_NOT_FINITE."""
        for part in parts:
            if part.own_share:
                self.rounds = 1
            judged = part.summed and not part.noisy and self.rounds > 0
            self.summed = self.summed or judged
            self.contributors = max(self.contributors, part.contributors)
            self.own_share = max(self.own_share, part.own_share)
            yield self._part(part) if judged else part

    def _part(self, part: Restored) -> Restored:
        return replace(
            part,
            matrices={name: self._matrix(name, update) for name, update in part.matrices.items()},
            tensors=self._tensors(part.tensors),
        )

    def _matrix(self, name: str, update: FactoredUpdate) -> FactoredUpdate:
        B, A = self._held(self.before, name)
        trained_B, trained_A = self._held(self.own, name)
        own_L, own_R = np.hstack([trained_B, -B]), np.vstack([trained_A, A])
        L, R = np.hstack([update.Q, -B]), np.vstack([update.M, A])
        own, change, held = _norm(own_L, own_R), _norm(L, R), _norm(B, A)
        own = own if own > ROUNDING * held else 0.0
        self.motion.add(float(np.sum((L.T @ own_L) * (R @ own_R.T))), change, own, held)
        factor = self._factor(name, change, own)
        if factor == 1:
            return update
        basis, triangular = np.linalg.qr(np.hstack([factor * update.Q, (1 - factor) * B]))
        mixed = FactoredUpdate(basis, triangular @ np.vstack([update.M, A]))
        return best_cut(mixed, max(len(update.M), len(A)))

    def _tensors(self, tensors: dict[str, Float32]) -> dict[str, Float32]:
        """Tensors together: a bias of some values moves by chance, and honest clients' by more than a multiple."""
        if not tensors:
            return tensors
        before = {name: self.before.tensors[name].astype(np.float64) for name in tensors}
        change = {name: value - before[name] for name, value in tensors.items()}
        own = {name: self.own.tensors[name] - before[name] for name in tensors}
        factor = self._factor(min(tensors), _joint_norm(change), _joint_norm(own))
        if factor == 1:
            return tensors
        return {name: (before[name] + factor * change[name]).astype(np.float32) for name in tensors}

    def _factor(self, name: str, change: float, own: float) -> float:
        last = self.before.changes.get(name, ())
        found = moderated(change / self.rounds, own, last)
        self.changes[name] = remembered(last, found.accepted, own)
        if found.cut:
            _log.warning("change_cut", name=name, change=change, taken_over=found.accepted * self.rounds)
        return found.factor

    def _held(self, weights: Weights, name: str) -> tuple[Float64, Float64]:
        return joined(weights.factors[name], self.scaling, weights.frozen.get(name))


def _joint_norm(values: Mapping[str, Float64]) -> float:
    return math.sqrt(math.fsum(float(np.sum(value**2)) for value in values.values()))


def _norm(L: Float64, R: Float64) -> float:
    """Frobenius norm of L R, [out, r] and [r, in], without forming it."""
    return float(np.linalg.norm(np.linalg.qr(L, mode="r") @ R))
