"""SHE-LoRA's negotiation as its authors publish it (arXiv 2505.21051, Eq. 14, and their code), and what it leaves.

Clients name columns with scores. Budgets are served one after the other, the smallest first. Each adds to what the
smaller ones encrypt, as many columns of every matrix: ⌊aλ⌋ from *Clients* (what this budget's own clients name, by
smallest score), then ⌊bλ⌋ from *Common* (by how many clients name a column), the rest from *Sensitivity* (by largest
score). The weights (a, b, 1 - a - b) are searched (`shelora.negotiation.search`) for the largest `fairness`: least
coverage less largest risk over clients and matrices.

`refined` improves such a choice under the same objective, and is at least as good at every budget: the proof is there.
Nothing here is secret: the coordinator runs it on labels and order-preserving numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.lora.shards import Float64
from shelora.negotiation.search import Weights, best_weights

REFINEMENTS: Final = 50
"""Sets that `refined` tries for each budget and matrix: as many as the published search tries weights."""
_STEP: Final = 4.0
"""How fast `refined` turns to clients it serves badly."""

Columns = NDArray[np.int64]
Chosen = list[Columns]
"""Columns chosen of each matrix, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Poll:
    """What clients find of one matrix."""

    scores: Float64
    """Of every client and column [clients, columns], at least 0."""
    named: NDArray[np.bool_]
    """Whether a client names a column among those that its budget allows, of the same shape."""

    @property
    def size(self) -> int:
        """Columns of the matrix."""
        return int(self.named.shape[1])

    def without(self, columns: Columns) -> "Poll":
        """The same with some columns named by nobody."""
        named = self.named.copy()
        named[:, columns] = False
        return Poll(self.scores, named)

    def shares(self) -> Float64:
        """What each column is of a client's named columns [2, clients, columns]: by number, and by score.

        Clients that name nothing are left out: nothing they want can be missed.
        """
        named = self.named[self.named.any(axis=1)]
        scores = np.where(named, self.scores[self.named.any(axis=1)], 0.0)
        scores = np.where(scores.any(axis=1, keepdims=True), scores, named)
        return np.stack([part / part.sum(axis=1, keepdims=True) for part in (named.astype(float), scores)])


def fairness(polls: Sequence[Poll], chosen: Sequence[Columns]) -> float:
    """Least coverage less largest risk (Eq. 14), over clients and matrices; -1 to 1.

    Coverage is the share of a client's named columns that are chosen, risk the share of their scores that are not.
    """
    return _fairness([poll.shares() for poll in polls], chosen)


def _fairness(shares: Sequence[Float64], chosen: Sequence[Columns]) -> float:
    coverage, safe = np.array(
        [_least(part, columns) for part, columns in zip(shares, chosen, strict=True)]
    ).min(axis=0)
    return float(coverage - (1 - safe))


def _least(shares: Float64, chosen: Columns) -> Float64:
    """Least coverage, and one less the largest risk, of one matrix."""
    least: Float64 = _served(shares, chosen).min(axis=1, initial=1.0)
    return least


def _served(shares: Float64, chosen: Columns) -> Float64:
    """What the chosen columns are of every client's [2, clients]."""
    indicator = np.zeros(shares.shape[2])
    indicator[chosen] = 1
    served: Float64 = shares @ indicator
    return served


def published(
    polls: Sequence[Poll], budgets: Sequence[int], ends: Sequence[int], fixed: Weights | None = None
) -> list[Chosen]:
    """The columns of every matrix that each budget encrypts, those of smaller budgets first.

    Args:
        polls: By matrix.
        budgets: Of every client, its place in `ends`; -1 if it encrypts nothing.
        ends: Columns of all matrices that each budget encrypts, increasing.
        fixed: Weights to use; None searches them for every budget, as published.
    """
    own = np.asarray(budgets)
    chosen: Chosen = [np.zeros(0, np.int64) for _ in polls]
    chain = []
    for budget, end in enumerate(ends):
        left = [poll.without(columns) for poll, columns in zip(polls, chosen, strict=True)]
        lists = [_lists(poll, columns, own == budget) for poll, columns in zip(left, chosen, strict=True)]
        counts = allotted(
            end - sum(map(len, chosen)), [p.size - len(c) for p, c in zip(polls, chosen, strict=True)]
        )
        weights = fixed or best_weights(_judge(left, lists, counts))
        chosen = [
            np.concatenate([before, picked(own_lists, count, weights)])
            for before, own_lists, count in zip(chosen, lists, counts, strict=True)
        ]
        chain.append(chosen)
    return chain


