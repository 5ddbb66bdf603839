"""Undoing the secret column order: matching the correlations of columns.

Updates of many rows are combinations of layer inputs, so their columns are correlated as the inputs' coordinates are,
and the attacker knows those from public text. Columns are matched by their sorted correlations first, by the spectra of
both matrices (GRAMPA, Fan et al., ICML 2020), then by repeated assignment.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from shelora.lora.shards import Float64

ITERATIONS: Final = 60
WIDTHS: Final = (0.05, 0.2, 0.6)
"""Of GRAMPA's kernel."""

Order = NDArray[np.intp]


def correlations(rows: Float64) -> Float64:
    """Correlations of the columns of [rows, n], about zero."""
    products = rows.T @ rows
    sizes = np.sqrt(np.maximum(np.diag(products), 1e-12))
    result: Float64 = products / np.outer(sizes, sizes)
    return result


def matched(observed: Float64, public: Float64) -> Order:
    """For each observed column the public one that it is taken for; of all starts the match that fits best.

    Args: observed, public: correlations [n, n].
    """
    found = [_refined(observed, public, start) for start in _starts(observed, public)]
    return max(found, key=lambda order: float((observed * public[np.ix_(order, order)]).sum()))


def _assigned(similarity: Float64) -> Order:
    _, columns = linear_sum_assignment(-similarity)
    order: Order = columns
    return order


def _refined(observed: Float64, public: Float64, order: Order) -> Order:
    """Assigns again by the columns matched so far, until nothing changes."""
    for _ in range(ITERATIONS):
        better = _assigned(observed @ public[order])
        if (better == order).all():
            break
        order = better
    return order


def _starts(observed: Float64, public: Float64) -> Iterator[Order]:
    shapes: tuple[Callable[[Float64], Float64], ...] = (np.abs, lambda z: z, lambda z: z**3)
    for shape in shapes:
        a, b = _profile(shape(observed)), _profile(shape(public))
        yield _assigned(-((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T))
    for shape in (lambda z: z, np.abs):
        yield from _spectral(_centred(shape(observed)), _centred(shape(public)))


def _profile(values: Float64) -> Float64:
    ordered = np.sort(values, axis=1)
    profile: Float64 = (ordered - ordered.mean()) / ordered.std()
    return profile


def _centred(values: Float64) -> Float64:
    centred = values - values.mean()
    scaled: Float64 = centred / np.linalg.norm(centred) * np.sqrt(len(values))
    return scaled


def _spectral(a: Float64, b: Float64) -> Iterator[Order]:
    """GRAMPA: eigenvectors of both, weighted by how near their eigenvalues are."""
    values_a, U = np.linalg.eigh(a)
    values_b, V = np.linalg.eigh(b)
    ones = np.ones((len(a), len(a)))
    for width in WIDTHS:
        near = 1 / ((values_a[:, None] - values_b[None]) ** 2 + width**2)
        yield _assigned(U @ (near * (U.T @ ones @ V)) @ V.T)
