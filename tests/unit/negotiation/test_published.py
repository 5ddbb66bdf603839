"""The paper's negotiation, step by step, and that ours is at least as good at its own objective."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from shelora.negotiation.published import Poll, allotted, fairness, picked, published, refined
from shelora.negotiation.search import TRIALS, best_weights

ROUNDING = 1e-12
"""Sums of the same columns in another order."""


def poll(scores, budgets) -> Poll:
    """Clients name as many columns as their budgets allow, those of their largest scores."""
    scores = np.asarray(scores, dtype=float)
    named = np.zeros(scores.shape, dtype=bool)
    for row, budget in enumerate(budgets):
        named[row, np.argsort(-scores[row], kind="stable")[:budget]] = True
    return Poll(scores, named)


def test_tiers_take_their_shares_of_clients_common_and_sensitivity_in_turn():
    scores = [
        [9, 8, 7, 0, 0, 0, 1, 2],  # names 0 1 2 7
        [9, 0, 0, 6, 5, 0, 0, 8],  # names 0 7 3 4
        [0, 0, 99, 98, 0, 0, 0, 0],  # names 2 3
    ]
    # Budget 2 belongs to the third client alone: Clients is 2, 3. Common: 2 and 3 (two voters), by largest score.
    # Sensitivity: 2 and 3 again, then 0.
    own = poll(scores, [4, 4, 2])
    chain = published([own], [1, 1, 0], [2, 4], fixed=(0.5, 0.5))
    assert chain[0][0].tolist() == [2, 3]
    # Budget 4 adds two: ⌊0.5·2⌋ from Clients (of the first two: 0 by its least score 9), then ⌊0.5·2⌋ from Common: 7.
    assert chain[1][0].tolist() == [2, 3, 0, 7]


def test_clients_go_by_the_smallest_score_of_this_budgets_clients():
    own = Poll(
        np.array([[5.0, 9, 0], [5, 1, 0], [0, 0, 7]]), np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    )
    (chosen,) = published([own], [0, 0, 1], [1], fixed=(1.0, 0.0))
    assert chosen[0].tolist() == [0], "column 0 has 5 at least, column 1 only 1"
    (chosen,) = published([own], [0, 0, 1], [1], fixed=(0.0, 0.0))
    assert chosen[0].tolist() == [1], "by largest score, 9"


def test_counts_are_rounded_down_and_sensitivity_takes_the_rest():
    lists = [np.array(part) for part in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12])]
    assert picked(lists, 4, (0.49, 0.49)).tolist() == [0, 4, 8, 9]
    assert picked(lists, 4, (1.0, 0.0)).tolist() == [0, 1, 2, 3]
    assert picked([np.array([0]), *lists[1:]], 4, (1.0, 0.0)).tolist() == [0, 4, 5, 6], (
        "a short list is filled"
    )


def test_every_matrix_gets_the_same_share_of_columns():
    assert allotted(10, [50, 50]) == [5, 5]
    assert allotted(3, [10, 10, 10, 10]) == [1, 1, 1, 0]
    assert allotted(12, [1, 20]) == [1, 11]
    for total in range(31):
        parts = allotted(total, [10, 4, 17])
        assert sum(parts) == total
        assert all(part <= room for part, room in zip(parts, [10, 4, 17], strict=True))


def test_fairness_is_the_least_coverage_less_the_largest_risk():
    polls = [Poll(np.array([[3.0, 1, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 1, 1]], dtype=bool))]
    assert fairness(polls, [np.array([0, 1, 2])]) == 1
    assert fairness(polls, [np.array([], int)]) == -1
    assert fairness(polls, [np.array([1])]) == pytest.approx(0.5 - 0.75)
    assert fairness(polls, [np.array([0])]) == pytest.approx(0 - 1)


def test_the_search_finds_the_corner_that_is_best_within_its_trials():
    for best in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.25, 0.5)):
        calls = []

        def objective(weights, best=best, calls=calls):
            calls.append(weights)
            return -abs(weights[0] - best[0]) - abs(weights[1] - best[1])

        found = best_weights(objective)
        assert np.abs(np.subtract(found, best)).max() < 0.1
        assert len(calls) == len(set(calls)) == TRIALS
        assert all(a >= 0 and b >= 0 and a + b <= 1 + ROUNDING for a, b in calls)


def test_a_constant_objective_is_searched_without_failing():
    assert sum(best_weights(lambda _: 0.5)) <= 1 + ROUNDING


@cache
def cohorts():
    """Sensitivities that clients share, share in part, and do not share; budgets of 2 to 50 percent."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        columns, clients = 48, int(rng.integers(3, 9))
        ends = np.unique(
            np.ceil(columns * rng.choice([0.02, 0.05, 0.1, 0.2, 0.5], 3, replace=False)).astype(int)
        )
        own = rng.integers(0, len(ends), clients)
        common = rng.lognormal(0, 1, (2, columns))
        spread = (0.3, 1.0, 2.0)[seed % 3]
        polls = [poll(base * rng.lognormal(0, spread, (clients, columns)), ends[own]) for base in common]
        theirs = published(polls, own.tolist(), (2 * ends).tolist())
        found.append((polls, theirs, refined(polls, theirs)))
    return found


def test_our_choice_is_at_least_as_good_as_the_published_one_at_every_budget_by_its_own_objective():
    better = 0
    for polls, theirs, chain in cohorts():
        for given, ours in zip(theirs, chain, strict=True):
            assert [len(c) for c in ours] == [len(c) for c in given]
            gain = fairness(polls, ours) - fairness(polls, given)
            assert gain >= -ROUNDING
            better += gain > 0.01
    assert better >= 4, "better at many, not merely the same"


def test_our_choice_serves_every_budget_by_a_prefix():
    for _, _, chain in cohorts():
        for smaller, larger in pairwise(chain):
            for before, after in zip(smaller, larger, strict=True):
                np.testing.assert_array_equal(after[: len(before)], before)
                assert len(set(after.tolist())) == len(after)
