"""Which updates a server believes, by what it can see of them: sizes and example counts. Pure rules, no secret.

A server sees B, and of A that its entries are at most 1 in magnitude: clear ones are checked, encrypted ones are cut to
what entries of at most 1 can add up to when they are decrypted (`shelora.lora.restore`). The *norm* of an update is

    norm = s * sqrt( Σ_i n_i (Σ_j ‖b_ij‖₂)² )  >=  ‖ΔW‖_F

over its matrices i with n_i columns; b_ij are the columns of B_i, s is the scaling, ΔW all s B_i A_i together: a row
a_ij of A_i has at most norm sqrt(n_i), and ‖B_i A_i‖_F <= Σ_j ‖b_ij‖ ‖a_ij‖. For the aggregate

    ‖ΔW‖_F  <=  2 Σ_k w_k norm_k

over the updates k with weights w_k, whatever their ciphertexts hold (docs/protocol.md, "Screening").
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout
from shelora.lora.shards import UpdateShardContent

MOST_OF_A_SUM: Final = 1 / 4
"""Largest weight of one client among four or more. At a third, exchanged labels at one of the demo's four cost 8.4
points of accuracy, at a quarter 5.1, and honest runs were as good (docs/threat-model.md, "What one hostile member can
do")."""
ROUNDING: Final = 1e-9
"""Relative error of sums of counts that is taken for none."""


def squared_norm(layout: Layout, content: UpdateShardContent) -> float:
    """A shard's part Σ_i n_i (Σ_j ‖b_ij‖)² of the squared norm, without the scaling; 0 where servers see no norm."""
    return kind_of(layout.shards[content.shard]).squared_norm(layout, content)


def update_norm(scaling: float, squared_norms: Sequence[float]) -> float:
    """The norm of an update from the parts of its shards."""
    return scaling * math.sqrt(math.fsum(squared_norms))


def largest_believed(norms: Mapping[str, float], ratio: float) -> float:
    """The norm beyond which an update is left out: `ratio` times the cohort's median; infinite for a ratio of 0.

    Also infinite where the median says nothing: if it is 0. With two updates a ratio of 2 or more leaves out none.
    """
    middle = median(norms.values()) if norms else 0.0
    return ratio * middle if ratio and middle else math.inf


def counted_norm(norm: float, most: float) -> float:
    """The factor on an update, at most 1: one above half of `most`, what is believed at all, is scaled down to that.

    Norm bounding (Sun et al., "Can you really backdoor federated learning?", 2019), which needs norms alone.
    """
    return min(1.0, most / 2 / norm) if norm else 1.0


def largest_share(clients: int) -> float:
    """The largest weight of one of so many clients: a quarter, or twice an even share where that is less.

    Of fewer than four it is an even share.
    """
    return max(1 / clients, min(MOST_OF_A_SUM, 2 / clients))


def counted_examples(counts: Sequence[int], ratio: float) -> list[float]:
    """How many examples count of clients that claim so many, in the same order.

    Nobody can check a claim, so it is cut, twice: to `ratio` times the cohort's median (0: not at all), and to the
    level at which nobody has more than `largest_share` of the sum (Portnoy, Tirosh, Hendler, "Towards federated
    learning with Byzantine-robust client weighting", 2020). The order of weights is that of the claims.
    """
    if not counts:
        return []
    most = ratio * median(counts) if ratio else math.inf
    return _levelled([min(count, most) for count in counts], largest_share(len(counts)))


def shares(counts: Sequence[int], ratio: float) -> list[float]:
    """The weights of clients that claim so many examples: what counts of them, over its sum."""
    counted = counted_examples(counts, ratio)
    total = math.fsum(counted)
    return [count / total for count in counted]


def _levelled(counts: Sequence[float], share: float) -> list[float]:
    """Counts, the largest cut to one level at which each has at most that share of the sum, 1 / len(counts) or more."""
    rest = math.fsum(counts)
    for cut, largest in enumerate(sorted(counts, reverse=True)):
        level = share * rest / (1 - cut * share)
        if largest <= level * (1 + ROUNDING):
            return [min(count, level) for count in counts]
        rest -= largest
    raise AssertionError("a share of 1 / len(counts) or more is reached before all are cut")
