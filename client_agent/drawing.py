"""Reproducible choices: which examples make up a batch, which are evaluated. No global random state is used."""

import hashlib
from collections.abc import Iterator

import numpy as np


def seed_of(*parts: object) -> int:
    """A seed in [0, 2^63) from what a choice depends on, such as client, round and purpose."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of the examples of every step: each pass over the `count` examples in a new order.

    A batch never holds an example twice; it is smaller than `batch_size` only if `count` is.
    """
    rng = np.random.default_rng(seed)
    size = min(batch_size, count)
    pending = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(pending) < size:
            order = rng.permutation(count)
            # What is still pending comes first; its repeats in the new pass go behind everything else.
            repeated = np.isin(order, pending)
            pending = np.concatenate([pending, order[~repeated], order[repeated]])
        yield pending[:size].tolist()
        pending = pending[size:]


def sample(count: int, limit: int, seed: int) -> list[int]:
    """At most `limit` different indices below `count`, ascending; all of them if there are no more."""
    if limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())
