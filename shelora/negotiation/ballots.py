"""The paper's negotiation as a coordinator runs it: ballots in, one ranked list of labels out. It holds no secret.

A ballot lists a client's most sensitive columns under secret labels, each with a number that keeps the order of the
scores and hides their size (`shelora.negotiation.ope`). From all ballots the coordinator builds two lists of the
same labels (SHE-LoRA, arXiv 2505.21051): *Common* by how many clients name a label, *Sensitivity* by its largest
number; and merges them by weights. The largest number stands for a label because a maximum passes through any
increasing function: of the numbers, only the order is used.
"""

import struct
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason

_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<HHI")
"""Format, zero, number of entries; little-endian."""
_ENTRY_BYTES: Final = 12
MAX_VALUE: Final = 2**63 - 1
"""Largest number in a ballot."""
_LEAST_WEIGHT: Final = 1e-9
"""Weights below move no label among less than a thousand million."""

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


class Tally:
    """Adds up ballots one by one; its size does not grow with their number."""

    def __init__(self, total: int) -> None:
        """Takes the number of columns of the model."""
        self._votes = np.zeros(total, dtype=np.int64)
        self._largest = np.zeros(total, dtype=np.uint64)

    def add(self, ballot: Ballot) -> None:
        """Counts a checked ballot."""
        self._votes[ballot.labels] += 1
        self._largest[ballot.labels] = np.maximum(self._largest[ballot.labels], ballot.values)

    def common(self) -> Labels:
        """Labels that anyone named: those of most clients first, then by largest number, then by label."""
        named = self._named()
        return named[np.lexsort((-self._largest[named].astype(np.int64), -self._votes[named]))]

    def sensitivity(self) -> Labels:
        """The same labels: largest number first, then by clients, then by label."""
        named = self._named()
        return named[np.lexsort((-self._votes[named], -self._largest[named].astype(np.int64)))]

    def rank(self, length: int, common_weight: float) -> Labels:
        """The first `length` labels of the merged lists; labels nobody named follow by label, a secret order."""
        merged = merge(self.common(), self.sensitivity(), common_weight)
        rest = np.flatnonzero(self._votes == 0).astype(np.uint32)
        return np.concatenate([merged, rest])[:length]

    def _named(self) -> Labels:
        return np.flatnonzero(self._votes).astype(np.uint32)


def merge(common: Labels, sensitivity: Labels, common_weight: float) -> Labels:
    """One list from two orders of the same labels, such that every prefix serves both by their weights.

    The first k labels hold the first ⌊k·w⌋ of `common` and the first ⌊k·(1-w)⌋ of `sensitivity`: place i of a list of
    weight w falls due at i/w, a label at the earlier of its two dates, and at most k labels fall due by k.

    Args: common_weight: w, 0 to 1; 0 gives `sensitivity` and 1 gives `common`. A weight below 10^-9 counts as 0.
    """
    due = np.full(int(common.max(initial=0)) + 1, np.inf)
    for labels, weight in ((common, common_weight), (sensitivity, 1 - common_weight)):
        if weight >= _LEAST_WEIGHT:
            due[labels] = np.minimum(due[labels], np.arange(1, len(labels) + 1) / weight)
    return sensitivity[np.argsort(due[sensitivity], kind="stable")]


def _refused(why: str) -> DomainError:
    return DomainError(Reason.BALLOT_REFUSED, f"the ballot is refused: {why}")
