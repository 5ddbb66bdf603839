"""When a federation has trained long enough, by its operator's rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import stopping
from coordinator.records import EvaluationRecord, Means
from shelora.federation import StopSpec

LOSS, ACCURACY = StopSpec(patience=2), StopSpec(metric="accuracy", patience=2, threshold=0.01)


def evaluation(client, loss=1.0, right=50):
    return EvaluationRecord(
        client_id=client,
        example_count=100,
        correct_count=right,
        loss=loss,
        download_s=0,
        decrypt_s=0,
        evaluate_s=0,
        download_bytes=0,
    )


def after(rule, values):
    seen = None
    for number, value in enumerate(values, start=1):
        seen = stopping.judged(rule, seen, number, value)
    return seen


def test_rounds_after_the_best_one_are_counted():
    seen = after(LOSS, [1.0, 0.8, 0.9])
    assert (seen.best, seen.value, seen.waited) == (2, 0.8, 1)
    assert not stopping.is_over(LOSS, seen)
    assert stopping.is_over(LOSS, after(LOSS, [1.0, 0.8, 0.9, 0.8]))
    assert not stopping.is_over(LOSS, after(LOSS, [1.0, 0.8, 0.9, 0.79]))
    assert not stopping.is_over(LOSS, None)


def test_a_gain_within_the_threshold_is_none():
    assert stopping.is_over(ACCURACY, after(ACCURACY, [0.80, 0.805, 0.809]))
    assert after(ACCURACY, [0.80, 0.805, 0.82]).best == 3


def test_a_round_without_a_value_or_judged_before_changes_nothing():
    seen = after(LOSS, [1.0, 0.8])
    assert stopping.judged(LOSS, seen, 3, None) is seen
    assert stopping.judged(LOSS, seen, 2, 0.1) is seen, "a round that is repeated was judged"


def test_a_round_is_judged_by_the_median_over_clients_of_which_there_are_enough():
    told = [evaluation("a", 1.0, 90), evaluation("b", 2.0, 50), evaluation("c", 9.0, 10)]
    assert stopping.value_of(LOSS, told, 3) == 2.0
    assert stopping.value_of(ACCURACY, told, 3) == 0.5
    assert stopping.value_of(LOSS, told[:2], 3) is None
    silent = evaluation("c").model_copy(update={"example_count": 0})
    assert stopping.value_of(LOSS, [*told[:2], silent], 3) is None
    assert stopping.value_of(LOSS, [], 0) is None


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9), st.floats(-1e9, 1e9))
def test_one_liar_moves_a_round_no_farther_than_to_an_honest_value(honest, lie):
    told = [evaluation(str(i), loss) for i, loss in enumerate([*honest, lie])]
    assert min(honest) <= stopping.value_of(LOSS, told, 3) <= max(honest) or len(honest) == 1


@pytest.mark.parametrize("rule", [LOSS, ACCURACY])
def test_what_is_better_is_what_the_metric_says(rule):
    better, worse = (0.9, 0.5) if rule.metric == "accuracy" else (0.5, 0.9)
    assert rule.gain(better, worse) == pytest.approx(0.4)
    assert rule.gain(worse, better) == pytest.approx(-0.4)


def meaning(client, accuracy=0.5, loss=1.0):
    """As under `complete`: nothing of its own."""
    empty = {"example_count": 0, "correct_count": 0, "loss": 0.0}
    return evaluation(client).model_copy(update=empty | {"means": Means(accuracy=accuracy, loss=loss)})


def test_where_only_means_are_told_a_round_is_judged_by_what_most_say_they_are():
    told = [meaning("a", 0.9, 0.3), meaning("b", 0.9, 0.3), meaning("liar", 0.0, 99.0)]
    assert stopping.value_of(ACCURACY, told, 3, of_means=True) == 0.9
    assert stopping.value_of(LOSS, told, 3, of_means=True) == 0.3
    assert stopping.value_of(LOSS, told, 3) is None, "nobody tells its own"
    silent = meaning("c").model_copy(update={"means": Means()})
    assert stopping.value_of(LOSS, [*told[:2], silent], 3, of_means=True) is None
    assert stopping.value_of(LOSS, [evaluation(c) for c in "abc"], 3, of_means=True) is None
