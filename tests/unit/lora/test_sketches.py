"""The sum of updates from the sum of their sketches, against float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.shards import FactoredUpdate, LoraFactors
from shelora.lora.sketches import (
    GROWTH_BITS,
    HEADROOM,
    MAX_EXPONENT,
    Clipping,
    ExponentRange,
    Exponents,
    Sketch,
    Sketcher,
    best_cut,
    bound_of,
    exponent_above,
    first_exponents,
    joined,
    next_exponents,
    packed,
    sketch_sizes,
    unpacked,
)
from shelora.obfuscation import Obfuscation

SECRET = Obfuscation(bytes(range(32)), 3)


def terms_for(max_rank):
    columns, rows = sketch_sizes(max_rank)
    return SumTerms(profile="standard", sketch_columns=columns, sketch_rows=rows)


def cohort(rng, matrix, ranks, magnitude=1.0):
    return [
        (
            magnitude * rng.standard_normal((matrix.out_features, r)),
            rng.uniform(-1, 1, (r, matrix.in_features)),
        )
        for r in ranks
    ]


def summed(sketches):
    return Sketch(*(sum(getattr(s, part) for s in sketches) for part in "PNZ"))


def with_noise(sketch, level, rng):
    parts = (sketch.P, sketch.N, sketch.Z)
    return Sketch(*(part + level * rng.standard_normal(part.shape) for part in parts))


def product(update):
    return update.Q @ update.M


def relative(found, wanted):
    scale = np.linalg.norm(wanted)
    return np.linalg.norm(found - wanted) / scale if scale else np.linalg.norm(found)


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 60),
    columns=st.integers(1, 60),
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_sum_is_exact_once_the_sketch_has_as_many_columns_as_its_rank(
    out, columns, ranks, magnitude, seed
):
    matrix = Matrix("m", out, columns)
    members = cohort(np.random.default_rng(seed), matrix, ranks, magnitude)
    sketcher = Sketcher.draw(SECRET, terms_for(max(1, sum(ranks))), matrix, seed % 100)
    found = sketcher.recovered(summed([sketcher.sketch(B, A) for B, A in members]))
    wanted = sum(B @ A for B, A in members)
    assert relative(product(found), wanted) < 1e-6
    np.testing.assert_allclose(found.Q.T @ found.Q, np.eye(found.Q.shape[1]), atol=1e-10)


@pytest.mark.parametrize(("decay", "most"), [(0.5, 1.2), (0.8, 3.2), (1.0, 2.0)])
def test_beyond_that_rank_the_error_is_close_to_that_of_the_best_cut(decay, most):
    """Spectra that fall by `decay` a component: the rank-16 cut with k = l = 21 against the best one."""
    matrix, worst = Matrix("m", 96, 80), 0.0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        U, V = (np.linalg.qr(rng.standard_normal((n, 60)))[0] for n in (96, 80))
        W = (U * decay ** np.arange(60)) @ V.T
        sketcher = Sketcher.draw(SECRET, terms_for(16), matrix, seed)
        cut = best_cut(sketcher.recovered(sketcher.sketch(W, np.eye(80))), 16)
        best = np.sqrt((decay ** (2 * np.arange(16, 60))).sum())
        worst = max(worst, np.linalg.norm(product(cut) - W) / best)
    assert worst < most


def test_a_client_of_any_rank_sends_as_much():
    matrix, terms, rng = Matrix("m", 30, 40), terms_for(4), np.random.default_rng(0)
    sketcher = Sketcher.draw(SECRET, terms, matrix, 1)
    shapes = {
        (s.P.shape, s.N.shape, s.Z.shape)
        for s in (sketcher.sketch(B, A) for B, A in cohort(rng, matrix, [0, 1, 4, 16]))
    }
    assert shapes == {((30, 6), (6, 40), (9, 9))}


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (1, 50), (50, 1), (3, 4), (4, 3)])
def test_a_matrix_smaller_than_its_sketch_is_sent_by_no_more_than_its_size_needs(out, columns):
    matrix, terms = Matrix("m", out, columns), terms_for(16)
    W = np.random.default_rng(1).standard_normal((out, columns))
    sketcher = Sketcher.draw(SECRET, terms, matrix, 2)
    sketch = sketcher.sketch(W, np.eye(columns))
    assert sketch.P.shape[1] == min(out, columns)
    assert relative(product(sketcher.recovered(sketch)), W) < 1e-6


def test_only_the_corner_of_the_core_travels_and_the_whole_of_it_is_restored():
    """Its other rows and columns are N Χ and Φ P: 900 values of a sketch of rank 16 in place of 2 601."""
    matrix, terms, rng = Matrix("m", 60, 50), terms_for(16), np.random.default_rng(8)
    sketcher = Sketcher.draw(SECRET, terms, matrix, 1)
    sketch = summed([sketcher.sketch(B, A) for B, A in cohort(rng, matrix, [4, 16])])
    W = sum(B @ A for B, A in cohort(np.random.default_rng(8), matrix, [4, 16]))
    assert sketch.Z.shape == terms.corner(matrix) == (30, 30)
    np.testing.assert_allclose(sketcher._core(sketch), sketcher.phi @ W @ sketcher.chi, atol=1e-9)


def test_a_zero_sum_is_restored_as_zero_and_so_is_one_that_is_all_noise():
    matrix, rng = Matrix("m", 40, 50), np.random.default_rng(5)
    sketcher = Sketcher.draw(SECRET, terms_for(8), matrix, 1)
    zero = sketcher.sketch(np.zeros((40, 3)), np.zeros((3, 50)))
    assert sketcher.recovered(zero).M.shape == (0, 50)
    noisy = with_noise(zero, 1e-6, rng)
    assert not product(sketcher.recovered(noisy, 1e-6, 1e-6)).any()
    assert sketcher.recovered(noisy).M.shape[0] > 0, "the control: without the floor noise becomes components"


def test_noise_costs_its_own_size_and_does_not_multiply():
    matrix, rng = Matrix("m", 60, 70), np.random.default_rng(6)
    sketcher = Sketcher.draw(SECRET, terms_for(8), matrix, 1)
    (B, A), *_ = cohort(rng, matrix, [3])
    exact = sketcher.sketch(B, A)
    level = 1e-6 * np.abs(exact.P).max()
    noisy = with_noise(exact, level, rng)
    assert relative(product(sketcher.recovered(noisy, level, level)), B @ A) < 1e-5


def test_rank_deficient_updates_and_cancelling_ones_are_exact():
    matrix, rng = Matrix("m", 20, 30), np.random.default_rng(2)
    (B, A), (other, _) = cohort(rng, matrix, [4, 4])
    B[:, 3] = B[:, 0]
    A[3] = A[0]
    sketcher = Sketcher.draw(SECRET, terms_for(4), matrix, 1)
    for members in ([(B, A)], [(B, A), (-B, A), (other, A)]):
        found = sketcher.recovered(summed([sketcher.sketch(*m) for m in members]))
        assert relative(product(found), sum(b @ a for b, a in members)) < 1e-8


def test_omega_and_psi_are_the_same_to_the_bit_and_others_in_every_round():
    matrix, terms = Matrix("m", 30, 40), terms_for(4)
    first, again = (Sketcher.draw(Obfuscation(bytes(range(32)), 3), terms, matrix, 7) for _ in range(2))
    assert first.chi.tobytes() == again.chi.tobytes()
    assert first.phi.tobytes() == again.phi.tobytes()
    later = Sketcher.draw(SECRET, terms, matrix, 8)
    assert (first.chi == later.chi).mean() < 0.05
    norms = np.linalg.norm(first.chi, axis=0)
    assert (norms > 0.3).all()
    assert (norms < 1.5).all()


def test_what_sums_lead_to_does_not_depend_on_one_machines_singular_vectors(monkeypatch):
    """Agents with another LAPACK have other signs, other bases of degenerate spaces: they restore the same product."""
    matrix, rng = Matrix("m", 24, 30), np.random.default_rng(3)
    sketcher = Sketcher.draw(SECRET, terms_for(6), matrix, 1)
    Q, _ = np.linalg.qr(rng.standard_normal((24, 4)))
    R, _ = np.linalg.qr(rng.standard_normal((30, 4)))
    sketch = sketcher.sketch(Q, R.T)  # four equal singular values
    here = product(best_cut(sketcher.recovered(sketch), 4))
    real = np.linalg.svd

    def elsewhere(a, full_matrices=True):
        left, values, right = real(a + 1e-15 * rng.standard_normal(a.shape), full_matrices=full_matrices)
        signs = rng.choice([-1.0, 1.0], len(values))
        return left * signs, values, signs[:, None] * right

    monkeypatch.setattr(np.linalg, "svd", elsewhere)
    np.testing.assert_allclose(product(best_cut(sketcher.recovered(sketch), 4)), here, atol=1e-9)


def test_dead_components_are_not_restored():
    matrix = Matrix("m", 20, 20)
    U = np.linalg.qr(np.random.default_rng(4).standard_normal((20, 20)))[0]
    W = (U * np.array([1.0, 0.1, 1e-9] + [0.0] * 17)) @ U.T
    cut = best_cut(FactoredUpdate(U, U.T @ W), 10)
    assert cut.M.shape[0] == 2
    assert relative(product(cut), W) < 1e-8
    assert best_cut(FactoredUpdate(U, np.zeros((20, 20))), 3).M.shape == (0, 20)
    assert matrix.out_features == 20


def test_bounds_follow_the_last_mean_and_stay_where_nothing_moved():
    mean = Sketch(np.array([[0.3, -0.5], [0.1, 0.1]]), np.array([[0.001]]), np.zeros((1, 1)))
    above = next_exponents(mean, Exponents(9, 9))
    assert above == Exponents(exponent_above(np.sqrt(0.17)), exponent_above(0.001)) == Exponents(5, -30)
    assert next_exponents(Sketch(*3 * [np.zeros((2, 2))]), Exponents(1, -3)) == Exponents(1, -3)
    for largest in (1e-300, 0.2, 0.25, 1.0, 1e300):
        e = exponent_above(largest)
        assert abs(e) <= MAX_EXPONENT
        assert bound_of(e) > HEADROOM * largest or e == MAX_EXPONENT
        assert bound_of(e - 1) <= HEADROOM * largest or e == -MAX_EXPONENT


def test_bounds_leave_room_for_the_first_round_that_moves_and_for_all_that_moved():
    matrix = Matrix("m", 384, 384)
    first = first_exponents(matrix, 4, 0.05)
    in_fourth = ExponentRange.of(matrix, 4, 0.05, 4)
    most = first_exponents(matrix, 4, 4 * 0.05)
    assert in_fourth.exponents(None) == first
    least = Exponents(first.P - 4 * GROWTH_BITS, first.N - 4 * GROWTH_BITS)
    assert in_fourth.exponents(Exponents(-200, -200)) == least
    between = Exponents(first.P + 1, most.N - 1)
    assert in_fourth.exponents(between) == between
    assert in_fourth.exponents(Exponents(200, 200)) == most
    assert most.P > first.P + 8, "four times as far and more"
    assert ExponentRange.of(matrix, 4, 0.05, 1).exponents(Exponents(200, 200)) == first


def test_one_that_sends_its_bounds_every_round_does_not_raise_them_for_ever():
    """Without the limit each round takes two bits of precision from the others', until nothing is left."""
    matrix, move = Matrix("m", 6, 5), 0.05
    bounds, unlimited = None, 0
    for number in range(1, 41):
        possible = ExponentRange.of(matrix, 4, move, number)
        bounds = possible.exponents(bounds)
        assert possible.holds(bounds)
        full = Sketch(*(np.full((1, 1), bound_of(e)) for e in (bounds.P, bounds.N, bounds.P)))
        bounds, unlimited = next_exponents(full, bounds), unlimited + 8
    last, first = possible.exponents(bounds), possible.first
    assert last.P - first.P < 4 * 13, "forty rounds of honest steps: 40 times each factor at most"
    assert unlimited > 4 * 64


