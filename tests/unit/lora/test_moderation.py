"""What one member can do to the model in a sum that no server can look into."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.lora.moderation import MULTIPLE, REMEMBERED, SPREAD, moderated, remembered

NORMS = st.floats(0, 1e12, allow_subnormal=False)


@given(change=NORMS, own=NORMS, last=st.lists(NORMS, max_size=5))
def test_no_change_is_longer_than_the_multiple_of_what_is_known_and_none_is_lengthened(change, own, last):
    found = moderated(change, own, last)
    known = max(own, *last[-REMEMBERED:], 0.0)
    assert 0 < found.factor <= 1
    assert found.accepted <= change
    if known:
        assert found.accepted <= MULTIPLE * known * (1 + 1e-12)
        assert found.cut == (change > MULTIPLE * known)
    else:
        assert found.accepted == change


def test_honest_rounds_pass_whole_also_where_clients_differ_by_what_is_usual():
    rng, last = np.random.default_rng(0), ()
    for number in range(30):
        own, change = (0.9**number * rng.uniform(0.5, 1.0) for _ in range(2))
        found = moderated(change, own, last)
        assert not found.cut
        last = remembered(last, found.accepted, own)
    assert len(last) == REMEMBERED


def test_an_attacker_moves_the_model_by_a_multiple_a_round_where_it_could_have_replaced_it():
    """The control is the sum itself."""
    honest, attack = 1.0, 1e6
    found = moderated(attack, honest, (1.0, 1.0))
    assert found.accepted == MULTIPLE
    assert found.factor * attack == pytest.approx(MULTIPLE)
    assert attack > 1e5 * MULTIPLE


def test_an_attacker_that_goes_to_the_limit_every_round_does_not_raise_it():
    """Remembered as they are, such rounds would raise the limit to MULTIPLE^20."""
    last = ()
    for _ in range(20):
        limit = MULTIPLE * max(1.0, *last, 0.0)
        found = moderated(limit, 1.0, last)
        assert not found.cut
        assert found.accepted <= MULTIPLE * SPREAD
        last = remembered(last, found.accepted, 1.0)


def test_a_round_that_was_sat_out_says_nothing():
    assert remembered((1.0, 2.0), 500.0, 0.0) == (1.0, 2.0)


def test_who_neither_sent_nor_remembers_has_nothing_to_measure_by():
    assert moderated(5.0, 0.0, ()).factor == 1


@pytest.mark.parametrize(
    "norms", [(float("nan"), 1, ()), (float("inf"), 1, ()), (1, float("nan"), ()), (1, 1, (float("inf"),))]
)
def test_a_sum_that_is_not_finite_is_refused(norms):
    with pytest.raises(DomainError) as refused:
        moderated(*norms)
    assert refused.value.reason is Reason.VALUE_NOT_FINITE
