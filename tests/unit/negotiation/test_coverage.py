import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError
from shelora.lora.layout import Matrix
from shelora.negotiation.coverage import GROWTH, coverage, drift_report, next_weight, overlap
from shelora.negotiation.plan import Plan, make_plan
from shelora.negotiation.protocol import Stake

MATRIX = [Matrix("m", 4, 8)]
SCORES = {"m": np.array([8.0, 7, 6, 5, 4, 3, 2, 1])}
SHARES = st.floats(0, 1)


def plan(*columns, tiers=(0.25, 0.5)) -> Plan:
    return Plan(tiers, np.array(columns, np.uint32))


def test_a_clients_own_ranking_covers_everything():
    own = make_plan(SCORES, MATRIX, (0.25, 0.5))
    for budget in (0.0, 0.25, 0.5, 1.0):
        assert coverage(own, SCORES, MATRIX, budget) == 1
        assert overlap(own, SCORES, MATRIX, budget) == 1


def test_coverage_and_overlap_count_what_the_client_encrypts():
    reverse = plan(7, 6, 0, 1)
    assert coverage(reverse, SCORES, MATRIX, 0.25) == pytest.approx((1 + 2) / (8 + 7))
    assert coverage(reverse, SCORES, MATRIX, 0.5) == pytest.approx((1 + 2 + 8 + 7) / (8 + 7 + 6 + 5))
    assert overlap(reverse, SCORES, MATRIX, 0.25) == 0
    assert overlap(reverse, SCORES, MATRIX, 0.5) == 0.5


def test_a_client_that_finds_nothing_sensitive_is_covered():
    assert coverage(plan(7, 6, 0, 1), {"m": np.zeros(8)}, MATRIX, 0.5) == 1


@given(SHARES, SHARES, st.floats(0.01, 1), st.floats(1, 64))
def test_weights_stay_bounded_and_grow_only_below_the_floor(start, covered, floor, largest):
    weight = 1 + start * (largest - 1)
    after = next_weight(weight, covered, floor, largest)
    assert 1 <= after <= largest
    assert after <= weight * GROWTH
    if covered < floor:
        assert after >= weight
    else:
        assert after <= weight


@given(SHARES, SHARES)
def test_a_client_further_below_the_floor_gains_faster(one, two):
    low, high = sorted((one, two))
    assert next_weight(2, low, 0.7, 64) >= next_weight(2, high, 0.7, 64)


def test_without_a_floor_no_weight_grows():
    assert next_weight(1.0, 0.0, 0.0, 64.0) == 1.0


@given(SHARES, SHARES)
def test_a_report_is_relative_and_coarse(present, fresh):
    reported = drift_report(present, fresh)
    assert 0 <= reported <= 1
    assert round(reported * 20, 6) == round(reported * 20)
    assert drift_report(fresh, fresh) == 1, "a client a new plan serves badly reports what every other does"


@pytest.mark.parametrize(
    "fields", [{"budget": 1.1}, {"weight": 0.5}, {"weight": 3, "largest": 2}, {"largest": 65}]
)
def test_a_stake_out_of_range_is_refused(fields):
    with pytest.raises(DomainError):
        Stake(**fields)