@pytest.mark.parametrize("lie", [-40, 40])
def test_bounds_that_no_honest_client_sends_under_are_noticed(lie):
    """A member that sends other exponents times its weight's inverse moves their mean by a whole number."""
    matrix, terms = Matrix("m", 6, 5), terms_for(2)
    possible = ExponentRange.of(matrix, 2, 0.05, 1)
    sketch = Sketcher.draw(SECRET, terms, matrix, 1).sketch(np.full((6, 1), 1e-3), np.full((1, 5), 1e-3))
    honest = packed("m", sketch, possible.first, Clipping())
    mean = honest.copy()
    mean[-2] += lie / MAX_EXPONENT
    assert unpacked(matrix, terms, honest, possible)[1] == possible.first
    with pytest.raises(DomainError, match="some client lies") as refused:
        unpacked(matrix, terms, mean, possible)
    assert refused.value.reason is Reason.SUM_UNREADABLE


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("features", [(32, 32), (384, 384), (3072, 768)])
def test_the_first_bound_holds_what_adam_can_move_and_not_much_more(rank, features):
    matrix, move, rng = Matrix("m", *features), 16 * 3e-3, np.random.default_rng(rank)
    bounds, limits = first_exponents(matrix, 16, move), Clipping()
    signs = rng.choice([-1.0, 1.0], (features[0], rank)), rng.choice([-1.0, 1.0], (rank, features[1]))
    A = SECRET.initial_A("m", rank, features[1]) + move * signs[1]
    sketch = Sketcher.draw(SECRET, terms_for(16), matrix, 1).sketch(2.0 * move * signs[0], A)
    packed("m", sketch, bounds, limits)
    assert limits.clipped == 0
    for values, exponent in ((sketch.P, bounds.P), (sketch.N, bounds.N)):
        assert np.abs(values).max() * 2**14 > bound_of(exponent), "of 24 bits at least ten are left"


