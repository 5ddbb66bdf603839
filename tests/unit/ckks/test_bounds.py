import numpy as np
import pytest

from shelora.ckks import INSECURE_TOY, LARGE, STANDARD, accumulated_error_bound, slot_error_bound
from shelora.ckks.seal import seal_context
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey


@pytest.fixture(scope="module")
def fresh_errors():
    """Errors of 60 fresh STANDARD ciphertexts, in coefficient units."""
    rng = np.random.default_rng(7)
    key = SecretKey.generate(STANDARD)
    values = rng.uniform(-1, 1, (60, STANDARD.slots))
    found = Decryptor(key).decrypt(Encryptor(key).encrypt(values), STANDARD.slots)
    return (found - values) * STANDARD.scale


def test_fresh_noise_has_the_derived_deviation(fresh_errors):
    degree = STANDARD.poly_degree
    derived = np.sqrt(degree / 2 * 21 / 2 + degree / 24)
    assert abs(fresh_errors.std() / derived - 1) < 0.03
    assert abs(fresh_errors.mean()) < 6 * derived / np.sqrt(fresh_errors.size)


def test_fresh_noise_keeps_its_bound(fresh_errors):
    assert np.abs(fresh_errors).max() <= slot_error_bound(STANDARD) * STANDARD.scale


def test_vector_rounding_has_the_derived_deviation():
    rng = np.random.default_rng(8)
    context = seal_context(STANDARD)
    errors = []
    for _ in range(40):
        weights = np.repeat(rng.uniform(-0.5, 0.5, 8), STANDARD.slots // 16)
        encoded = context.encode_factors(weights, STANDARD.weight_scale)
        pairs = context.decode(encoded).reshape(-1, 2)
        assert np.abs(pairs[:, 1]).max() < 1e-12
        errors.append((pairs[:, 0] - weights) * STANDARD.weight_scale)
    deviation = np.sqrt(STANDARD.poly_degree / 12)
    assert np.std(errors) < 1.1 * deviation
    assert np.abs(errors).max() < 7.6 * deviation


def test_structured_weights_break_the_typical_bound_and_keep_the_worst_case():
    """One slot that differs by 0.9 * N / (2 * weight_scale): every coefficient but the first rounds to zero."""
    context, pairs, scale = seal_context(STANDARD), STANDARD.slots // 2, STANDARD.weight_scale
    weights = np.full(pairs, 0.25)
    weights[0] += 0.45 * pairs / scale
    encoded = context.encode_factors(weights, scale)
    error = np.abs(context.decode(encoded)[::2] - weights).max() * scale
    assert error > 7.6 * np.sqrt(STANDARD.poly_degree / 12)
    assert error < STANDARD.poly_degree / np.pi + 1


@pytest.mark.parametrize("parameters", [STANDARD, LARGE, INSECURE_TOY])
@pytest.mark.parametrize("terms", [1, 8, 64])
def test_bounds_are_ordered(parameters, terms):
    def bound(**arguments):
        return accumulated_error_bound(parameters, terms=terms, **arguments)

    assert bound(scalar=True) < bound(scalar=False)
    assert bound(scalar=False) <= bound(scalar=False, worst_case_rounding=True)
    assert bound(scalar=True) <= bound(scalar=True, worst_case_rounding=True)
    assert bound(scalar=True, failure_bits=20) < bound(scalar=True, failure_bits=60)
    assert bound(scalar=False, value_l1=0.1, value_l2=0.1) < bound(scalar=False)
    assert bound(scalar=True, weight_l2=0.1) < bound(scalar=True)


def test_the_noise_of_a_large_cohort_stays_far_inside_the_room_below_the_modulus():
    for parameters in (STANDARD, LARGE):
        room = parameters.modulus / 2 - parameters.product_scale / np.sqrt(2)
        worst = accumulated_error_bound(parameters, terms=4096, scalar=False, worst_case_rounding=True)
        assert worst * parameters.product_scale < room / 2
