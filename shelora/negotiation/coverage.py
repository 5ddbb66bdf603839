"""How well a plan serves one client, and how a client that it serves badly gains weight.

Each client computes this for itself; no server learns a coverage or a weight.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from shelora.lora.layout import Matrix
from shelora.lora.shards import Float64
from shelora.negotiation.plan import Plan, joined_scores
from shelora.negotiation.ranking import tier_ends

GROWTH: Final = 4.0
"""Factor by which a vote's weight grows if its client is covered not at all; less in proportion to what is missing."""
DECAY: Final = 0.8
"""Factor by which it shrinks once its client is covered comfortably."""
OVERLAP_STEP: Final = 0.05
"""Overlaps are reported in steps: finer figures would say more of a client's data than the decision needs."""


def coverage(plan: Plan, scores: Mapping[str, Float64], matrices: Sequence[Matrix], budget: float) -> float:
    """Share of the sensitivity a client would cover by its own ranking that the plan covers at its budget.

    1 means the plan is as good for this client as its own; also if it encrypts nothing or finds nothing sensitive.
    """
    joined = joined_scores(scores, matrices)
    count = _encrypted(plan, len(joined), budget)
    best = float(np.sort(joined)[len(joined) - count :].sum())
    return float(joined[plan.columns[:count]].sum()) / best if best > 0 else 1.0


def overlap(plan: Plan, scores: Mapping[str, Float64], matrices: Sequence[Matrix], budget: float) -> float:
    """Share of a client's top columns, as many as it encrypts, that it encrypts under the plan; 1 if none."""
    joined = joined_scores(scores, matrices)
    count = _encrypted(plan, len(joined), budget)
    top = np.argsort(-joined, kind="stable")[:count]
    return float(np.isin(top, plan.columns[:count]).mean()) if count else 1.0


def drift_report(present: float, fresh: float) -> float:
    """What an agent reports: its overlap over that of when the plan was new, 0 to 1, in steps.

    Relative, because the overlap itself would tell the coordinator whom a plan serves badly.
    """
    ratio = min(1.0, present / fresh) if fresh > 0 else 1.0
    return round(round(ratio / OVERLAP_STEP) * OVERLAP_STEP, 2)


def next_weight(weight: float, covered: float, floor: float, largest: float) -> float:
    """Weight of a client's next vote (multiplicative weights, within 1 and `largest`).

    Below the floor it grows by GROWTH to the power of the missing share, so that clients further away gain faster. It
    shrinks only when more than half of the way from the floor to 1 is covered, so that a client just lifted stays.
    """
    if floor > 0 and covered < floor:
        return min(largest, weight * math.pow(GROWTH, (floor - covered) / floor))
    comfortable = covered > (1 + floor) / 2
    return max(1.0, weight * DECAY) if comfortable else min(weight, largest)


def _encrypted(plan: Plan, total: int, budget: float) -> int:
    """Columns a client encrypts: those of all tiers within its budget."""
    return max((tier_ends([tier], total)[0] for tier in plan.tiers if tier <= budget), default=0)
