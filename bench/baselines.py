"""What others protect and how, at the same shapes: averages of encrypted factors, and columns that are not sent.

    python -m bench.baselines

- *Everything encrypted*: A and B wholly in CKKS vectors of 4 096 values, which servers add up: means of A and of B, as
  a product of two encrypted factors is out of reach of these parameters.
- *MaskCrypt* (Hu and Li, IEEE TDSC 2024): the share of single weights that matters most encrypted, the others clear,
  added up alike. Which weights they are costs nothing here; clients agree on one mask.
- *Columns dropped*: the columns of A that would be encrypted are not sent.
- *As published*: SHE-LoRA's code, where the columns that give way to the encrypted ones at the end of A are lost, and
  the encrypted part is divided by the number of clients twice. It costs what the way as described costs.

Of the vectors some are measured and all are taken to cost their median. Errors are of ΔW of one matrix against the
exact sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import tenseal as ts
from rich.console import Console
from rich.table import Table

from bench.tables import ways_table
from bench.workload import Costs, Workload
from shelora.lora.shards import Float64

SLOTS: Final = 4096
"""Values in a vector."""
SAMPLES: Final = 4
FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One way, over the whole round."""

    name: str
    up: float | None = None
    """Bytes of a client, what travels in the clear included. None, here and below: as of the way as described."""
    down: float | None = None
    protect_s: float | None = None
    """CPU seconds of a client."""
    aggregate_s: float | None = None
    """CPU seconds of servers."""
    error: float
    """Largest error of ΔW, over its largest entry."""
    clear: str
    """What servers see."""


@dataclass(slots=True, kw_only=True)
class Vectors:
    """What a CKKS vector of SLOTS values costs."""

    encryption: Costs = field(default_factory=Costs)
    addition: Costs = field(default_factory=Costs)
    """Loading it and adding it to the sum."""
    saving: Costs = field(default_factory=Costs)
    up: int = 0
    down: int = 0

    def measure(self) -> None:
        """Some vectors, of the published parameters without Galois keys, which sums do not need."""
        context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
        context.global_scale = 2**40
        values = np.random.default_rng(0).uniform(-1, 1, SLOTS).tolist()
        total = ts.ckks_vector(context, values)
        for _ in range(SAMPLES):
            with self.encryption.measured():
                data = ts.ckks_vector(context, values).serialize()
            with self.addition.measured():
                total += ts.ckks_vector_from(context, data)
            with self.saving.measured():
                result = total.serialize()
            self.up, self.down = len(data), len(result)


def measure(workload: Workload) -> list[Baseline]:
    """All of them."""
    vectors = Vectors()
    vectors.measure()
    weights = 2 * workload.features * workload.rank * workload.matrices
    exact = _exact(workload)
    some = math.ceil(workload.budget * weights)
    columns = workload.columns * workload.rank * workload.matrices
    apart = _error(_apart(workload), exact)
    return [
        _encrypted("everything encrypted", vectors, workload, weights, weights, apart, "nothing"),
        _encrypted(
            f"MaskCrypt, {workload.budget:.0%} of weights",
            vectors,
            workload,
            some,
            weights,
            apart,
            f"{1 - workload.budget:.0%} of A and B",
        ),
        Baseline(
            name=f"{workload.budget:.0%} of columns dropped",
            up=float(FLOAT_BYTES * (weights - columns)),
            down=float(
                FLOAT_BYTES * workload.clients * (weights - columns)
            ),  # of all clients: their sum has all ranks
            protect_s=0.0,
            aggregate_s=0.0,
            error=_error(_without_columns(workload), exact),
            clear="all that is sent",
        ),
        Baseline(
            name="as published",
            error=_error(_as_published(workload), exact),
            clear="B, most of A",
        ),
    ]


def _encrypted(
    name: str, vectors: Vectors, workload: Workload, encrypted: int, weights: int, error: float, clear: str
) -> Baseline:
    count = math.ceil(encrypted / SLOTS)
    rest = FLOAT_BYTES * (weights - encrypted)
    adding = count * workload.clients * vectors.addition.usual.cpu_s
    return Baseline(
        name=name,
        up=float(count * vectors.up + rest),
        down=float(count * vectors.down + rest),
        protect_s=count * vectors.encryption.usual.cpu_s,
        aggregate_s=adding + count * vectors.saving.usual.cpu_s,
        error=error,
        clear=clear,
    )


def _factors(workload: Workload) -> list[tuple[Float64, Float64]]:
    """The s B and A of every client, of the first matrix."""
    own = [workload.factors(client, workload.names[0]) for client in range(workload.clients)]
    return [(workload.scaling * f.B.astype(np.float64), f.A.astype(np.float64)) for f in own]


def _exact(workload: Workload) -> Float64:
    total: Float64 = np.sum([B @ A for B, A in _factors(workload)], axis=0) / workload.clients
    return total


def _apart(workload: Workload) -> Float64:
    factors = _factors(workload)
    product: Float64 = np.mean([B for B, _ in factors], axis=0) @ np.mean([A for _, A in factors], axis=0)
    return product


def _without_columns(workload: Workload) -> Float64:
    found = _exact(workload)
    found[:, : workload.columns] = 0
    return found


def _as_published(workload: Workload) -> Float64:
    """Columns to encrypt are the first; those they change places with are the last."""
    found = _exact(workload)
    found[:, : workload.columns] /= workload.clients
    found[:, -workload.columns :] = 0
    return found


def _error(found: Float64, exact: Float64) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def table(rows: Sequence[Baseline]) -> Table:
    """The rows for a terminal."""
    shown = ways_table("Others at the same shapes: one round, CPU time, one thread")
    for row in rows:
        shown.add_row(
            row.name,
            *(_shown(value, 1e6, "MB") for value in (row.up, row.down)),
            *(_shown(value, 1, "s") for value in (row.protect_s, row.aggregate_s)),
            f"{row.error:.1e}",
            row.clear,
        )
    return shown


def _shown(value: float | None, size: float, unit: str) -> str:
    return "as described" if value is None else f"{value / size:,.2f} {unit}"


if __name__ == "__main__":
    Console().print(table(measure(Workload())))
