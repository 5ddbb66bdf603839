"""What clients tell of their examples inside a sum: only means come out, and only those that can be true."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError
from shelora.lora.figures import COUNT, LARGEST_LOSS, NOTHING, Figures, means, packed
from shelora.lora.layout import SumTerms
from shelora.lora.noise import ClientNoise

OWN = [
    Figures(accuracy=0.9, loss=0.3, train_loss=0.5),
    Figures(accuracy=0.7, loss=0.9, train_loss=1.5),
    Figures(train_loss=1.0),
    NOTHING,
]


def mean_of(own, weights=None, *, most=None):
    weights = np.array(weights or [1] * len(own)) / sum(weights or [1] * len(own))
    values = sum(weight * packed(one) for weight, one in zip(weights, own, strict=True))
    return means(values, noise=0.0, most=most or weights.max())


def test_means_are_over_those_that_tell():
    found = mean_of(OWN)
    assert found.accuracy == pytest.approx(0.8)
    assert found.loss == pytest.approx(0.6)
    assert found.train_loss == pytest.approx(1.0)
    heavy = mean_of(OWN, [3, 1, 1, 1])
    assert heavy.accuracy is None, "what is said beside one that weighs so much is nearly its own"
    assert heavy.train_loss == pytest.approx(0.8)


def test_what_one_client_alone_may_have_told_is_not_told():
    assert mean_of([OWN[0], NOTHING, NOTHING]) == NOTHING
    assert mean_of([OWN[0], OWN[2], NOTHING]) == Figures(train_loss=pytest.approx(0.75))
    assert mean_of([NOTHING] * 3) == NOTHING


@pytest.mark.parametrize(
    "lie",
    [
        [1, 9, 0, 1, 0],
        [1, -3.5, 0, 1, 0],
        [5, 0, 0, 1, 0],
        [-5, 0, 0, 1, 0],
        [1, 0, math.nan, 1, 0],
        [math.nan, 0, 0, 1, 0],
        [1, 0, 30, 1, 0],
    ],
)
def test_a_mean_that_cannot_be_true_is_none_and_the_others_stay(lie):
    honest = [Figures(accuracy=0.9, loss=0.3, train_loss=0.5)] * 3
    values = (sum(map(packed, honest)) + np.array(lie)) / 4
    found = means(values, noise=1e-6, most=1 / 4)
    assert (found.accuracy, found.loss) == (None, None)
    assert found.train_loss == pytest.approx(0.375)
    no_training = means(values[[3, 4, 4, 0, 1]], noise=1e-6, most=1 / 4)
    assert no_training.train_loss is None or math.isfinite(no_training.train_loss)


def test_noise_carries_no_honest_mean_out_of_its_range():
    values = sum(map(packed, [Figures(accuracy=1.0, loss=0.0, train_loss=LARGEST_LOSS)] * 4)) / 4
    found = means(values + 4e-5, noise=1e-5, most=1 / 4)
    assert found.accuracy == 1.0
    assert found.train_loss == LARGEST_LOSS


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, allow_infinity=True))
def test_every_value_is_one_that_a_sum_takes(loss, train_loss):
    values = packed(Figures(accuracy=0.5, loss=loss, train_loss=train_loss))
    assert values.shape == (COUNT,)
    assert np.abs(values).max() <= 1


@given(st.lists(st.floats(-9, 9), min_size=COUNT, max_size=COUNT), st.floats(0.01, 1))
def test_whatever_a_sum_holds_means_are_in_their_range(values, most):
    found = means(np.array(values), noise=1e-4, most=most)
    assert found.accuracy is None or 0 <= found.accuracy <= 1
    assert all(x is None or abs(x) <= LARGEST_LOSS for x in (found.loss, found.train_loss))


def test_sums_that_hide_clients_hold_no_figures():
    noise = ClientNoise(bound=1.0, clip=1.0, multiplier=1.0, honest=3)
    with pytest.raises(DomainError, match="no figures"):
        SumTerms(profile="standard", sketch_columns=6, sketch_rows=9, noise=noise, figures=True)


@pytest.mark.parametrize(("size", "found"), [(8, True), (16, False)])
def test_means_of_changing_cohorts_tell_each_clients_accuracy_and_of_one_cohort_none(size, found):
    """What the threat model says of them: accuracies that stay are found by least squares, from what is reported."""
    draw = np.random.default_rng(0)
    own = draw.uniform(0.6, 0.95, 16)
    asked = [draw.choice(16, size, replace=False) for _ in range(25)]
    told = [
        round(mean_of([Figures(accuracy=own[i], loss=1.0) for i in cohort]).accuracy, 4) for cohort in asked
    ]
    parts = np.array([[(i in cohort) / size for i in range(16)] for cohort in asked])
    guess = np.linalg.lstsq(parts, np.array(told), rcond=None)[0]
    assert (np.abs(guess - own).max() < 0.05) == found
