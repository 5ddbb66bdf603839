import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks import (
    INSECURE_TOY,
    LARGE,
    STANDARD,
    BlockReader,
    BlockShape,
    SeededBlock,
    accumulated_error_bound,
    decode_block,
    encode_block,
)
from shelora.ckks.evaluator import Evaluator
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason

SLOTS = INSECURE_TOY.slots


@pytest.fixture(scope="module")
def evaluator(key):
    return Evaluator(INSECURE_TOY, key.key_id)


def plain_sum(weights, segments, values):
    """The float64 reference: [rows, rows_in, segments] x [rows_in, slots] -> [rows, slots]."""
    return np.einsum("tjs,js->ts", np.repeat(weights, segments, axis=2), values)


def random_weights(rng, rows, rows_in, segments, total=0.5):
    weights = rng.uniform(-1, 1, (rows, rows_in, segments))
    return weights * total / np.maximum(np.abs(weights).sum(axis=1, keepdims=True), 1e-9)


def refused(call, *arguments):
    with pytest.raises(DomainError) as error:
        call(*arguments)
    return error.value.reason


@settings(max_examples=60)
@given(
    segments=st.lists(st.integers(0, 3 * SLOTS // 2), min_size=1, max_size=5),
    odd=st.booleans(),
    rows=st.integers(1, 3),
    rows_in=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    streamed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_encrypted_sums_equal_plain_sums_within_the_rigorous_bound(
    evaluator, encryptor, decryptor, segments, odd, rows, rows_in, streamed, seed
):
    rng = np.random.default_rng(seed)
    segments = [2 * pairs for pairs in segments]
    segments[-1] += odd
    total, terms = sum(segments), sum(rows_in)
    accumulator = evaluator.accumulator(segments, rows)
    weights = random_weights(rng, rows, terms, len(segments), total=0.4)
    weights[rng.random(weights.shape) < 0.2] = 0
    values = rng.uniform(-1, 1, (terms, total))
    clear = rng.uniform(-0.1, 0.1, (rows, total))
    first = 0
    for count in rows_in:
        part = slice(first, first + count)
        block = encryptor.encrypt(values[part])
        source = BlockReader(encode_block(block), block.shape) if streamed else block
        accumulator.add(source, weights[:, part])
        first += count
    accumulator.add_clear(clear)
    result = accumulator.finish()
    found = decryptor.decrypt(decode_block(encode_block(result), result.shape), total)
    bound = accumulated_error_bound(INSECURE_TOY, terms=terms, scalar=False, worst_case_rounding=True)
    error = np.abs(found - plain_sum(weights, segments, values) - clear)
    assert not error.size or error.max() <= bound


@pytest.mark.parametrize("parameters", [STANDARD, LARGE])
@pytest.mark.parametrize("segment", [1024, 8192])
def test_secure_profiles_keep_the_typical_bound(parameters, segment, rng):
    secret = SecretKey.generate(parameters)
    segments = [segment] * (2 * parameters.slots // segment or 1)
    total, rows, rows_in = sum(segments), 4, 6
    values = rng.uniform(-1, 1, (rows_in, total))
    weights = random_weights(rng, rows, rows_in, len(segments))
    accumulator = Evaluator(parameters, secret.key_id).accumulator(segments, rows)
    accumulator.add(Encryptor(secret).encrypt(values), weights)
    found = Decryptor(secret).decrypt(accumulator.finish(), total)
    bound = accumulated_error_bound(parameters, terms=rows_in, scalar=segment % parameters.slots == 0)
    assert np.abs(found - plain_sum(weights, segments, values)).max() <= bound


def test_a_position_no_ciphertext_reached_is_trivial_and_decrypts(evaluator, decryptor, encryptor, rng):
    accumulator = evaluator.accumulator([3 * SLOTS], rows=2)
    clear = rng.uniform(-0.5, 0.5, (2, 3 * SLOTS))
    clear[:, 2 * SLOTS :] = 0
    accumulator.add_clear(clear)
    block = accumulator.finish()
    assert not block.c1.any()
    assert not block.c0[:, 2].any()
    assert np.abs(decryptor.decrypt(block, 3 * SLOTS) - clear).max() < 1e-12


def test_clear_values_at_the_limit_are_exact(evaluator, decryptor):
    signs = np.where(np.arange(2 * SLOTS) % 3, 0.5, -0.5)
    clear = np.stack([np.full(2 * SLOTS, 0.5), np.full(2 * SLOTS, -0.5), signs])
    accumulator = evaluator.accumulator([2 * SLOTS], rows=3)
    accumulator.add_clear(clear)
    assert np.abs(decryptor.decrypt(accumulator.finish(), 2 * SLOTS) - clear).max() < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
def test_values_and_weights_at_their_limits_do_not_wrap(evaluator, encryptor, decryptor, sign):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    accumulator.add(encryptor.encrypt(np.full((1, SLOTS), float(sign))), np.full((1, 1, 1), 0.5))
    found = decryptor.decrypt(accumulator.finish(), SLOTS)
    assert np.abs(found - sign / 2).max() < accumulated_error_bound(INSECURE_TOY, terms=1, scalar=True)


def test_a_pair_of_slots_at_its_limits_does_not_wrap(evaluator, encryptor, decryptor):
    """Both parts of a complex number at 1 make coefficients larger by sqrt(2) than a real number does."""
    values = np.stack([np.resize(signs, SLOTS) for signs in ([1.0], [1.0, -1.0], [1.0, 1.0, -1.0, -1.0])])
    accumulator = evaluator.accumulator([SLOTS], rows=3)
    weights = np.eye(3)[:, :, None] / 2
    accumulator.add(encryptor.encrypt(values), weights)
    found = decryptor.decrypt(accumulator.finish(), SLOTS)
    assert np.abs(found - values / 2).max() < accumulated_error_bound(INSECURE_TOY, terms=1, scalar=True)


def test_opposite_weights_cancel_to_a_trivial_zero(evaluator, encryptor, decryptor, rng):
    block = encryptor.encrypt(rng.uniform(-1, 1, (1, SLOTS)))
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    for weight in (0.125, -0.125, 0.25, -0.25):
        accumulator.add(block, np.full((1, 1, 1), weight / 2))
    result = accumulator.finish()
    assert not result.c1.any()
    assert not decryptor.decrypt(result, SLOTS).any()


def test_a_sum_goes_on_after_it_has_cancelled(evaluator, encryptor, decryptor, rng):
    values = rng.uniform(-1, 1, (1, SLOTS))
    block = encryptor.encrypt(values)
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    for weight in (0.1, -0.1, 0.2):
        accumulator.add(block, np.full((1, 1, 1), weight))
    found = decryptor.decrypt(accumulator.finish(), SLOTS)
    assert np.abs(found - 0.2 * values).max() < accumulated_error_bound(INSECURE_TOY, terms=3, scalar=True)


@pytest.mark.parametrize("weight", [0.0, 2.0**-28, 1e-300])
def test_weights_that_round_to_zero_leave_a_position_trivial(evaluator, encryptor, weight):
    block = encryptor.encrypt(np.ones((1, 2 * SLOTS)))
    accumulator = evaluator.accumulator([SLOTS, 6, SLOTS - 6], rows=1)
    accumulator.add(block, np.array([[[weight, weight, 0.0]]]))
    assert not accumulator.finish().c1.any()


def test_zero_values_are_summed(evaluator, encryptor, decryptor):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    accumulator.add(encryptor.encrypt(np.zeros((2, SLOTS))), np.full((1, 2, 1), 0.25))
    assert np.abs(decryptor.decrypt(accumulator.finish(), SLOTS)).max() < 1e-6


def test_a_client_may_send_some_chunks_only(evaluator, encryptor, decryptor, rng):
    values = rng.uniform(-1, 1, (2, 4 * SLOTS))
    present = [1, 3]
    sent = values.reshape(2, 4, SLOTS)[:, present].reshape(2, -1)
    weights = random_weights(rng, 3, 2, 2)
    accumulator = evaluator.accumulator([SLOTS + 6, 3 * SLOTS - 6], rows=3)
    accumulator.add(encryptor.encrypt(sent), weights, chunk_indices=present)
    values.reshape(2, 4, SLOTS)[:, [0, 2]] = 0
    result = accumulator.finish()
    assert not result.c1[:, [0, 2]].any()
    found = decryptor.decrypt(result, 4 * SLOTS)
    expected = plain_sum(weights, [SLOTS + 6, 3 * SLOTS - 6], values)
    assert np.abs(found - expected).max() < accumulated_error_bound(INSECURE_TOY, terms=2, scalar=False)


def test_a_block_of_the_leading_chunks_needs_no_indices(evaluator, encryptor, decryptor, rng):
    values = rng.uniform(-1, 1, (1, SLOTS))
    accumulator = evaluator.accumulator([2 * SLOTS], rows=1)
    accumulator.add(encryptor.encrypt(values), np.full((1, 1, 1), 0.5))
    found = decryptor.decrypt(accumulator.finish(), 2 * SLOTS)
    assert np.abs(found - np.pad(values / 2, ((0, 0), (0, SLOTS)))).max() < 1e-6


@pytest.mark.parametrize("indices", [[0], [0, 0], [1, 0], [-1, 0], [0, 3], [0, 1, 2]])
def test_chunk_indices_that_do_not_fit_are_refused(evaluator, encryptor, indices):
    accumulator = evaluator.accumulator([3 * SLOTS], rows=1)
    block = encryptor.encrypt(np.ones((1, 2 * SLOTS)))
    reason = refused(accumulator.add, block, np.full((1, 1, 1), 0.5), indices)
    assert reason is Reason.CIPHERTEXT_WRONG_SHAPE


def test_a_block_with_more_chunks_than_the_sum_is_refused(evaluator, encryptor):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    block = encryptor.encrypt(np.ones((1, 2 * SLOTS)))
    assert refused(accumulator.add, block, np.full((1, 1, 1), 0.5)) is Reason.CIPHERTEXT_WRONG_SHAPE


def test_a_block_of_another_key_or_other_parameters_is_refused(evaluator):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    weights = np.full((1, 1, 1), 0.5)
    foreign = Encryptor(SecretKey.generate(INSECURE_TOY)).encrypt(np.ones((1, SLOTS)))
    assert refused(accumulator.add, foreign, weights) is Reason.CIPHERTEXT_FOREIGN_KEY
    other = Encryptor(SecretKey.generate(STANDARD)).encrypt(np.ones((1, SLOTS)))
    assert refused(accumulator.add, other, weights) is Reason.CIPHERTEXT_FOREIGN_PARAMETERS


def test_a_sum_is_not_added_as_if_it_were_fresh(evaluator):
    total = evaluator.accumulator([SLOTS], rows=1).finish()
    reader = BlockReader(encode_block(total), total.shape)
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    assert refused(accumulator.add, reader, np.full((1, 1, 1), 0.5)) is Reason.CIPHERTEXT_WRONG_SCALE


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (np.full((1, 1, 1), 0.5), Reason.SHAPE_MISMATCH),
        (np.full((2, 1, 1), 0.5, dtype=np.float32), Reason.SHAPE_MISMATCH),
        (np.full((2, 1, 1), np.nan), Reason.VALUE_NOT_FINITE),
        (np.full((2, 1, 1), np.inf), Reason.VALUE_NOT_FINITE),
        (np.full((2, 1, 1), -0.51), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_unusable_weights_are_refused_and_the_sum_stays_usable(evaluator, encryptor, weights, reason):
    accumulator = evaluator.accumulator([SLOTS], rows=2)
    block = encryptor.encrypt(np.ones((1, SLOTS)))
    assert refused(accumulator.add, block, weights) is reason
    accumulator.add(block, np.full((2, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((1, SLOTS + 1)), Reason.SHAPE_MISMATCH),
        (np.full((1, SLOTS), np.nan), Reason.VALUE_NOT_FINITE),
        (np.full((1, SLOTS), 0.51), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_unusable_clear_values_are_refused(evaluator, values, reason):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    assert refused(accumulator.add_clear, values) is reason


def test_the_limit_holds_over_all_calls(evaluator, encryptor):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    block = encryptor.encrypt(np.ones((1, SLOTS)))
    accumulator.add(block, np.full((1, 1, 1), 0.3))
    assert refused(accumulator.add, block, np.full((1, 1, 1), -0.3)) is Reason.VALUE_OUT_OF_RANGE
    accumulator.add_clear(np.full((1, SLOTS), 0.2))
    assert refused(accumulator.add_clear, np.full((1, SLOTS), 0.01)) is Reason.VALUE_OUT_OF_RANGE


def test_a_sum_refused_midway_is_spent(evaluator, encryptor):
    block = encryptor.encrypt(np.ones((2, SLOTS)))
    data = bytearray(encode_block(block))
    data[-64 - 8 : -64] = b"\xff" * 8  # the second row's last residue
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    reader = BlockReader(bytes(data), block.shape)
    reason = refused(accumulator.add, reader, np.full((1, 2, 1), 0.25))
    assert reason is Reason.CIPHERTEXT_COEFFICIENT_RANGE
    assert refused(accumulator.finish) is Reason.INVALID_ARGUMENT


def test_a_finished_sum_is_closed(evaluator, encryptor):
    accumulator = evaluator.accumulator([SLOTS], rows=1)
    accumulator.finish()
    assert refused(accumulator.finish) is Reason.INVALID_ARGUMENT
    assert refused(accumulator.add_clear, np.zeros((1, SLOTS))) is Reason.INVALID_ARGUMENT
    block = encryptor.encrypt(np.ones((1, SLOTS)))
    assert refused(accumulator.add, block, np.full((1, 1, 1), 0.25)) is Reason.INVALID_ARGUMENT


def test_an_accumulator_needs_a_row_and_segments_of_whole_pairs(evaluator):
    assert refused(evaluator.accumulator, [SLOTS], 0) is Reason.INVALID_ARGUMENT
    assert refused(evaluator.accumulator, [-1], 1) is Reason.INVALID_ARGUMENT
    assert refused(evaluator.accumulator, [3, 0, 2], 1) is Reason.INVALID_ARGUMENT
    assert refused(Evaluator, INSECURE_TOY, b"short") is Reason.INVALID_ARGUMENT


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_native_code_takes_any_integers_that_passed_the_checks(evaluator, decryptor, seed):
    rng = np.random.default_rng(seed)
    shape = BlockShape(parameters=INSECURE_TOY, key_id=evaluator.key_id, rows=2, chunks=2, seeded=True)
    residues = rng.choice([0, 1, INSECURE_TOY.modulus - 1], (2, 2, INSECURE_TOY.poly_degree)).astype(
        np.uint64
    )
    block = SeededBlock(shape, residues, rng.integers(0, 256, (2, 2, 64), dtype=np.uint8))
    accumulator = evaluator.accumulator([2 * SLOTS - 3], rows=1)
    accumulator.add(block, np.full((1, 2, 1), 0.25))
    assert np.isfinite(decryptor.decrypt(accumulator.finish(), 2 * SLOTS - 3)).all()


def test_threads_do_not_mix_their_ciphertexts(evaluator, encryptor, decryptor):
    found = {}

    def work(index):
        values = np.full((20, SLOTS), index / 8)
        accumulator = evaluator.accumulator([SLOTS], rows=1)
        accumulator.add(encryptor.encrypt(values), np.full((1, 20, 1), 0.025))
        found[index] = decryptor.decrypt(accumulator.finish(), SLOTS)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.abs(found[index] - index / 16).max() < 1e-5 for index in range(4))
