"""Were two updates of `complete` encrypted under one secret? Then their difference is that of what they say.

All ciphertexts of a round share the public part of the scheme, as they are added up. Under secrets of their own the
difference of two is uniform modulo q; under one secret it is the difference of two messages, each of which fits
2 most_contributors times into q.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from attack.capture import Round
from shelora.additive.codec import decode
from shelora.additive.wire import summand_planes
from shelora.lora.codec import parse_update
from shelora.lora.layout import SKETCHES
from shelora.lora.sums import SKETCHES_KIND

SMALL: Final = 0.25
"""Share of differences modulo q that are below q / 8 in magnitude, where they are uniform."""


def alike(round_: Round) -> tuple[float, int, int] | None:
    """The largest share of small differences between two updates; values compared; pairs. None if nothing is summed."""
    stored = [np.concatenate(list(_stored(round_, client))) for client in round_.clients()]
    return largest([values for values in stored if len(values)])


def largest(stored: Sequence[NDArray[np.float64]]) -> tuple[float, int, int] | None:
    """As of `alike`. Args: stored: coefficients of each update over the modulus, 0 to 1."""
    shares = [float(np.mean(_small(a, b))) for a, b in combinations(stored, 2)]
    return (max(shares), len(stored[0]), len(shares)) if shares else None


def _small(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    difference = (a - b + 0.5) % 1.0 - 0.5
    return np.asarray(np.abs(difference) < SMALL / 2)


def _stored(round_: Round, client: str) -> Iterator[NDArray[np.float64]]:
    """Stored coefficients over the modulus, 0 to 1."""
    layout = round_.layout
    yield np.empty(0)
    for index, content in sorted(round_.of(client).items()):
        if layout.shards[index].kind != SKETCHES or layout.sums is None:
            continue
        shape = SKETCHES_KIND.shape(layout, index)
        planes = summand_planes(parse_update(layout, index, content).ciphertexts, shape)
        yield decode(shape.parameters, planes, shape.coefficients) / 2.0**shape.parameters.kept_bits
