"""The plan: one ordered list of columns to encrypt, most sensitive first, that serves every budget by a prefix.

The sensitivity a set of columns covers is the sum of their scores, a modular function, so the first k columns by
summed score are optimal for every k at once. The leader ranks and publishes the plan sealed under a key that agents
alone derive; every agent checks it against the summed votes before it trains by it.
"""

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from shelora.lora.layout import Matrix
from shelora.lora.shards import Float64
from shelora.negotiation.ranking import Ranking, refused, tier_ends
from shelora.obfuscation import Obfuscation

_NONCE_BYTES = 12
COVERAGE_TOLERANCE = 1e-9
"""Share of all sensitivity by which a plan may miss the optimum: ties and last-bit differences between machines."""


class Plan(Ranking):
    """Columns to encrypt, most sensitive first, and the budgets that divide them into tiers."""

    __slots__ = ()


def make_plan(scores: Mapping[str, Float64], matrices: Sequence[Matrix], tiers: Sequence[float]) -> Plan:
    """Ranks the summed scores; ties go to the column that comes first."""
    ranking = np.argsort(-joined_scores(scores, matrices), kind="stable")
    return Plan(tuple(tiers), ranking[: max(tier_ends(tiers, len(ranking)), default=0)].astype(np.uint32))


def check_plan(
    plan: Plan, scores: Mapping[str, Float64], matrices: Sequence[Matrix], tiers: Sequence[float]
) -> None:
    """Raises PLAN_REFUSED unless every tier is a best set of its size by the summed scores."""
    joined = joined_scores(scores, matrices)
    ends = tier_ends(tiers, len(joined))
    plan.require_fit(len(joined), tiers)
    covered, best = np.cumsum(joined[plan.columns]), np.cumsum(-np.sort(-joined))
    if any(covered[end - 1] < best[end - 1] - COVERAGE_TOLERANCE * best[-1] for end in ends):
        raise refused("it does not rank columns by the summed votes")


def check_layout(plan: Plan, matrices: Sequence[Matrix]) -> None:
    """Raises PLAN_REFUSED unless the layout's matrices carry the plan's column counts."""
    if plan.matrices_with_counts(matrices) != tuple(matrices):
        raise refused("the round's layout has other column counts")


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
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plan.encode(), context)


def open_plan(data: bytes, key: bytes, context: bytes) -> Plan:
    """Opens a sealed plan; raises PLAN_REFUSED if it was altered, made under another key or for another context."""
    try:
        content = AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise refused("it was altered, or sealed by another federation or epoch") from error
    return Plan.decode(content)


def plan_context(federation_id: str, plan_number: int) -> bytes:
    """The context a plan is sealed for."""
    return f"shelora/v1/plan/{federation_id}/{plan_number}".encode()


def joined_scores(scores: Mapping[str, Float64], matrices: Sequence[Matrix]) -> Float64:
    """Scores of all columns, numbered through in the matrices' order."""
    return np.concatenate([scores[m.name] for m in matrices])
