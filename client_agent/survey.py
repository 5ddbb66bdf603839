"""What an agent knows of its examples before it trains: lengths in tokens, and that each can be learned from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client_agent.data import Examples, place_of
from client_agent.encoding import Encoder
from client_agent.sources import invalid

NO_LIMIT: Final = 2**31
WHOLE: Final = 100
PERCENTILES: Final = (50, 90, 99, WHOLE)
_AT_ONCE: Final = 1024
"""Texts tokenized together."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Survey:
    """Lengths of examples in tokens, special tokens included."""

    lengths: NDArray[np.int64]
    """Of every example before it is cut, [examples]."""
    limit: int
    """Tokens that examples are cut to."""
    largest_id: int
    """Largest token id that occurs."""
    ends_cut: int = 0
    """Of the examples that are cut, those whose answer does not fit, so that its end is cut."""
    unit: str = "tokens"
    """What lengths count."""

    @property
    def is_cut_anywhere(self) -> bool:
        """Whether there is a limit: images have none."""
        return self.limit < NO_LIMIT

    @property
    def cut(self) -> int:
        """Examples that are cut."""
        return int((self.lengths > self.limit).sum())

    @property
    def longest(self) -> int:
        """Index of the example with most tokens."""
        return int(self.lengths.argmax())

    def percentiles(self) -> dict[int, int]:
        """Length by percentile."""
        found = np.percentile(self.lengths, PERCENTILES, method="higher")
        return {name: int(value) for name, value in zip(PERCENTILES, found, strict=True)}


def survey(path: Path, text_field: str, examples: Examples, encoder: Encoder) -> Survey:
    """Tokenizes every text once.

    Args: path: The file that the examples are from, in its order; for messages.
    Raises: DomainError DATA_INVALID naming the place of a text that gives nothing to learn from.
    """
    least = 1 if examples.labels else 2
    lengths = np.empty(len(examples), dtype=np.int64)
    largest = 0
    for start in range(0, len(examples), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(examples))
        part, highest = encoder.measure(examples.texts[start:stop], examples.seconds[start:stop])
        lengths[start:stop] = part
        largest = max(largest, highest)
    for index in np.flatnonzero(lengths < least):
        place = place_of(path, text_field, int(index))
        what = "has no second token to predict" if lengths[index] else "gives no token"
        raise invalid(f"{place}: the text in field {text_field!r} {what}: remove it")
    return Survey(lengths=lengths, limit=encoder.limit, largest_id=largest)
