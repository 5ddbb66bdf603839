"""Reuters R8, divided among agents as unevenly as organisations are: labels by a Dirichlet distribution."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

LABELS: Final = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_HEADER_ROWS: Final = 3
"""The tab files begin with names, types and roles of their columns."""
LEAST_EXAMPLES: Final = 200
"""A split that leaves an agent fewer is drawn again."""


@dataclass(frozen=True)
class Example:
    text: str
    label: str


def read_tab(path: Path) -> list[Example]:
    """Reads a tab file of two columns, label and text."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[_HEADER_ROWS:]
    return [Example(text=row[1].strip(), label=row[0]) for row in rows if row]


def dirichlet_split(labels: Sequence[str], agents: int, alpha: float, seed: int) -> list[list[int]]:
    """Indices of every agent's examples: each label's examples are divided by a draw of Dirichlet(alpha).

    Smaller alpha is less even. Deterministic in the seed.
    """
    rng = np.random.default_rng(seed)
    names = np.array(labels)
    while True:
        parts: list[list[int]] = [[] for _ in range(agents)]
        for label in sorted(set(labels)):
            for part, indices in zip(
                parts, _divide(np.flatnonzero(names == label), agents, alpha, rng), strict=True
            ):
                part.extend(indices.tolist())
        if min(map(len, parts)) >= LEAST_EXAMPLES:
            return [sorted(part) for part in parts]


def _divide(
    indices: NDArray[np.intp], agents: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    shares = rng.dirichlet([alpha] * agents)
    return np.split(rng.permutation(indices), (np.cumsum(shares)[:-1] * len(indices)).astype(int))


def write_jsonl(examples: Sequence[Example], path: Path) -> None:
    """One JSON object a line: {"text": ..., "label": ...}."""
    lines = (json.dumps({"text": e.text, "label": e.label}, ensure_ascii=False) for e in examples)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
