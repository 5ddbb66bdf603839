"""How good the cut of sums from their sketches is, and what noise adds: `python -m bench.sketches`.

Factors are random, of four clients at rank 8, with spectra as they occur: as after a round from one initial A, and
falling ones. Recorded factors can be given instead: a safetensors file with tensors NAME.B [clients, out, r] and
NAME.A [clients, r, in] of a matrix each. The complete mode's own choice of k, l, s and bits is marked. Takes a minute.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from bench.complete import singular_values
from shelora.additive.parameters import DEFAULT, GUARD, TAIL
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.shards import FactoredUpdate, Float64
from shelora.lora.sketches import HEADROOM, Sketch, Sketcher, best_cut, largest_deviation, sketch_sizes
from shelora.obfuscation import SECRET_BYTES, Obfuscation

RANK: Final = 8
CLIENTS: Final = 4
FEATURES: Final = 800
"""Of the random matrices: the error hardly depends on it."""
WIDTH: Final = 40
"""Components of falling spectra."""
Factors = list[tuple[Float64, Float64]]
"""By client, B [out, r] with its weight and scaling, and A [r, in]."""
Makes = Callable[[np.random.Generator], Factors]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to spend bytes."""

    columns: int
    rows: int
    bits: int
    two: bool = False
    """Without the core: P (Ψ P)⁺ N, the generalised Nyström approximation."""

    def values(self, features: int) -> int:
        """Of one square matrix."""
        core = self.terms.core
        corner = 0 if self.two else (core - self.columns) * (core - self.rows)
        return (self.columns + self.rows) * features + corner

    @property
    def terms(self) -> SumTerms:
        """As of a layout."""
        return SumTerms(profile=DEFAULT.name, sketch_columns=self.columns, sketch_rows=self.rows)

    @property
    def noise(self) -> float:
        """Deviation in an entry of the mean of values within ±1: errors, dropped bits, rounding."""
        dropped = (4.0 ** (DEFAULT.modulus_bits - self.bits) - 1) / 12
        deviation = math.sqrt(CLIENTS * (DEFAULT.deviation**2 + dropped + 1 / 12))
        return deviation / (DEFAULT.modulus / 2 * GUARD - TAIL * deviation - CLIENTS / 2)

    def levels(self, sketch: Sketch) -> tuple[float, float]:
        """Deviations of the noise in an entry of the mean P and N, under bounds that lie as far above as on average."""
        P, N = (largest_deviation(part) for part in (sketch.P.T, sketch.N))
        return P * HEADROOM * 2**0.125 * self.noise, N * HEADROOM * 2**0.125 * self.noise

    def restored(self, sketcher: Sketcher, sketch: Sketch, *levels: float) -> FactoredUpdate:
        """The cut. Args: levels: of the noise in P and N."""
        if not self.two:
            return best_cut(sketcher.recovered(sketch, *levels), RANK)
        basis, triangular = np.linalg.qr(sketch.P)
        inner = np.linalg.pinv(sketcher.phi[: self.rows] @ sketch.P)
        return best_cut(FactoredUpdate(basis, triangular @ inner @ sketch.N), RANK)


def choices() -> list[tuple[str, Choice]]:
    """The one in use and its neighbours."""
    columns, rows = sketch_sizes(RANK)
    return [
        ("in use", Choice(columns=columns, rows=rows, bits=DEFAULT.kept_bits)),
        ("wider, fewer bits", Choice(columns=columns + 1, rows=rows + 1, bits=20)),
        ("narrower, more bits", Choice(columns=columns - 1, rows=rows - 1, bits=24)),
        ("least", Choice(columns=RANK, rows=RANK, bits=24)),
        ("no core, wide", Choice(columns=12, rows=18, bits=24, two=True)),
        ("no core, as large", Choice(columns=9, rows=14, bits=22, two=True)),
    ]


def from_one_A(move: float, own: float) -> Makes:
    """As after a round: one initial A that moved, B common but for `own` of its size."""

    def make(rng: np.random.Generator) -> Factors:
        initial = rng.uniform(-1, 1, (RANK, FEATURES)) / math.sqrt(FEATURES)
        common = rng.standard_normal((FEATURES, RANK))
        return [
            (
                common + own * rng.standard_normal(common.shape),
                initial + move * rng.standard_normal(initial.shape),
            )
            for _ in range(CLIENTS)
        ]

    return make


