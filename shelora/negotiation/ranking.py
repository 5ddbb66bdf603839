"""An ordered list of columns that serves every budget by a prefix, and how it travels.

The numbers are true columns in a plan (`shelora.negotiation.plan`) and secret labels in what a coordinator ranks
(`shelora.negotiation.ballots`): both count the columns of all matrices through, in the matrices' order, so both tell
how many columns of each matrix lie in each tier.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix

_FORMAT = 1
_ROUNDED_DOWN = 1 - 2.0**-50
"""So that 0.07 of 100 columns, 7.000000000000001 in float64, are 7 and not 8."""
_HEADER = struct.Struct("<HHI")
"""Format, number of tiers, number of columns; little-endian."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Columns, most sensitive first, and the budgets that divide them into tiers."""

    tiers: tuple[float, ...]
    """Shares of all columns, strictly increasing."""
    columns: NDArray[np.uint32]
    """Columns of all matrices, numbered through in the matrices' order."""

    def tier_sizes(self, total: int) -> list[int]:
        """Columns of each tier, of `total` columns in all."""
        ends = tier_ends(self.tiers, total)
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def tier_of_columns(self, total: int) -> NDArray[np.int64]:
        """Tier of every column [total]; the number of tiers for columns that nobody encrypts."""
        tier = np.full(total, len(self.tiers), dtype=np.int64)
        tier[self.columns] = np.repeat(np.arange(len(self.tiers)), self.tier_sizes(total))
        return tier

    def matrices_with_counts(self, matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
        """The matrices with their tier_columns: what the coordinator learns."""
        return tuple(
            replace(m, tier_columns=tuple(np.bincount(tier, minlength=len(self.tiers) + 1)[:-1].tolist()))
            for m, tier in zip(matrices, self.split(matrices), strict=True)
        )

    def split(self, matrices: Sequence[Matrix]) -> list[NDArray[np.int64]]:
        """Tier of every column, by matrix."""
        total = total_columns(matrices)
        return np.split(self.tier_of_columns(total), np.cumsum([m.in_features for m in matrices])[:-1])

    def require_fit(self, total: int, tiers: Sequence[float]) -> None:
        """Raises PLAN_REFUSED unless it names as many different columns of `total` as the largest tier needs."""
        if self.tiers != tuple(tiers) or len(self.columns) != max(tier_ends(tiers, total), default=0):
            raise refused("it was made for other budgets")
        if self.columns.max(initial=0) >= total or len(np.unique(self.columns)) != len(self.columns):
            raise refused("it names a column twice or one that does not exist")

    def encode(self) -> bytes:
        """Header, tiers as float64, columns as uint32, all little-endian."""
        header = _HEADER.pack(_FORMAT, len(self.tiers), len(self.columns))
        tiers = np.array(self.tiers, dtype="<f8").tobytes()
        return header + tiers + self.columns.astype("<u4").tobytes()

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """Raises PLAN_REFUSED for bytes that `encode` does not make."""
        if len(content) < _HEADER.size:
            raise refused("it is truncated")
        version, tier_count, column_count = _HEADER.unpack_from(content)
        tiers_end = _HEADER.size + 8 * tier_count
        if version != _FORMAT or len(content) != tiers_end + 4 * column_count:
            raise refused("its format is unknown")
        tiers = tuple(np.frombuffer(content[_HEADER.size : tiers_end], dtype="<f8").tolist())
        if not all(low < high <= 1 for low, high in zip((0.0, *tiers), tiers, strict=False)):
            raise refused("its budgets are not increasing shares")
        return cls(tiers, np.frombuffer(content[tiers_end:], dtype="<u4").astype(np.uint32))


def tier_ends(tiers: Sequence[float], total: int) -> list[int]:
    """Columns that each budget encrypts: its share of all columns, rounded up."""
    return [min(total, math.ceil(tier * total * _ROUNDED_DOWN)) for tier in tiers]


def total_columns(matrices: Sequence[Matrix]) -> int:
    """Columns of all matrices."""
    return sum(m.in_features for m in matrices)


def refused(why: str) -> DomainError:
    """A PLAN_REFUSED error."""
    return DomainError(Reason.PLAN_REFUSED, f"the plan is refused: {why}")
