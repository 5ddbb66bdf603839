import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.lora.algebra import DirectionSketch, canonical_basis, coordinates, reparameterize
from shelora.lora.shards import FactoredUpdate

SEEDS = st.integers(0, 2**32 - 1)


def update_of(rng, out, columns, q, spectrum=None):
    Q = np.linalg.qr(rng.standard_normal((out, q)))[0]
    M = rng.standard_normal((q, columns))
    if spectrum is not None:
        left, _, right = np.linalg.svd(M, full_matrices=False)
        M = left * spectrum @ right
    return FactoredUpdate(Q, M)


def truncated(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@settings(max_examples=80)
@given(
    seed=SEEDS,
    out=st.integers(1, 30),
    count=st.integers(1, 12),
    rank=st.integers(0, 12),
    spread=st.sampled_from([0, 3, 9, 20]),
)
def test_a_basis_is_orthonormal_reproduces_the_columns_and_has_no_idle_direction(
    seed, out, count, rank, spread
):
    rng = np.random.default_rng(seed)
    rank = min(rank, out, count)
    columns = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, count))
    columns *= 10.0 ** -rng.uniform(0, spread, count)
    Q, R = canonical_basis(columns)
    assert Q.shape[1] <= rank
    assert np.abs(Q.T @ Q - np.eye(Q.shape[1])).max(initial=0) < 2.0**-30
    norm = np.linalg.norm(columns)
    assert np.linalg.norm(Q @ R - columns) <= 2.0**-40 * norm


@pytest.mark.parametrize("out", [5, 40])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e9])
def test_a_basis_depends_on_the_span_alone(out, condition):
    """So it tells nothing of the columns: other columns of the same span have the same basis."""
    rng = np.random.default_rng(out)
    columns = rng.standard_normal((out, 5)) * np.geomspace(1, 1 / condition, 5)
    mixed = columns @ np.linalg.qr(rng.standard_normal((5, 5)))[0]
    shuffled = columns[:, ::-1] * rng.uniform(0.5, 2, 5)
    bases = [canonical_basis(version)[0] for version in (columns, mixed, shuffled)]
    assert all(np.abs(basis - bases[0]).max() < 1e-14 * condition + 1e-12 for basis in bases)


def test_coordinates_of_rounding_noise_are_zero():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 4)))[0]
    R = coordinates(basis, basis[:, [1]] * 1e3)
    assert np.flatnonzero(R).tolist() == [1]


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_a_sketch_without_blocks_has_no_directions(limit):
    with pytest.raises(ValueError, match="no block"):
        DirectionSketch(limit).directions()


@pytest.mark.parametrize(
    ("widths", "exact"), [((3, 3, 2), True), ((3, 3, 3), False), ((20, 1), False), ((8,), True)]
)
def test_a_sketch_gives_coordinates_until_the_limit_is_passed(widths, exact):
    rng = np.random.default_rng(5)
    sketch, blocks = DirectionSketch(8), [rng.standard_normal((40, width)) for width in widths]
    for block in blocks:
        sketch.add(block)
    Q, R = sketch.directions()
    assert Q.shape == (40, 8)
    assert (R is not None) is exact
    if R is not None:
        assert np.abs(Q @ R - np.hstack(blocks)).max() < 1e-13


def test_a_sketch_that_merged_and_came_back_below_the_limit_still_has_no_coordinates():
    rng = np.random.default_rng(6)
    sketch = DirectionSketch(4)
    for width in (5, 4):
        sketch.add(rng.standard_normal((40, width)))
    assert sketch.directions()[1] is None


@settings(max_examples=80)
@given(
    seed=SEEDS,
    out=st.integers(1, 20),
    columns=st.integers(1, 25),
    q=st.integers(1, 10),
    rank=st.integers(1, 12),
    scaling=st.sampled_from([0.25, 1.0, 2.0, 32 / 3]),
)
def test_reparameterized_factors_are_the_truncated_svd_of_the_whole_matrix(
    seed, out, columns, q, rank, scaling
):
    rng = np.random.default_rng(seed)
    update = update_of(rng, out, columns, min(q, out))
    factors = reparameterize(update, rank, scaling)
    assert (factors.B.shape, factors.A.shape) == ((out, rank), (rank, columns))
    full = update.Q @ update.M
    product = scaling * factors.B.astype(np.float64) @ factors.A.astype(np.float64)
    values = np.linalg.svd(full, compute_uv=False)
    lost = np.linalg.norm(full - product)
    assert lost == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-5 * values[0])
    gap = values[rank - 1] - values[rank] if rank < len(values) else np.inf
    if gap > 1e-2 * values[0]:
        assert np.abs(product - truncated(full, rank)).max() < 1e-4 * values[0]


def test_both_factors_have_the_same_norm():
    factors = reparameterize(update_of(np.random.default_rng(1), 12, 20, 6), 4, 2.0)
    assert np.linalg.norm(factors.B, axis=0) == pytest.approx(np.linalg.norm(factors.A, axis=1), rel=1e-5)


def test_directions_the_update_does_not_use_take_the_rows_given_and_leave_the_product_alone():
    rng = np.random.default_rng(2)
    update = update_of(rng, 12, 20, 3)
    fill = rng.standard_normal((9, 20)).astype(np.float32)
    filled, bare = reparameterize(update, 8, 2.0, fill), reparameterize(update, 8, 2.0)
    assert (filled.A[3:] == fill[3:8]).all()
    assert not bare.A[3:].any()
    assert not filled.B[:, 3:].any()
    assert (filled.B == bare.B).all()
    assert (filled.A[:3] == bare.A[:3]).all()


def test_rounding_noise_is_no_direction():
    update = update_of(np.random.default_rng(3), 12, 20, 4, spectrum=[1.0, 1e-3, 1e-17, 0.0])
    assert np.flatnonzero(reparameterize(update, 4, 1.0).B.any(axis=0)).tolist() == [0, 1]


@pytest.mark.parametrize("q", [0, 3])
def test_an_update_of_zero_has_zero_factors(q):
    update = FactoredUpdate(np.zeros((6, q)), np.zeros((q, 5)))
    fill = np.ones((2, 5), dtype=np.float32)
    factors = reparameterize(update, 2, 1.0, fill)
    assert not factors.B.any()
    assert np.array_equal(factors.A, fill)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused(value):
    update = update_of(np.random.default_rng(4), 6, 5, 2)
    update.M[1, 3] = value
    with pytest.raises(DomainError) as refusal:
        reparameterize(update, 2, 1.0)
    assert refusal.value.reason is Reason.VALUE_NOT_FINITE
