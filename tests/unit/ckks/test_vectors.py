import numpy as np
import pytest

from shelora.ckks import (
    INSECURE_TOY,
    BlockShape,
    accumulated_error_bound,
    decode_block,
    encode_block,
    slot_error_bound,
)
from shelora.ckks.secret import Decryptor, SecretKey
from tests.vectors import make_ckks_vectors as vectors


def stored(name):
    return (vectors.FOLDER / name).read_bytes()


@pytest.fixture(scope="module")
def stored_key():
    return SecretKey.from_bytes(INSECURE_TOY, stored("key.bin"))


@pytest.mark.parametrize(
    ("name", "block"),
    [("seeded.bin", vectors.hand_made_seeded()), ("full.bin", vectors.hand_made_full())],
)
def test_the_wire_format_has_not_changed(name, block):
    assert encode_block(block) == stored(name)
    assert encode_block(decode_block(stored(name), block.shape)) == stored(name)


def test_a_stored_key_keeps_its_fingerprint_and_its_bytes(stored_key):
    assert stored_key.to_bytes() == stored("key.bin")
    assert stored("fresh.bin")[56:72] == stored_key.key_id


def test_a_stored_ciphertext_still_decrypts(stored_key):
    shape = BlockShape(
        parameters=INSECURE_TOY,
        key_id=stored_key.key_id,
        rows=vectors.ROWS,
        chunks=vectors.CHUNKS,
        seeded=True,
    )
    found = Decryptor(stored_key).decrypt(decode_block(stored("fresh.bin"), shape), vectors.TOTAL_SLOTS)
    assert np.abs(found - vectors.values()).max() <= slot_error_bound(INSECURE_TOY)


def test_a_stored_sum_still_decrypts(stored_key):
    shape = BlockShape(
        parameters=INSECURE_TOY, key_id=stored_key.key_id, rows=2, chunks=vectors.CHUNKS, seeded=False
    )
    found = Decryptor(stored_key).decrypt(decode_block(stored("sum.bin"), shape), vectors.TOTAL_SLOTS)
    weights = np.repeat(vectors.weights(), vectors.SEGMENTS, axis=2)
    expected = np.einsum("tjs,js->ts", weights, vectors.values()) + vectors.clear()
    bound = accumulated_error_bound(INSECURE_TOY, terms=vectors.ROWS, scalar=False, worst_case_rounding=True)
    assert np.abs(found - expected).max() <= bound