def test_clipped_values_are_counted_by_matrix_and_cut_to_the_bound():
    clipping = Clipping()
    sketch = Sketch(np.array([[3.0, -0.5]]), np.array([[-9.0, 1.0]]), np.array([[1.0]]))
    values = packed("m", sketch, Exponents(4, 8), clipping)
    np.testing.assert_array_equal(values, [1.0, -0.25, -1.0, 0.25, 0.5, 1 / 64, 2 / 64])
    assert (clipping.clipped, clipping.values, clipping.matrices) == (2, 5, {"m"})
    packed("other", replace(sketch, P=sketch.P / 9, N=sketch.N / 9), Exponents(4, 8), clipping)
    assert (clipping.clipped, clipping.matrices) == (2, {"m"})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(DomainError, match=r"layer\.3") as refused:
        packed(
            "layer.3",
            Sketch(np.array([[value]]), np.zeros((1, 1)), np.zeros((1, 1))),
            Exponents(0, 0),
            Clipping(),
        )
    assert refused.value.reason is Reason.VALUE_NOT_FINITE


def test_the_mean_of_packed_values_is_the_mean_under_bounds_that_all_agree_on():
    matrix, terms, rng = Matrix("m", 6, 5), terms_for(2), np.random.default_rng(7)
    sketcher = Sketcher.draw(SECRET, terms, matrix, 1)
    weights = np.array([0.75, 0.25])
    sketches = [sketcher.sketch(B, A) for B, A in cohort(rng, matrix, [1, 2])]
    possible = ExponentRange.of(matrix, 2, 2.0, 1)
    bounds = possible.first
    mean = sum(w * packed("m", s, bounds, Clipping()) for w, s in zip(weights, sketches, strict=True))
    found, agreed = unpacked(matrix, terms, mean + 1e-6, possible)
    assert agreed == bounds
    np.testing.assert_allclose(
        found.P, sum(w * s.P for w, s in zip(weights, sketches, strict=True)), atol=1e-4
    )


