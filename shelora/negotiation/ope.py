"""The paper's negotiation as agents see it: order-preserving numbers under secret labels.

Scores are quantized and passed through a random strictly increasing function, columns are renamed by a random
permutation of each matrix; both are keyed by the obfuscation secret and the vote, so that all agents agree on them
within a vote and nothing can be compared between votes. docs/negotiation.md says what the coordinator learns.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.lora.layout import Matrix
from shelora.lora.shards import Float64
from shelora.negotiation.ballots import Ballot
from shelora.negotiation.plan import Plan, joined_scores
from shelora.negotiation.protocol import MAX_VOTE_WEIGHT, Stake
from shelora.negotiation.published import allotted
from shelora.negotiation.ranking import Ranking, tier_ends, total_columns
from shelora.negotiation.votes import VOTE_BOUND, normalized
from shelora.obfuscation import Obfuscation

LEVELS: Final = 2**16
"""Quantization levels: neighbours differ by 1/8000 of an even vote for small scores and by 0.013 % for large ones."""


class Ope:
    """The protocol `ope` for one vote."""

    def __init__(self, matrices: Sequence[Matrix], obfuscation: Obfuscation, vote: str) -> None:
        """`vote`: identifies the vote; labels and numbers of two votes have nothing in common."""
        self._matrices = tuple(matrices)
        self._obfuscation = obfuscation
        self._vote = vote

    def cast(self, scores: Mapping[str, Float64], stake: Stake) -> Ballot:
        """The client's most sensitive columns of each matrix, as many as its budget allows, in equal parts."""
        parts = normalized(self._matrices, scores)
        shares = joined_scores(parts, self._matrices)
        top = self._top([parts[m.name] for m in self._matrices], stake.budget)
        levels = quantize(shares[top] * len(shares) * stake.weight)
        labels = np.argsort(self._columns())[top]
        order = np.argsort(labels)
        values = self._obfuscation.increasing(self._vote, LEVELS)[levels]
        return Ballot(labels[order].astype(np.uint32), values[order])

    def plan(self, outcome: Ranking, tiers: Sequence[float]) -> Plan:
        """The plan behind the coordinator's list of labels. Raises PLAN_REFUSED if it does not fit the tiers."""
        outcome.require_fit(total_columns(self._matrices), tiers)
        return Plan(outcome.tiers, self._columns()[outcome.columns].astype(np.uint32))

    def _top(self, shares: Sequence[Float64], budget: float) -> NDArray[np.int64]:
        """Columns of all matrices, numbered through: k of every matrix, as published."""
        sizes = [len(part) for part in shares]
        counts = allotted(tier_ends([budget], sum(sizes))[0], sizes)
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        return np.concatenate(
            [
                start + np.argsort(-part, kind="stable")[:count]
                for start, part, count in zip(starts, shares, counts, strict=True)
            ]
        )

    def _columns(self) -> NDArray[np.int64]:
        """True column by label, both numbered through over all matrices; labels stay within their matrix."""
        starts = np.cumsum([0, *(m.in_features for m in self._matrices)])
        parts = [
            start + self._obfuscation.labels(self._vote, m.name, m.in_features)
            for start, m in zip(starts, self._matrices, strict=False)
        ]
        return np.concatenate(parts)


def quantize(multiples: Float64) -> NDArray[np.int64]:
    """Levels 0 to LEVELS - 1 of scores in multiples of an even vote: logarithmic, so that the tail stays told apart."""
    largest = VOTE_BOUND * MAX_VOTE_WEIGHT
    scaled = np.log1p(np.clip(multiples, 0, largest)) / np.log1p(largest)
    levels: NDArray[np.int64] = np.floor(scaled * (LEVELS - 1)).astype(np.int64)
    return levels
