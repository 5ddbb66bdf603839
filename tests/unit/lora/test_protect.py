import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks.secret import Decryptor, Encryptor
from shelora.ckks.wire import decode_block
from shelora.errors import DomainError, Reason
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.protect import protect
from shelora.lora.shards import LoraFactors
from tests.unit.lora.cohorts import TOY_KEY, layout_of, lora_factors, planned

ENCRYPTOR = Encryptor(TOY_KEY)
MATRICES = (Matrix("q", 6, 9), Matrix("k", 5, 9))
PLAIN = layout_of(MATRICES, encrypt_tensors=False, key_id=b"")
ORDERS = {m.name: np.arange(9) for m in MATRICES}


def contents_of(layout, factors, tensors=None, tiers=0, orders=ORDERS, encryptor=ENCRYPTOR):
    return list(protect(layout, factors, tensors or {}, tiers, orders, encryptor))


def refusal_of(*arguments, **options):
    with pytest.raises(DomainError) as error:
        contents_of(*arguments, **options)
    return error.value


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    row_exponents=st.lists(st.integers(-60, 60), min_size=1, max_size=4),
    spread=st.integers(0, 60),
    zero=st.booleans(),
)
def test_rows_are_normalized_by_powers_of_two_and_the_product_is_unchanged_to_the_bit(
    seed, row_exponents, spread, zero
):
    rng = np.random.default_rng(seed)
    rank = len(row_exponents)
    exponents = np.array(row_exponents)[:, None] - rng.integers(0, spread + 1, (rank, 9))
    A = np.ldexp(rng.uniform(-1, 1, (rank, 9)).astype(np.float32), exponents)
    A[0] *= not zero
    A[rng.random(A.shape) < 0.1] = rng.choice([-1.0, 1.0]) * 2.0 ** min(row_exponents)
    B = rng.standard_normal((6, rank)).astype(np.float32)
    part = contents_of(PLAIN, {"q": LoraFactors(B, A), "k": LoraFactors(B[:5], A)})[0].matrices[0]
    largest = np.abs(part.clear_A).max(axis=1)
    assert ((largest >= 0.5) & (largest < 1) | ~A.any(axis=1)).all()
    before = B.astype(np.float64)[:, :, None] * A.astype(np.float64)[None]
    after = part.B.astype(np.float64)[:, :, None] * part.clear_A.astype(np.float64)[None]
    assert (before == after).all()


@pytest.mark.parametrize("tiers", [0, 1, 2])
def test_a_client_encrypts_its_tiers_and_sends_the_rest_in_column_order(tiers):
    rng = np.random.default_rng(tiers)
    matrices, orders = planned([(6, 30), (5, 41)], [0.2, 0.7])
    layout = layout_of(matrices, tiers=[0.2, 0.7])
    factors = lora_factors(rng, matrices, 3)
    (content,) = contents_of(layout, factors, tiers=tiers, orders=orders)
    shape = kind_of(layout.shards[content.shard]).update_block_shape(layout, content)
    rows = np.zeros((3, 0))
    if shape is not None:
        block = decode_block(content.ciphertexts, shape)
        rows = Decryptor(TOY_KEY).decrypt(
            block, kind_of(layout.shards[0]).slot_count(layout, layout.shards[0], tiers)
        )
    for item, matrix in enumerate(matrices):
        A = factors[matrix.name].A
        scaled = np.ldexp(A, -np.frexp(np.abs(A).max(axis=1))[1][:, None])[:, orders[matrix.name]]
        protected = matrix.protected(tiers)
        assert (content.matrices[item].clear_A == scaled[:, protected:]).all()
        for segment in kind_of(layout.shards[0]).segments(layout, layout.shards[0], tiers):
            if segment.item == item:
                found = rows[:, segment.slot : segment.slot + segment.length]
                sent = scaled[:, segment.column : segment.column + segment.length]
                assert np.abs(found - sent).max() < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["A", "B"])
def test_factors_that_are_not_finite_are_refused_by_the_name_of_their_matrix(value, which):
    factors = lora_factors(np.random.default_rng(0), MATRICES, 2)
    getattr(factors["k"], which)[1, 1] = value
    refusal = refusal_of(PLAIN, factors)
    assert refusal.reason is Reason.VALUE_NOT_FINITE
    assert "k" in refusal.message.split()


