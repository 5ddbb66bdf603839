"""Ballots of the paper's negotiation, and their tally at the coordinator: one ranked list of labels. No secret.

A ballot lists a client's most sensitive columns under secret labels, each with a number that keeps the order of the
scores and hides their size (`shelora.negotiation.ope`). The tally ranks them as published, budget after budget
(`shelora.negotiation.published`). Where the paper takes sizes of scores, for risk, it takes places: of the numbers only
the order means anything.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.negotiation.published import Chosen, Poll, published, refined
from shelora.negotiation.ranking import Ranking, tier_ends

_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<HHI")
"""Format, zero, number of entries; little-endian."""
_ENTRY_BYTES: Final = 12
MAX_VALUE: Final = 2**63 - 1
"""Largest number in a ballot."""
MOST_POLLED: Final = 32
"""Clients whose ballots are ranked at most: the paper negotiates among those sampled for its first round."""
_MOST_ENTRIES: Final = 2**23
"""Clients times columns that are ranked at most, two clients excepted: some 25 bytes each are held."""

Labels = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Ballot:
    """One client's columns, in order of their labels: the order of the entries says nothing."""

    labels: Labels
    """Strictly increasing."""
    values: NDArray[np.uint64]
    """One a label, at most MAX_VALUE; larger for more sensitive columns."""

    def encode(self) -> bytes:
        """Header, labels as uint32, values as uint64, all little-endian."""
        header = _HEADER.pack(_FORMAT, 0, len(self.labels))
        return header + self.labels.astype("<u4").tobytes() + self.values.astype("<u8").tobytes()

    @classmethod
    def decode(cls, data: bytes, total: int, most: int) -> Self:
        """Checks a ballot from outside.

        Args: total: Columns of the model; most: Columns the client may name.
        Raises: BALLOT_REFUSED.
        """
        if len(data) < _HEADER.size:
            raise _refused("it is truncated")
        version, zero, count = _HEADER.unpack_from(data)
        if (version, zero) != (_FORMAT, 0) or len(data) != _HEADER.size + _ENTRY_BYTES * count:
            raise _refused("its format is unknown")
        if count > most:
            raise _refused(f"it names {count} columns, the client's budget is {most}")
        labels = np.frombuffer(data, dtype="<u4", count=count, offset=_HEADER.size).astype(np.uint32)
        values = np.frombuffer(data, dtype="<u8", offset=_HEADER.size + 4 * count).astype(np.uint64)
        if count and (int(labels[-1]) >= total or not (labels[1:] > labels[:-1]).all()):
            raise _refused("its labels are not strictly increasing numbers of columns")
        if values.max(initial=0) > MAX_VALUE:
            raise _refused("it holds a value above 2^63 - 1")
        return cls(labels, values)


def ballot_bytes(entries: int) -> int:
    """Size of an encoded ballot."""
    return _HEADER.size + _ENTRY_BYTES * entries


def most_polled(total: int) -> int:
    """Ballots that are ranked at most, of a model of so many columns: bounds memory and time."""
    return max(2, min(MOST_POLLED, _MOST_ENTRIES // total))


class Tally:
    """Collects ballots, and ranks them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Takes the number of columns of each matrix."""
        self._starts = np.cumsum([0, *sizes])
        self._ballots: list[Ballot] = []

    def add(self, ballot: Ballot) -> None:
        """Counts a checked ballot."""
        self._ballots.append(ballot)

    def rank(
        self, tiers: Sequence[float], common_weight: float | None = None, *, refine: bool = False
    ) -> Ranking:
        """The ranked labels.

        Args:
            tiers: Budgets, increasing; at least one.
            common_weight: Weight of Common against Sensitivity, without Clients; None searches all three weights.
            refine: Whether the published choice is improved.
        """
        ends = tier_ends(tiers, int(self._starts[-1]))
        named = [len(ballot.labels) for ballot in self._ballots]
        budgets = np.searchsorted(ends, named, side="right") - 1
        fixed = None if common_weight is None else (0.0, common_weight)
        polls = self._polls()
        chain = published(polls, budgets.tolist(), ends, fixed)
        return Ranking(tuple(tiers), self._labels(refined(polls, chain) if refine else chain))

    def _polls(self) -> list[Poll]:
        scores = np.zeros((len(self._ballots), int(self._starts[-1])))
        named = np.zeros(scores.shape, dtype=np.bool_)
        levels = np.unique(np.concatenate([b.values for b in self._ballots] or [np.zeros(0, np.uint64)]))
        for row, ballot in enumerate(self._ballots):
            scores[row, ballot.labels] = 1 + np.searchsorted(levels, ballot.values)
            named[row, ballot.labels] = True
        cuts = self._starts[1:-1].tolist()
        parts = zip(np.split(scores, cuts, axis=1), np.split(named, cuts, axis=1), strict=True)
        return [Poll(*part) for part in parts]

    def _labels(self, chain: Sequence[Chosen]) -> Labels:
        """Labels of the columns of all matrices, budget after budget."""
        parts, before = [], [0] * (len(self._starts) - 1)
        for chosen in chain:
            parts += [
                start + c[n:] for start, c, n in zip(self._starts.tolist(), chosen, before, strict=False)
            ]
            before = [len(columns) for columns in chosen]
        return np.concatenate(parts).astype(np.uint32)


def _refused(why: str) -> DomainError:
    return DomainError(Reason.BALLOT_REFUSED, f"the ballot is refused: {why}")