def _judge(
    polls: Sequence[Poll], lists: Sequence[list[Columns]], counts: Sequence[int]
) -> Callable[[Weights], float]:
    shares = [poll.shares() for poll in polls]

    def judge(weights: Weights) -> float:
        return _fairness(shares, [picked(own, n, weights) for own, n in zip(lists, counts, strict=True)])

    return judge


def _lists(poll: Poll, taken: Columns, own: NDArray[np.bool_]) -> list[Columns]:
    """Clients, Common, Sensitivity, and what nobody names: each in order."""
    voters: Float64 = poll.named.sum(axis=0, dtype=np.float64)
    largest = np.where(poll.named, poll.scores, -1).max(axis=0, initial=-1)
    mine = poll.named[own]
    smallest = np.where(mine, poll.scores[own], np.inf).min(axis=0, initial=np.inf)
    rest = np.equal(voters, 0)
    rest[taken] = False
    return [
        _order(smallest, largest, np.any(mine, axis=0)),
        _order(voters, largest, np.greater(voters, 0)),
        _order(largest, voters, np.greater(voters, 0)),
        np.flatnonzero(rest),
    ]


def _order(first: Float64, second: Float64, among: NDArray[np.bool_]) -> Columns:
    """Columns, the largest in the first key before others; of equal ones in the second, then by number."""
    columns = np.flatnonzero(among)
    return columns[np.lexsort((-second[columns], -first[columns]))]


def picked(lists: Sequence[Columns], count: int, weights: Weights) -> Columns:
    """`count` columns: the shares of the first two lists, rounded down, then the third, then what nobody names."""
    first, second = int(weights[0] * count), int(weights[1] * count)
    taken = np.zeros(1 + max(int(columns.max(initial=-1)) for columns in lists), dtype=np.bool_)
    parts, found = [], 0
    for columns, until in zip(lists, (first, first + second, count, count), strict=True):
        fresh = columns[~taken[columns]][: max(0, until - found)]
        taken[fresh] = True
        parts.append(fresh)
        found += len(fresh)
    return np.concatenate(parts)


def allotted(total: int, room: Sequence[int]) -> list[int]:
    """Splits a number of columns over matrices in proportion to what is left of each; largest remainders first."""
    space = sum(room)
    shares = [total * each // space if space else 0 for each in room]
    remainders = np.argsort([-(total * each % space) if space else 0 for each in room], kind="stable")
    for index in remainders[: total - sum(shares)].tolist():
        shares[index] += 1
    return shares


def refined(polls: Sequence[Poll], chain: Sequence[Chosen]) -> list[Chosen]:
    """A chain of the same sizes whose `fairness` is at least as large at every budget.

    For budget t any set of that size serves that holds R_(t-1), what is chosen before, and lies in P_(t+1), what the
    given chain has next. P_t is one: R_(t-1) lies in P_t by the choice before. So the best of those tried, P_t among
    them, is at least as good as P_t, and the next budget finds its P among its own. Coverage and risk are sums over
    columns; multiplicative weights on the clients served worst find sets that serve all (Arora, Hazan and Kale,
    Theory of Computing 8, 2012).
    """
    result = []
    before: Chosen = [np.zeros(0, np.int64) for _ in polls]
    everything = [np.arange(poll.size) for poll in polls]
    for own, within in zip(chain, [*chain[1:], everything], strict=True):
        before = [
            _improved(poll.shares(), *sets) for poll, *sets in zip(polls, before, own, within, strict=True)
        ]
        result.append(before)
    return result


def _improved(shares: Float64, before: Columns, own: Columns, within: Columns) -> Columns:
    """The best set found between `before` and `within`, no worse than `own` in coverage nor in risk."""
    start = _least(shares, own)
    best, best_value = own, float(start.sum())
    free = np.setdiff1d(within, before, assume_unique=True)
    count = len(own) - len(before)
    importance = np.ones(shares.shape[:2])
    for _ in range(REFINEMENTS if importance.size and 0 < count < len(free) else 0):
        values = np.einsum("kc,kcn->n", importance, shares[:, :, free])
        found = np.concatenate([before, free[np.argsort(-values, kind="stable")[:count]]])
        served = _served(shares, found)
        least = served.min(axis=1)
        if (least >= start).all() and least.sum() > best_value:
            best, best_value = found, float(least.sum())
        importance *= np.exp(-_STEP * (served - least[:, None]))
        importance /= importance.max()
    order = np.isin(best, before)
    return np.concatenate([before, best[~order]])