def test_factors_whose_product_leaves_float32_are_refused_by_the_name_of_their_matrix():
    factors = lora_factors(np.random.default_rng(0), MATRICES, 2)
    factors["k"].A[0] *= np.float32(1e20)
    factors["k"].B[0, 0] = 3e38
    with np.errstate(over="ignore"):
        refusal = refusal_of(PLAIN, factors)
    assert refusal.reason is Reason.VALUE_OUT_OF_RANGE
    assert "k" in refusal.message.split()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.pop("k"),
        lambda f: f.update(k=LoraFactors(f["k"].B[1:], f["k"].A)),
        lambda f: f.update(k=LoraFactors(f["k"].B, f["k"].A[:, 1:])),
        lambda f: f.update(k=LoraFactors(f["k"].B[:, 1:], f["k"].A)),
        lambda f: f.update(k=LoraFactors(f["k"].B[:, 1:], f["k"].A[1:])),
        lambda f: f.update(
            {n: LoraFactors(np.zeros((m.B.shape[0], 9)), np.zeros((9, 9))) for n, m in f.items()}
        ),
        lambda f: f.update({n: LoraFactors(m.B[:, :0], m.A[:0]) for n, m in f.items()}),
        lambda f: f.clear(),
    ],
)
def test_factors_of_other_shapes_or_of_several_ranks_are_refused(spoil):
    """Regression: factors whose ranks differed raised numpy's errors, not a reason."""
    factors = lora_factors(np.random.default_rng(0), MATRICES, 2)
    spoil(factors)
    assert refusal_of(PLAIN, factors).reason is Reason.SHAPE_MISMATCH


@pytest.mark.parametrize("bound", [0.1, 0.256, 1.0, 1e-3, 7.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_at_the_bound_is_encrypted_even_if_float32_rounds_it_up(bound, sign):
    """Regression: float32(0.1) / 0.1 is above one, and the encryptor refused it."""
    layout = layout_of((), [Tensor("head", (3,), bound)])
    value = np.full(3, sign * bound, dtype=np.float32)
    (content,) = contents_of(layout, {}, {"head": value})
    shape = kind_of(layout.shards[content.shard]).update_block_shape(layout, content)
    found = Decryptor(TOY_KEY).decrypt(
        decode_block(content.ciphertexts, shape),
        kind_of(layout.shards[0]).slot_count(layout, layout.shards[0]),
    )
    assert np.abs(found[0, :3] - sign).max() < 1e-5


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.SHAPE_MISMATCH),
        (np.zeros(4, dtype=np.float32), Reason.SHAPE_MISMATCH),
        (np.array([0, np.nan, 0], dtype=np.float32), Reason.VALUE_NOT_FINITE),
        (np.array([0, -np.inf, 0], dtype=np.float32), Reason.VALUE_NOT_FINITE),
        (np.array([0, 0.500001, 0], dtype=np.float32), Reason.VALUE_OUT_OF_RANGE),
        (np.array([0, -0.500001, 0], dtype=np.float32), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_unusable_tensors_are_refused_by_name(encrypted, value, reason):
    layout = layout_of((), [Tensor("head", (3,), 0.5)], encrypt_tensors=encrypted)
    refusal = refusal_of(layout, {}, {} if value is None else {"head": value})
    assert refusal.reason is reason
    assert "head" in refusal.message


def test_a_layout_that_encrypts_needs_a_key():
    layout = layout_of((), [Tensor("head", (3,))])
    refusal = refusal_of(layout, {}, {"head": np.zeros(3, dtype=np.float32)}, encryptor=None)
    assert refusal.reason is Reason.SECRET_UNAVAILABLE


def test_shards_are_made_one_at_a_time():
    factors = lora_factors(np.random.default_rng(0), MATRICES, 2)
    layout = layout_of(MATRICES, cuts={1}, encrypt_tensors=False, key_id=b"")
    shards = protect(layout, {"q": factors["q"]}, {}, 0, ORDERS, None)
    assert next(shards).shard == 0
    with pytest.raises(DomainError, match="k"):
        next(shards)