def test_clients_under_different_bounds_are_noticed():
    matrix, terms = Matrix("m", 6, 5), terms_for(2)
    sketch = Sketcher.draw(SECRET, terms, matrix, 1).sketch(np.ones((6, 1)), np.ones((1, 5)))
    mean = (
        packed("m", sketch, Exponents(4, 5), Clipping()) + packed("m", sketch, Exponents(4, 6), Clipping())
    ) / 2
    with pytest.raises(DomainError, match="m under different bounds") as refused:
        unpacked(matrix, terms, mean, ExponentRange.of(matrix, 2, 0.05, 1))
    assert refused.value.reason is Reason.SUM_UNREADABLE


def test_the_frozen_part_counts_in_what_is_sent():
    own = LoraFactors(np.ones((3, 1), np.float32), np.ones((1, 4), np.float32))
    frozen = LoraFactors(np.full((3, 2), 2, np.float32), np.full((2, 4), 3, np.float32))
    B, A = joined(own, 0.5, frozen)
    np.testing.assert_array_equal(B @ A, np.full((3, 4), 0.5 + 12))
    B, A = joined(own, 0.5, None)
    np.testing.assert_array_equal(B @ A, np.full((3, 4), 0.5))


def test_sizes_are_five_quarters_of_the_largest_rank_and_one():
    assert [sketch_sizes(rank) for rank in (1, 2, 3, 4, 8, 16)] == [
        (3, 3),
        (4, 4),
        (5, 5),
        (6, 6),
        (11, 11),
        (21, 21),
    ]


def test_bounds_hold_what_the_next_rounds_directions_give():
    """Of 100 rounds that move nothing none clips a value, or few of the worst spectrum: one row that is all of ΔW."""
    matrix, terms, rng = Matrix("m", 64, 48), terms_for(16), np.random.default_rng(0)
    even, single = rng.standard_normal((64, 6)), np.zeros((64, 6))
    single[7] = rng.standard_normal(6)
    A, clipped = rng.standard_normal((6, 48)), {"even": 0, "single": 0}
    for name, B in (("even", even), ("single", single)):
        for number in range(100):
            before, after = (
                Sketcher.draw(SECRET, terms, matrix, 2 * number + i).sketch(B, A) for i in range(2)
            )
            clipping = Clipping()
            packed("m", after, next_exponents(before, Exponents(0, 0)), clipping)
            clipped[name] += clipping.clipped > 0
    assert clipped["even"] == 0
    assert clipped["single"] <= 3