def falling(singular: Callable[[Float64], Float64]) -> Makes:
    """One sum with those singular values, by the number of the component."""

    def make(rng: np.random.Generator) -> Factors:
        left, right = (np.linalg.qr(rng.standard_normal((FEATURES, WIDTH)))[0] for _ in range(2))
        return [(left * singular(np.arange(WIDTH, dtype=np.float64)), right.T)]

    return make


SPECTRA: Final[dict[str, Makes]] = {
    "A + 0.001": from_one_A(0.001, 1.0),
    "A + 0.01": from_one_A(0.01, 0.3),
    "0.7^i": falling(lambda i: 0.7**i),
    "1 / i": falling(lambda i: 1 / (1 + i)),
    "1 / i²": falling(lambda i: (1 + i) ** -2),
}


def recorded(path: Path) -> dict[str, Makes]:
    """By name of a matrix, its recorded factors."""
    tensors = load_file(path)
    found: dict[str, Makes] = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        B, A = (tensors[f"{name}.{side}"].astype(np.float64) for side in "BA")
        found[name] = partial(_given, list(zip(B, A, strict=True)))
    return found


def _given(factors: Factors, _: np.random.Generator) -> Factors:
    return factors


@dataclass(frozen=True)
class Errors:
    """Of one cut."""

    cut: float
    """Norm of what is missing, over that of ΔW."""
    best: float
    added: float
    """Largest entry that noise adds, over the largest of ΔW."""


def errors(choice: Choice, factors: Factors, seed: int) -> Errors:
    """Restores the mean with and without noise."""
    B = np.hstack([b / len(factors) for b, _ in factors])
    A = np.vstack([a for _, a in factors])
    matrix, rng = Matrix("m", len(B), A.shape[1]), np.random.default_rng(seed)
    sketcher = Sketcher.draw(Obfuscation(bytes(SECRET_BYTES), 1), choice.terms, matrix, seed)
    sketch = sketcher.sketch(B, A)
    clear = choice.restored(sketcher, sketch)
    levels = choice.levels(sketch)
    noisy = choice.restored(sketcher, _with_noise(sketch, levels, rng), *levels)
    exact = singular_values(B, A)
    missing = singular_values(np.hstack([B, -clear.Q]), np.vstack([A, clear.M]))
    difference = np.abs(clear.Q @ clear.M - noisy.Q @ noisy.M).max() / np.abs(B @ A).max()
    size = float(np.linalg.norm(exact))
    return Errors(
        float(np.linalg.norm(missing)) / size, float(np.linalg.norm(exact[RANK:])) / size, float(difference)
    )


def _with_noise(sketch: Sketch, levels: tuple[float, float], rng: np.random.Generator) -> Sketch:
    parts = zip((sketch.P, sketch.N, sketch.Z), (*levels, levels[0]), strict=True)
    return Sketch(*(part + level * rng.standard_normal(part.shape) for part, level in parts))


def rows(spectra: dict[str, Makes], seeds: int) -> Iterator[tuple[str, ...]]:
    """A row a spectrum and choice: medians over the seeds, with the worst of them."""
    for name, make in spectra.items():
        for label, choice in choices():
            found = [errors(choice, make(np.random.default_rng(seed)), seed + 1) for seed in range(seeds)]
            cut, best, added = (
                np.array([getattr(e, part) for e in found]) for part in ("cut", "best", "added")
            )
            size = choice.values(3200) * choice.bits / 8 / 1000
            yield (
                name,
                label,
                f"{choice.columns}, {choice.rows}, {0 if choice.two else choice.terms.core}",
                str(choice.bits),
                f"{size:.0f} kB",
                f"{np.median(best):.3f}",
                f"{np.median(cut):.3f} ({cut.max():.3f})",
                f"{np.median(added):.0e} ({added.max():.0e})",
            )


def main(
    factors: Annotated[Path | None, typer.Option(help="Recorded factors, safetensors.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random factors and sketches of each kind.")] = 12,
) -> None:
    """Prints the error of the rank-8 cut by spectrum and choice of k, l, s, bits."""
    table = Table(title="Error of the rank-8 cut of a sum of four clients, from its sketches")
    headings = (
        "singular values",
        "choice",
        "k, l, s",
        "bits",
        "3200²",
        "best cut",
        "cut (worst)",
        "noise adds",
    )
    for heading in headings:
        table.add_column(heading)
    for row in rows(recorded(factors) if factors else SPECTRA, seeds):
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
