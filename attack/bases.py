"""B as an orthonormal basis: a form that was weighed for `selective`, and not taken.

With B = Q R a client could send Q in the clear and encrypt R A, so that B's columns stay secret and their span alone is
told. Two things undo it. After one step of AdamW the columns of B are vectors of nearly equal magnitudes, and such
vectors are rare in a span: they are found by w <- Q^T sign(Q w), which climbs to the vectors of largest 1-norm (as
FastICA does with other contrasts; Hyvarinen, 1999). And what tells members and labels is the span anyway.
"""

from typing import Final

import numpy as np

from shelora.lora.algebra import canonical_basis
from shelora.lora.shards import Float64

STARTS: Final = 20_000
ITERATIONS: Final = 40
EVEN: Final = 0.9995
"""1-norm over the largest that a unit vector can have, from which a vector is taken for a column of B."""
SAME: Final = 0.999
"""Cosine from which two vectors are taken for the same."""


def as_basis(B: Float64) -> Float64:
    """What would travel in place of B [out, rank]: columns that follow from their span alone, in float32."""
    sent: Float64 = canonical_basis(B)[0].astype(np.float32).astype(np.float64)
    return sent


def projection(Q: Float64) -> Float64:
    """Of the span [out, out]: it does not depend on the basis."""
    projected: Float64 = Q @ Q.T
    return projected


def unmixed(Q: Float64, seed: int = 0) -> Float64:
    """Unit vectors [out, count] of nearly even magnitudes in the span of an orthonormal Q."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((Q.shape[1], STARTS)).astype(np.float32)
    W, single = start, Q.astype(np.float32)
    for _ in range(ITERATIONS):
        W = single.T @ np.sign(single @ W)
    vectors = Q @ W.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=0)
    evenness = np.abs(vectors).sum(axis=0) / np.sqrt(len(Q))
    found: list[Float64] = []
    for index in np.argsort(-evenness)[: int((evenness > EVEN).sum())]:
        if all(abs(vectors[:, index] @ other) < SAME for other in found):
            found.append(vectors[:, index])
    return np.array(found).T if found else np.zeros((len(Q), 0))


def found_again(B: Float64, seed: int = 0) -> float:
    """Share of B's columns that come back from its basis."""
    unit = B / np.linalg.norm(B, axis=0)
    cosines = np.abs(unit.T @ unmixed(as_basis(B), seed))
    return float(np.mean(cosines.max(axis=1, initial=0) > SAME))
