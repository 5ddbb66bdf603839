import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.ckks import INSECURE_TOY, LARGE, STANDARD, slot_error_bound
from shelora.ckks.evaluator import Evaluator
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason

SLOTS = INSECURE_TOY.slots
HEADER_BYTES = 38


def refused(call, *arguments):
    with pytest.raises(DomainError) as error:
        call(*arguments)
    return error.value.reason


@pytest.mark.parametrize("parameters", [STANDARD, LARGE, INSECURE_TOY])
def test_a_key_survives_its_bytes_and_decrypts_what_it_encrypted(parameters, rng):
    key = SecretKey.generate(parameters)
    again = SecretKey.from_bytes(parameters, key.to_bytes())
    assert again.key_id == key.key_id
    assert len(key.to_bytes()) == HEADER_BYTES + parameters.poly_degree // 4
    total = 2 * parameters.slots + 5
    values = rng.uniform(-1, 1, (2, total))
    values[0, :4] = [1, -1, 0, 1e-9]
    found = Decryptor(again).decrypt(Encryptor(key).encrypt(values), total)
    assert np.abs(found - values).max() <= slot_error_bound(parameters)


def test_keys_differ_and_so_do_their_fingerprints(key):
    other = SecretKey.generate(INSECURE_TOY)
    assert other.to_bytes() != key.to_bytes()
    assert other.key_id != key.key_id
    assert len(key.key_id) == 16


def test_a_generated_key_is_ternary_and_uniform():
    packed = np.frombuffer(SecretKey.generate(STANDARD).to_bytes(), dtype=np.uint8, offset=HEADER_BYTES)
    digits = (packed[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1)
    counts = np.bincount(digits, minlength=4)
    assert counts[3] == 0
    assert np.abs(counts[:3] - 2048 / 3).max() < 6 * np.sqrt(2048 * 2 / 9)


def test_equal_values_are_encrypted_differently(encryptor):
    block = encryptor.encrypt(np.ones((2, 2 * SLOTS)))
    assert len({row.tobytes() for row in block.c0.reshape(4, -1)}) == 4
    assert len({seed.tobytes() for seed in block.seeds.reshape(4, 64)}) == 4


def test_no_representation_shows_the_key(key, encryptor, decryptor):
    for thing in (key, encryptor, decryptor, Evaluator(INSECURE_TOY, key.key_id)):
        for text in (repr(thing), str(thing), f"{thing}"):
            assert text == f"{type(thing).__name__}(insecure-toy, key {key.key_id.hex()})"


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_not_pickled_or_copied(key, leak):
    with pytest.raises(TypeError, match="to_bytes"):
        leak(key)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b"X" + d[1:], lambda d: b""]
)
def test_a_damaged_key_is_refused(key, change):
    assert refused(SecretKey.from_bytes, INSECURE_TOY, change(key.to_bytes())) is Reason.SECRET_UNAVAILABLE


@pytest.mark.parametrize("fill", [b"\x00", b"\x55", b"\xaa", b"\xff"])
def test_a_degenerate_key_is_refused(key, fill):
    data = key.to_bytes()[:HEADER_BYTES] + fill * 16
    assert refused(SecretKey.from_bytes, INSECURE_TOY, data) is Reason.SECRET_UNAVAILABLE


def test_a_coefficient_that_is_not_ternary_is_refused(key):
    data = bytearray(key.to_bytes())
    data[-1] |= 0b11
    assert refused(SecretKey.from_bytes, INSECURE_TOY, bytes(data)) is Reason.SECRET_UNAVAILABLE


def test_a_key_of_other_parameters_is_refused(key):
    assert refused(SecretKey.from_bytes, STANDARD, key.to_bytes()) is Reason.SECRET_UNAVAILABLE


@given(data=st.binary(max_size=80))
def test_random_bytes_are_no_key(data):
    assert refused(SecretKey.from_bytes, INSECURE_TOY, data) is Reason.SECRET_UNAVAILABLE


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(3), Reason.SHAPE_MISMATCH),
        (np.zeros((1, 3), dtype=np.float32), Reason.SHAPE_MISMATCH),
        (np.array([[0.0, np.nan]]), Reason.VALUE_NOT_FINITE),
        (np.array([[0.0, -np.inf]]), Reason.VALUE_NOT_FINITE),
        (np.array([[0.0, np.nextafter(1.0, 2.0)]]), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_values_that_are_not_normalised_are_refused(encryptor, values, reason):
    assert refused(encryptor.encrypt, values) is reason


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_values_give_an_empty_block(encryptor, decryptor, shape):
    block = encryptor.encrypt(np.zeros(shape))
    assert decryptor.decrypt(block, shape[1]).shape == shape


def test_a_block_of_another_key_or_other_parameters_is_refused(encryptor, decryptor):
    block = encryptor.encrypt(np.zeros((1, SLOTS)))
    other = Decryptor(SecretKey.generate(INSECURE_TOY))
    assert refused(other.decrypt, block, SLOTS) is Reason.CIPHERTEXT_FOREIGN_KEY
    standard = Decryptor(SecretKey.generate(STANDARD))
    assert refused(standard.decrypt, block, SLOTS) is Reason.CIPHERTEXT_FOREIGN_PARAMETERS


@pytest.mark.parametrize("total", [-1, 0, SLOTS, 2 * SLOTS + 1])
def test_a_slot_count_that_does_not_fit_the_chunks_is_refused(encryptor, decryptor, total):
    block = encryptor.encrypt(np.zeros((1, 2 * SLOTS)))
    assert refused(decryptor.decrypt, block, total) is Reason.CIPHERTEXT_WRONG_SHAPE
