import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.obfuscation import Obfuscation
from tests.vectors.make_lora_vectors import SECRET, golden, vectors

SEVENTH = Obfuscation(SECRET, 7)


@pytest.mark.parametrize(
    "name",
    [
        "permutation",
        "long_permutation_sha256",
        "initial_A",
        "initial_tensor",
        "plan_key",
        "sketch",
        "long_sketch_sha256",
    ],
)
def test_what_is_derived_from_a_secret_is_what_is_on_file(name):
    """Agents of different releases train together only if they derive the same."""
    assert vectors()[name] == golden()[name]


@given(columns=st.integers(0, 3000), name=st.text(st.characters(codec="utf-8"), max_size=20))
def test_an_order_is_a_permutation_and_the_same_every_time(columns, name):
    order = SEVENTH.permutation(name, columns)
    assert (np.sort(order) == np.arange(columns)).all()
    assert (order == Obfuscation(SECRET, 7).permutation(name, columns)).all()


@given(rank=st.integers(1, 20), more=st.integers(0, 20), columns=st.integers(1, 60))
def test_the_initial_a_of_a_smaller_rank_is_the_first_rows_of_a_larger(rank, more, columns):
    small, large = SEVENTH.initial_A("q", rank, columns), SEVENTH.initial_A("q", rank + more, columns)
    assert (large[:rank] == small).all()


def test_the_initial_a_is_uniform_within_the_bound_of_peft():
    A = SEVENTH.initial_A("q", 64, 900)
    assert A.dtype == np.float32
    A = A * np.sqrt(900)
    assert np.abs(A).max() <= 1 + 1e-6
    counts, _ = np.histogram(A, bins=20, range=(-1, 1))
    expected = A.size / 20
    assert (np.abs(counts - expected) < 6 * np.sqrt(expected)).all()


def test_initial_tensors_are_uniform_by_their_fan_in_and_vectors_zero():
    head = SEVENTH.initial_tensor("head", (40, 5, 5)) * 5
    assert 0.95 < np.abs(head).max() <= 1 + 1e-6
    assert not SEVENTH.initial_tensor("bias", (40,)).any()
    assert SEVENTH.initial_tensor("scalar", ()).shape == ()


def test_sketches_are_integers_of_about_a_normal_distribution():
    drawn = SEVENTH.sketch("columns", "q", 1, (301, 101))
    assert drawn.dtype == np.int16
    assert np.abs(drawn).max() <= 510
    values = drawn.astype(float).ravel()
    assert abs(values.mean()) < 5
    assert abs(values.var() / 21845 - 1) < 0.03
    assert abs((values**4).mean() / values.var() ** 2 - 2.7) < 0.1, "four bytes: kurtosis 3 - 6/5/4"
    for other in (("rows", "q", 1), ("columns", "p", 1), ("columns", "q", 2)):
        assert (SEVENTH.sketch(*other, (301, 101)) == drawn).mean() < 0.02


OTHERS = [Obfuscation(SECRET, 8), Obfuscation(SECRET[::-1], 7), Obfuscation(bytes(32), 7)]


@pytest.mark.parametrize("other", OTHERS)
def test_another_epoch_or_secret_derives_other_values(other):
    assert (SEVENTH.permutation("q", 500) != other.permutation("q", 500)).mean() > 0.9
    assert (SEVENTH.initial_A("q", 2, 500) != other.initial_A("q", 2, 500)).mean() > 0.99
    assert SEVENTH.plan_key() != other.plan_key()


@pytest.mark.parametrize("other", ["k", "Q", "", "q/", "7/q", "column-order/7/q"])
def test_another_name_derives_other_values(other):
    assert (SEVENTH.permutation("q", 500) != SEVENTH.permutation(other, 500)).mean() > 0.9
    assert (SEVENTH.initial_A("q", 2, 500) != SEVENTH.initial_A(other, 2, 500)).mean() > 0.99


def test_purposes_share_no_key_stream():
    order = SEVENTH.permutation("q", 500)
    assert (np.argsort(SEVENTH.initial_A("q", 1, 500)[0], kind="stable") != order).any()
    assert (SEVENTH.initial_A("q", 10, 50) != SEVENTH.initial_tensor("q", (10, 50))).any()


def test_orders_are_spread_over_all_places():
    """Each column stands at each place about equally often."""
    places = np.zeros((8, 8))
    for index in range(2000):
        places[np.arange(8), SEVENTH.permutation(f"m{index}", 8)] += 1
    assert (np.abs(places - 250) < 6 * np.sqrt(250)).all()


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(length):
    with pytest.raises(DomainError) as refusal:
        Obfuscation(bytes(length), 1)
    assert refusal.value.reason is Reason.SECRET_UNAVAILABLE


def test_no_representation_shows_the_secret():
    for text in (repr(SEVENTH), str(SEVENTH), f"{SEVENTH}"):
        assert text == "Obfuscation(epoch=7)"


def test_the_plan_key_is_not_the_secret_nor_its_digest():
    key = SEVENTH.plan_key()
    assert len(key) == 32
    assert key not in (SECRET, hashlib.sha256(SECRET).digest())
