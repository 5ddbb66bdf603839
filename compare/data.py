"""A data set behind its model's frozen layers: computed once, then cached; and how clients share it."""

import fcntl
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A data set behind the frozen layers. Examples: training first, then `tests` test examples."""

    inputs: Mapping[str, NDArray[np.generic]]
    """What the network above takes, by name; the first axis is of examples unless the network says otherwise."""
    labels: NDArray[np.int64]
    """By which examples are divided among clients [examples]."""
    tests: int

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(self.labels.max()) + 1

    @property
    def training(self) -> int:
        """Number of training examples; the others are for testing."""
        return len(self.labels) - self.tests


def cached(path: Path, encode: Callable[[], Encoded]) -> Encoded:
    """What `encode` returns; from the file if it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process encodes, the others wait for it
        if not path.is_file():
            scratch, made = path.with_suffix(".part.npz"), encode()
            arrays: Arrays = {**made.inputs, "labels": made.labels, "tests": np.array(made.tests)}
            np.savez(scratch, **arrays)  # type: ignore[arg-type]
            scratch.rename(path)
    with np.load(path, allow_pickle=False) as found:
        inputs = {name: found[name] for name in found.files if name not in {"labels", "tests"}}
        return Encoded(inputs=inputs, labels=found["labels"], tests=int(found["tests"]))


def split(encoded: Encoded, clients: int, *, uneven: bool, seed: int, least: int) -> list[NDArray[np.int64]]:
    """Every client's training examples; who would have fewer than `least` gets some of whoever has most."""
    rng = np.random.default_rng([seed, clients, uneven])
    labels = encoded.labels[: encoded.training]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in range(encoded.classes):
        indices = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet([0.3] * clients) if uneven else np.full(clients, 1 / clients)
        cuts = (np.cumsum(shares)[:-1] * len(indices)).round().astype(int)
        for part, mine in zip(parts, np.split(indices, cuts), strict=True):
            part.extend(mine.tolist())
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(int(rng.integers(len(largest)))))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def seed_bytes(seed: int) -> bytes:
    """The secret that a run's initial values are drawn from."""
    return hashlib.sha256(f"compare/{seed}".encode()).digest()
