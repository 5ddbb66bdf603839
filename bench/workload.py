"""What is compared: one round of LoRA on OpenLLaMA-3B, as in the published benchmark (arXiv 2505.21051)."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from shelora.lora.shards import Float32, LoraFactors


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes of the round; the defaults are the published ones."""

    matrices: int = 104
    """Adapted matrices."""
    features: int = 3200
    """Rows and columns of every adapted matrix."""
    rank: int = 8
    clients: int = 4
    budget: float = 0.01
    """Share of the columns of A that is encrypted."""
    scaling: float = 2.0
    """LoRA alpha / rank."""

    @property
    def columns(self) -> int:
        """Encrypted columns of every matrix."""
        return math.ceil(self.budget * self.features)

    @property
    def names(self) -> list[str]:
        return [f"layer-{index}" for index in range(self.matrices)]

    def shape(self, name: str) -> tuple[int, int]:  # noqa: ARG002 - all are alike here
        """Rows and columns of an adapted matrix."""
        return self.features, self.features

    def factors(self, client: int, name: str) -> LoraFactors:
        """Synthetic factors at LoRA's typical magnitudes, as after a round of clients whose data differ.

        All start from one A, uniform within 1 / sqrt(columns), which training moved by 0.001 an entry; B is of 0.014,
        half of its variance common to all clients.
        """
        rows, columns = self.shape(name)
        common = np.random.default_rng([self.clients, *name.encode()])
        own = np.random.default_rng([client, *name.encode()])
        B, move = self._normal(own, rows), self._normal(own, columns)
        shared = self._normal(common, rows)
        A: Float32 = common.random((self.rank, columns), dtype=np.float32)
        initial = (2 * A - 1) / np.float32(math.sqrt(columns))
        return LoraFactors(np.float32(0.01) * (shared + B), initial + np.float32(0.001) * move.T)

    def _normal(self, generator: np.random.Generator, length: int) -> Float32:
        return generator.standard_normal((length, self.rank), dtype=np.float32)


@dataclass
class Cost:
    """Time spent, added up over several measurements."""

    cpu_s: float = 0.0
    """CPU seconds of this process."""
    wall_s: float = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_s += time.process_time() - cpu
            self.wall_s += time.perf_counter() - wall


@dataclass
class Costs:
    """The costs of one thing done several times."""

    runs: list[Cost] = field(default_factory=list)

    @property
    def usual(self) -> Cost:
        """The median run: what counts, on both sides."""
        return sorted(self.runs, key=lambda cost: cost.cpu_s)[len(self.runs) // 2]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures one more run."""
        self.runs.append(Cost())
        with self.runs[-1].measured():
            yield

    def summary(self) -> dict[str, float]:
        """Number of runs, the median and the least of their CPU seconds."""
        seconds = [cost.cpu_s for cost in self.runs]
        return {"count": len(seconds), "cpu_s": self.usual.cpu_s, "least_cpu_s": min(seconds)}
