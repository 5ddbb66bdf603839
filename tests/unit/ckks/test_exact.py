import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks import INSECURE_TOY, LARGE, STANDARD
from shelora.ckks import exact as module
from shelora.ckks.evaluator import Evaluator
from shelora.ckks.exact import ExactSum, largest_degree, small_ring
from shelora.ckks.seal import reversed_bits, seal_context
from shelora.ckks.secret import Encryptor, SecretKey

PROFILES = [INSECURE_TOY, STANDARD, LARGE]


def full(ring, residues):
    """Small residues [rows, n] at all N places."""
    spread = np.empty((len(residues), ring.parameters.poly_degree), dtype=np.uint64)
    spread[:, ring.positions] = residues[:, :, None]
    return spread


@pytest.mark.parametrize("count", [1, 2, 8, 1024])
def test_bit_reversal_is_its_own_inverse(count):
    order = reversed_bits(count)
    assert (order[order] == np.arange(count)).all()
    assert order[:2].tolist() == [0, count // 2][:count]


@pytest.mark.parametrize("parameters", PROFILES)
@pytest.mark.parametrize("degree", [2, 4, 8, 64, 256])
def test_weights_of_blocks_have_the_residues_that_seal_gives_them(parameters, degree):
    degree = min(degree, parameters.poly_degree)
    ring, context = small_ring(parameters, degree), seal_context(parameters)
    weights = np.random.default_rng(degree).uniform(-0.5, 0.5, (5, degree // 2))
    weights[0], weights[1] = 0.5, -0.5
    weights[2, 1:] = 0
    found = full(ring, ring.residues(weights))
    for line, residues in zip(weights, found, strict=True):
        factors = np.repeat(line, parameters.poly_degree // degree)
        native = context.encode_factors(factors, parameters.weight_scale)
        if native.is_zero():
            assert not residues.any()
        else:
            assert (residues == context.read_plaintext(native, parameters.weight_scale)).all()


def summed(key, segments, blocks, weights, monkeypatch=None):
    parameters = key.parameters
    with pytest.MonkeyPatch.context() as patch:
        if monkeypatch:
            patch.setattr("shelora.ckks.evaluator.largest_degree", lambda _: 0)
        accumulator = Evaluator(parameters, key.key_id).accumulator(segments, weights[0].shape[0])
        assert all((run.ring is None) == bool(monkeypatch) for run in accumulator._runs)
    for block, factors in zip(blocks, weights, strict=True):
        accumulator.add(block, factors)
    return accumulator.finish()


@pytest.mark.parametrize(
    ("parameters", "segments"),
    [
        (INSECURE_TOY, [64]),
        (INSECURE_TOY, [16, 16, 32, 64, 37]),
        (STANDARD, [32] * 70),
        (STANDARD, [2048, 1024, 512, 512, 3]),
        (STANDARD, [16, 480, 0, 2048]),
        (LARGE, [4096, 64, 64, 100]),
    ],
)
def test_sums_are_those_of_seal_residue_by_residue(parameters, segments):
    rng = np.random.default_rng(len(segments))
    key = SecretKey.generate(parameters)
    encryptor = Encryptor(key)
    blocks = [encryptor.encrypt(rng.uniform(-1, 1, (rows_in, sum(segments)))) for rows_in in (3, 2)]
    weights = [rng.uniform(-0.1, 0.1, (4, b.shape.rows, len(segments))) for b in blocks]
    weights[0][1] = 0
    ours, theirs = (summed(key, segments, blocks, weights, patched) for patched in (False, True))
    assert (ours.c0 == theirs.c0).all()
    assert (ours.c1 == theirs.c1).all()


@pytest.mark.parametrize("parameters", PROFILES)
@pytest.mark.parametrize("rows_in", [1, 65, 200])
def test_the_largest_residues_do_not_pass_the_mantissa(parameters, rows_in):
    """Every residue q - 1 and every weight at its limit: what the limbs must have room for."""
    degree = min(8, parameters.poly_degree)
    ring, modulus = small_ring(parameters, degree), parameters.modulus
    weights = np.full((1, rows_in, degree // 2), 0.5)
    weights[:, ::2] *= -1
    ciphertexts = np.full((rows_in, 2, parameters.poly_degree), modulus - 1, dtype=np.uint64)
    total = ExactSum(ring, 1)
    total.add(weights, ciphertexts)
    total.add(weights, ciphertexts)
    half = int(parameters.weight_scale) // 2
    expected = 2 * sum((-half if j % 2 == 0 else half) * (modulus - 1) for j in range(rows_in)) % modulus
    assert (total.result() == expected).all()


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(0, 2**60), min_size=1, max_size=20),
    width=st.integers(1, 26),
    parameters=st.sampled_from(PROFILES),
)
def test_a_shift_modulo_the_prime_is_exact(values, width, parameters):
    modulus = parameters.modulus
    edges = [0, 1, modulus - 1, modulus // 2, modulus >> width, (modulus >> width) + 1]
    numbers = [value % modulus for value in values] + edges
    found = module._shifted(np.array(numbers, dtype=np.uint64), width, modulus)
    assert found.tolist() == [number * 2**width % modulus for number in numbers]


@pytest.mark.parametrize("parameters", PROFILES)
@pytest.mark.parametrize("terms", [1, 7, 64, 1024, 4096])
def test_limbs_leave_room_for_every_sum(parameters, terms):
    bits = parameters.coefficient_bits
    width = module._limb_width(bits, terms)
    limbs = -(-bits // width)
    largest = terms * limbs * (2**width - 1) ** 2
    assert largest < 2**53
    assert largest < parameters.modulus


@pytest.mark.parametrize("parameters", PROFILES)
def test_sums_of_the_small_transform_stay_below_the_mantissa(parameters):
    degree = largest_degree(parameters)
    ring = small_ring(parameters, degree)
    coefficient = parameters.weight_scale / 2 * (1 + 1e-5)
    assert degree * coefficient * (2**ring.width - 1) < 2**53
    assert ring.powers.max() < 2**ring.width
