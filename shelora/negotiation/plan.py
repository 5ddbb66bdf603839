"""The plan: one ordered list of columns to encrypt, most sensitive first, that serves every budget by a prefix.

The sensitivity a set of columns covers is the sum of their scores, a modular function, so the first k columns by
summed score are optimal for every k at once. The leader ranks and publishes the plan sealed under a key that agents
alone derive; every agent checks it against the summed votes before it trains by it.
"""

import math
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix
from shelora.lora.shards import Float64
from shelora.obfuscation import Obfuscation

_FORMAT = 1
_HEADER = struct.Struct("<HHI")
"""Format, number of tiers, number of columns; little-endian."""
_NONCE_BYTES = 12
_ROUNDED_DOWN = 1 - 2.0**-50
"""So that 0.07 of 100 columns, 7.000000000000001 in float64, are 7 and not 8."""
COVERAGE_TOLERANCE = 1e-9
"""Share of all sensitivity by which a plan may miss the optimum: ties and last-bit differences between machines."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Columns to encrypt, most sensitive first, and the budgets that divide them into tiers."""

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
        return np.split(
            self.tier_of_columns(_total(matrices)), np.cumsum([m.in_features for m in matrices])[:-1]
        )


def tier_ends(tiers: Sequence[float], total: int) -> list[int]:
    """Columns that each budget encrypts: its share of all columns, rounded up."""
    return [min(total, math.ceil(tier * total * _ROUNDED_DOWN)) for tier in tiers]


def make_plan(scores: Mapping[str, Float64], matrices: Sequence[Matrix], tiers: Sequence[float]) -> Plan:
    """Ranks the summed scores; ties go to the column that comes first."""
    ranking = np.argsort(-_joined(scores, matrices), kind="stable")
    return Plan(tuple(tiers), ranking[: max(tier_ends(tiers, len(ranking)), default=0)].astype(np.uint32))


def check_plan(
    plan: Plan, scores: Mapping[str, Float64], matrices: Sequence[Matrix], tiers: Sequence[float]
) -> None:
    """Raises PLAN_REFUSED unless every tier is a best set of its size by the summed scores."""
    joined = _joined(scores, matrices)
    ends = tier_ends(tiers, len(joined))
    columns = plan.columns
    if plan.tiers != tuple(tiers) or len(columns) != max(ends, default=0):
        raise _refused("it was made for other budgets")
    if columns.max(initial=0) >= len(joined) or len(np.unique(columns)) != len(columns):
        raise _refused("it names a column twice or one that does not exist")
    covered, best = np.cumsum(joined[columns]), np.cumsum(-np.sort(-joined))
    if any(covered[end - 1] < best[end - 1] - COVERAGE_TOLERANCE * best[-1] for end in ends):
        raise _refused("it does not rank columns by the summed votes")


def check_layout(plan: Plan, matrices: Sequence[Matrix]) -> None:
    """Raises PLAN_REFUSED unless the layout's matrices carry the plan's column counts."""
    if plan.matrices_with_counts(matrices) != tuple(matrices):
        raise _refused("the round's layout has other column counts")


def column_orders(
    plan: Plan | None, matrices: Sequence[Matrix], obfuscation: Obfuscation | None
) -> dict[str, NDArray[np.int64]]:
    """Column order by matrix: tier after tier, then what nobody encrypts, each in secret order.

    Within a tier the order is secret too: a server that saw columns by sensitivity could guess which they are.
    Without a plan all columns are in secret order; without a secret (protection "none") in true order.
    """
    if obfuscation is None:
        return {m.name: np.arange(m.in_features) for m in matrices}
    secret = {m.name: obfuscation.permutation(m.name, m.in_features) for m in matrices}
    if plan is None:
        return secret
    tiers = plan.split(matrices)
    return {
        m.name: secret[m.name][np.argsort(tier[secret[m.name]], kind="stable")]
        for m, tier in zip(matrices, tiers, strict=True)
    }


def seal_plan(plan: Plan, key: bytes, context: bytes) -> bytes:
    """AES-256-GCM of the plan, bound to `context` (federation and plan number). A fresh nonce goes in front."""
    header = _HEADER.pack(_FORMAT, len(plan.tiers), len(plan.columns))
    tiers = np.array(plan.tiers, dtype="<f8").tobytes()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, header + tiers + plan.columns.astype("<u4").tobytes(), context)


def open_plan(data: bytes, key: bytes, context: bytes) -> Plan:
    """Opens a sealed plan; raises PLAN_REFUSED if it was altered, made under another key or for another context."""
    try:
        content = AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise _refused("it was altered, or sealed by another federation or epoch") from error
    if len(content) < _HEADER.size:
        raise _refused("it is truncated")
    version, tier_count, column_count = _HEADER.unpack_from(content)
    tiers_end = _HEADER.size + 8 * tier_count
    if version != _FORMAT or len(content) != tiers_end + 4 * column_count:
        raise _refused("its format is unknown")
    tiers = np.frombuffer(content[_HEADER.size : tiers_end], dtype="<f8")
    return Plan(tuple(tiers.tolist()), np.frombuffer(content[tiers_end:], dtype="<u4").astype(np.uint32))


def plan_context(federation_id: str, plan_number: int) -> bytes:
    """The context a plan is sealed for."""
    return f"shelora/v1/plan/{federation_id}/{plan_number}".encode()


def _total(matrices: Sequence[Matrix]) -> int:
    return sum(m.in_features for m in matrices)


def _joined(scores: Mapping[str, Float64], matrices: Sequence[Matrix]) -> Float64:
    return np.concatenate([scores[m.name] for m in matrices])


def _refused(why: str) -> DomainError:
    return DomainError(Reason.PLAN_REFUSED, f"the plan is refused: {why}")
