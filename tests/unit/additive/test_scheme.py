"""The scheme: equality with big integers, precision, the guard, misuse that cannot be written down."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.additive import (
    BALANCED,
    COMPACT,
    INSECURE_TOY,
    SMALL,
    STANDARD,
    Adder,
    AdditiveParameters,
    ShardShape,
)
from shelora.additive.codec import decode, encode
from shelora.additive.ring import Multiplier, expand_public
from shelora.additive.sampler import Csprng, gaussian
from shelora.additive.secret import SecretKey, SumOpener, open_sum
from shelora.additive.wire import HEADER_BYTES, sum_header, sum_planes, summand_header, summand_planes
from shelora.errors import DomainError, Reason
from tests.unit.additive import exact

CONTEXT = bytes(range(32))
PROFILES = [STANDARD, BALANCED, COMPACT, SMALL]
profiles = pytest.mark.parametrize("parameters", PROFILES, ids=lambda p: p.name)


def rng(*seed):
    return Csprng(hashlib.sha256(repr(seed).encode()).digest())


def summand(parameters, values, secret, *, most=4, context=CONTEXT, seed=0):
    return secret.encryption(context, most, rng("errors", seed)).encrypt(values)


def cohort(parameters, count, values, *, most=None, context=CONTEXT):
    """Values [count, values], the sum of secrets, and the sum's bytes."""
    generator = np.random.default_rng(count)
    x = generator.uniform(-1, 1, (count, values))
    secrets = [SecretKey.draw(parameters, rng("secret", i)) for i in range(count)]
    adder = Adder(ShardShape(parameters, 0, values))
    for i, secret in enumerate(secrets):
        adder.add(summand(parameters, x[i], secret, most=most or count, context=context, seed=i))
    return x, np.sum([s.coefficients for s in secrets], axis=0), adder.finish()


def refused_with(reason, action, *args, **options):
    with pytest.raises(DomainError) as error:
        action(*args, **options)
    assert error.value.reason is reason, error.value
    return error.value.message


# --- equality with big integers


@pytest.mark.parametrize("magnitude", [1, 64, 800, 30_000])
def test_products_are_those_of_pythons_integers(magnitude):
    public = expand_public(INSECURE_TOY, CONTEXT, 3, 5, 4)
    small = np.random.default_rng(magnitude).integers(-magnitude, magnitude + 1, 64)
    expected = [exact.negacyclic(row, small.tolist()) for row in public.tolist()]
    assert Multiplier(INSECURE_TOY, small).times(public).tolist() == expected


@pytest.mark.parametrize("magnitude", [59, 400, 30_000])
def test_the_largest_products_of_the_real_ring_are_exact(magnitude):
    """All coefficients at their bounds, aligned: the largest products there are. One coefficient is summed exactly."""
    worst = np.full((1, 1024), -(2**26), dtype=np.int32)
    small = np.full(1024, magnitude, dtype=np.int64)
    product = Multiplier(STANDARD, small).times(worst)[0].tolist()
    for place in range(0, 1024, 93):
        assert product[place] == -(2**26) * magnitude * (2 * place + 2 - 1024)


def test_an_honest_secret_needs_one_transform_and_a_large_sum_two():
    secret = SecretKey.draw(STANDARD, rng("norm")).coefficients
    assert not Multiplier(STANDARD, secret)._split
    assert not Multiplier(STANDARD, 30 * secret)._split  # a sum over 900 clients
    assert Multiplier(STANDARD, 128 * secret)._split  # over 16384


def test_a_real_product_of_the_real_ring_is_exact():
    public = expand_public(STANDARD, CONTEXT, 0, 0, 1)
    secret = SecretKey.draw(STANDARD, rng("exact")).coefficients
    expected = exact.negacyclic(public[0].tolist(), secret.tolist())
    assert Multiplier(STANDARD, secret).times(public)[0].tolist() == expected


@pytest.mark.parametrize("kept_bits", [16, 18, 20, 24])
def test_a_summand_and_a_sum_are_those_of_pythons_integers(kept_bits):
    parameters = AdditiveParameters(
        name="t", degree=64, modulus_bits=27, deviation=6.4, kept_bits=kept_bits, secure=False
    )
    shape, most, scale = ShardShape(parameters, 0, 100), 3, parameters.scale(3)
    public = expand_public(parameters, CONTEXT, 0, 0, 2).tolist()
    adder, totals, secret_sum = Adder(shape), [0] * 128, [0] * 64
    for i in range(3):
        values = np.random.default_rng(i).uniform(-1, 1, 100)
        secret = SecretKey.draw(parameters, rng("secret", i))
        data = summand(parameters, values, secret, most=most, seed=i)
        errors = gaussian(6.4).sample(rng("errors", i), 128).tolist()
        plain = [int(v) for v in np.rint(values * scale)] + [0] * 28
        products = [c for row in public for c in exact.negacyclic(row, secret.coefficients.tolist())]
        expected = [
            exact.kept(p + e + m, parameters) for p, e, m in zip(products, errors, plain, strict=True)
        ]
        assert decode(parameters, summand_planes(data, shape), 128).tolist() == expected
        totals = [t + c for t, c in zip(totals, expected, strict=True)]
        secret_sum = [a + b for a, b in zip(secret_sum, secret.coefficients.tolist(), strict=True)]
        adder.add(data)
    products = [c for row in public for c in exact.negacyclic(row, secret_sum)]
    expected = [
        float(exact.opened(t % 2**kept_bits, p, parameters, 3, scale))
        for t, p in zip(totals, products, strict=True)
    ]
    found = open_sum(parameters, np.array(secret_sum), CONTEXT, shape, adder.finish(), 3, most)
    assert found.tolist() == expected[:100]


# --- sums of any subset


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    chosen=st.sets(st.integers(0, 5), min_size=2),
    order=st.randoms(use_true_random=False),
    values=st.integers(1, 200),
    kept_bits=st.sampled_from([16, 18, 20, 24]),
    extreme=st.booleans(),
)
def test_the_sum_of_any_subset_opens_in_any_order(chosen, order, values, kept_bits, extreme):
    parameters = AdditiveParameters(
        name="t", degree=64, modulus_bits=27, deviation=6.4, kept_bits=kept_bits, secure=False
    )
    shape = ShardShape(parameters, 0, values)
    x = np.ones((6, values)) if extreme else np.random.default_rng(values).uniform(-1, 1, (6, values))
    secrets = [SecretKey.draw(parameters, rng("secret", i)) for i in range(6)]
    uploads = [summand(parameters, x[i], s, most=6, seed=i) for i, s in enumerate(secrets)]

    def added(members):
        adder = Adder(shape)
        for i in members:
            adder.add(uploads[i])
        return adder.finish()

    members = sorted(chosen)
    total = added(members)
    order.shuffle(members)
    assert added(members) == total
    secret_sum = np.sum([secrets[i].coefficients for i in chosen], axis=0)
    found = open_sum(parameters, secret_sum, CONTEXT, shape, total, len(chosen), 6)
    bound = parameters.noise_bound(len(chosen)) / parameters.scale(6)
    assert np.abs(found - x[sorted(chosen)].sum(axis=0)).max() <= bound


@profiles
def test_the_error_of_a_mean_is_the_one_the_parameters_predict(parameters):
    for count in (4, 32):
        x, secret_sum, total = cohort(parameters, count, 20_000)
        shape = ShardShape(parameters, 0, 20_000)
        found = open_sum(parameters, secret_sum, CONTEXT, shape, total, count, count)
        error = (found - x.sum(axis=0)) / count
        variance = parameters.deviation**2 + (4.0**parameters.dropped_bits - 1) / 12 + 1 / 12
        predicted = np.sqrt(count * variance) / parameters.scale(count) / count
        assert 0.95 < error.std() / predicted < 1.05
        assert abs(error.mean()) < 5 * predicted / np.sqrt(20_000)  # half a unit a client is corrected


@pytest.mark.parametrize(("count", "stated"), [(4, 2e-7), (32, 6e-7), (1000, 3.5e-6), (10_000, 1.1e-5)])
def test_the_precision_that_the_documents_state(count, stated):
    """What the test above confirms by measurement for small cohorts, computed for all."""
    variance = STANDARD.deviation**2 + (4.0**STANDARD.dropped_bits - 1) / 12 + 1 / 12
    predicted = np.sqrt(variance / count) / STANDARD.scale(count)
    assert 0.9 < predicted / stated < 1.1


# --- the guard


def test_the_scale_fills_the_range_up_to_the_guard():
    for count in (1, 2, 1000, 16384):
        scale = STANDARD.scale(count)
        room = 2**26 * 15 / 16
        assert count * scale + STANDARD.noise_bound(count) <= room
        assert count * (scale + 1) + STANDARD.noise_bound(count) > room


@profiles
def test_a_sum_at_its_bounds_passes_the_guard(parameters):
    shape = ShardShape(parameters, 0, 1024)
    adder, secret_sum = Adder(shape), 0
    for i in range(4):
        secret = SecretKey.draw(parameters, rng("bound", i))
        adder.add(summand(parameters, np.ones(1024), secret, seed=i))
        secret_sum = secret_sum + secret.coefficients
    found = open_sum(parameters, secret_sum, CONTEXT, shape, adder.finish(), 4, 4)
    assert np.abs(found - 4).max() < parameters.noise_bound(4) / parameters.scale(4)


@profiles
def test_garbage_is_seen(parameters):
    x, secret_sum, total = cohort(parameters, 4, 3000)
    shape = ShardShape(parameters, 0, 3000)
    good = SumOpener(parameters, secret_sum, CONTEXT, 4, 4)
    assert np.abs(good.open(total, shape) - x.sum(axis=0)).max() < 1e-3
    wrong = secret_sum.copy()
    wrong[17] += 1
    for opener in (
        SumOpener(parameters, wrong, CONTEXT, 4, 4),
        SumOpener(parameters, secret_sum, bytes(32), 4, 4),
        SumOpener(parameters, -secret_sum, CONTEXT, 4, 4),
    ):
        refused_with(Reason.SUM_UNREADABLE, opener.open, total, shape)


@profiles
def test_one_garbage_summand_is_seen(parameters):
    shape, secret_sum, adder = ShardShape(parameters, 0, 3000), 0, Adder(ShardShape(parameters, 0, 3000))
    for i in range(3):
        secret = SecretKey.draw(parameters, rng("secret", i))
        adder.add(summand(parameters, np.zeros(3000), secret, seed=i))
        secret_sum = secret_sum + secret.coefficients
    adder.add(summand_header(shape) + rng("garbage").bytes(shape.encoded_bytes - HEADER_BYTES))
    refused_with(
        Reason.SUM_UNREADABLE, open_sum, parameters, secret_sum, CONTEXT, shape, adder.finish(), 4, 4
    )


def test_a_sum_over_another_number_of_contributors_is_refused():
    _, secret_sum, total = cohort(INSECURE_TOY, 4, 100)
    shape = ShardShape(INSECURE_TOY, 0, 100)
    refused_with(
        Reason.CIPHERTEXT_WRONG_SHAPE, open_sum, INSECURE_TOY, secret_sum, CONTEXT, shape, total, 3, 4
    )


def test_a_sum_of_secrets_beyond_any_honest_one_is_refused():
    huge = np.zeros(64, dtype=np.int64)
    huge[3] = 12 * 6.4 * 2 + 1
    message = refused_with(Reason.SUM_UNREADABLE, SumOpener, INSECURE_TOY, huge, CONTEXT, 4, 4)
    assert "too large" in message
    refused_with(Reason.SHAPE_MISMATCH, SumOpener, INSECURE_TOY, huge[:63], CONTEXT, 4, 4)


# --- misuse


def test_a_secret_encrypts_one_update():
    secret = SecretKey.draw(INSECURE_TOY, rng())
    refused_with(Reason.INVALID_ARGUMENT, secret.encryption, CONTEXT, 0, rng())  # spends nothing
    encryption = secret.encryption(CONTEXT, 4, rng())
    refused_with(Reason.SECRET_UNAVAILABLE, secret.encryption, CONTEXT, 4, rng())
    refused_with(Reason.SECRET_UNAVAILABLE, secret.encryption, bytes(32), 4, rng())
    encryption.encrypt(np.zeros(3))
    assert encryption.next_shard == 1


def test_shards_are_encrypted_once_and_in_order():
    encryption = SecretKey.draw(INSECURE_TOY, rng()).encryption(CONTEXT, 4, rng())
    for shard in range(3):
        data = encryption.encrypt(np.zeros(70))
        summand_planes(data, ShardShape(INSECURE_TOY, shard, 70))
    assert "3" in repr(encryption)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_secrets_are_not_copied_and_not_shown(copier):
    secret = SecretKey.draw(INSECURE_TOY, rng())
    holders = (secret, secret.encryption(CONTEXT, 4, rng()), rng())
    for holder in holders:
        with pytest.raises(TypeError):
            copier(holder)
    assert repr(secret) == "SecretKey(insecure-toy)"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((2, 2)), Reason.SHAPE_MISMATCH),
        (np.zeros(0), Reason.SHAPE_MISMATCH),
        (np.zeros(3, dtype=np.float32), Reason.SHAPE_MISMATCH),
        (np.array([np.nan]), Reason.VALUE_NOT_FINITE),
        (np.array([np.inf]), Reason.VALUE_NOT_FINITE),
        (np.array([1.0000001]), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_values_that_cannot_be_encrypted_spend_no_shard(values, reason):
    encryption = SecretKey.draw(INSECURE_TOY, rng()).encryption(CONTEXT, 4, rng())
    refused_with(reason, encryption.encrypt, values)
    assert encryption.next_shard == 0


# --- never: what each rule prevents


def plain(parameters, kept_difference):
    """What a difference of two summands says without any key."""
    shifted = kept_difference.astype(np.int64) << parameters.dropped_bits
    return np.array([exact.centred(v, parameters.modulus) for v in shifted.tolist()])


def test_never_the_same_public_polynomial_with_the_same_secret_twice():
    """Two updates under one secret and context: a server alone reads their difference."""
    coefficients = SecretKey.draw(STANDARD, rng("victim")).coefficients
    x, y = np.random.default_rng(1).uniform(-0.4, 0.4, (2, 1024))
    first, second = (
        decode(
            STANDARD,
            summand_planes(
                summand(STANDARD, v, SecretKey(STANDARD, coefficients), seed=i), ShardShape(STANDARD, 0, 1024)
            ),
            1024,
        )
        for i, v in enumerate((x, y))
    )
    read = plain(STANDARD, first.astype(np.int64) - second) / STANDARD.scale(4)
    assert np.abs(read - (x - y)).max() < 1e-5


def test_never_a_public_polynomial_that_a_server_chose(monkeypatch):
    """With a = 0 the summand is the plaintext; so a is expanded from the context and is no field of a message."""
    monkeypatch.setattr(
        "shelora.additive.secret.expand_public",
        lambda parameters, _context, _shard, _first, count: np.zeros(
            (count, parameters.degree), dtype=np.int32
        ),
    )
    x = np.random.default_rng(2).uniform(-1, 1, 1024)
    data = summand(STANDARD, x, SecretKey.draw(STANDARD, rng("victim")))
    kept = decode(STANDARD, summand_planes(data, ShardShape(STANDARD, 0, 1024)), 1024)
    assert np.abs(plain(STANDARD, kept) / STANDARD.scale(4) - x).max() < 1e-5


def test_never_two_sums_that_differ_by_one_client():
    """The difference of two sums of secrets is the client's secret; the committee certifies one set."""
    secrets = [SecretKey.draw(STANDARD, rng("many", i)) for i in range(5)]
    x = np.random.default_rng(3).uniform(-1, 1, 1024)
    data = summand(STANDARD, x, secrets[4], most=5)
    everyone = sum(s.coefficients for s in secrets)
    without = everyone - secrets[4].coefficients
    kept = decode(STANDARD, summand_planes(data, ShardShape(STANDARD, 0, 1024)), 1024)
    opener = SumOpener(STANDARD, everyone - without, CONTEXT, 1, 5)
    assert np.abs(opener._plain(0, 0, kept.reshape(1, -1))[0] / STANDARD.scale(5) - x).max() < 1e-5


def test_not_guaranteed_who_adds_can_add_values_of_its_choice_and_nobody_sees_it():
    """Sums carry no authentication: docs/committee.md, "who can do what"."""
    x, secret_sum, data = cohort(STANDARD, 4, 100)
    shape, shift = ShardShape(STANDARD, 0, 100), 0.25
    honest = decode(STANDARD, sum_planes(data, shape, 4), shape.coefficients)
    step = np.uint32(round(shift * STANDARD.scale(4)) >> STANDARD.dropped_bits)
    forged = encode(STANDARD, (honest + step) & np.uint32((1 << STANDARD.kept_bits) - 1))
    opened = open_sum(STANDARD, secret_sum, CONTEXT, shape, sum_header(shape, 4) + forged, 4, 4)
    np.testing.assert_allclose(opened, x.sum(axis=0) + shift, atol=1e-4)


def test_servers_and_one_client_learn_nothing_of_another_but_the_sum():
    """They know S, the client's own secret and every summand: none of these opens the victim's, its own secret does."""
    count, values = 8, 98 * 1024
    x = np.random.default_rng(4).uniform(-1, 1, values)
    secrets = [SecretKey.draw(STANDARD, rng("eight", i)).coefficients for i in range(count)]
    data = summand(STANDARD, x, SecretKey(STANDARD, secrets[0]), most=count)
    shape = ShardShape(STANDARD, 0, values)
    kept = decode(STANDARD, summand_planes(data, shape), shape.coefficients).reshape(shape.chunks, -1)
    everyone, spy = sum(secrets), secrets[7]

    def correlation(key):
        opener = SumOpener(STANDARD, np.zeros(1024, dtype=np.int64), CONTEXT, 1, count)
        opener._multiplier = Multiplier(STANDARD, key)
        return np.corrcoef(opener._plain(0, 0, kept).reshape(-1)[:values], x)[0, 1]

    for key in (everyone, everyone - spy, spy, np.rint((everyone - spy) / 7).astype(np.int64)):
        assert abs(correlation(key)) < 5 / np.sqrt(values)
    assert correlation(secrets[0]) > 0.9999


def test_a_sum_of_ternary_secrets_gives_coefficients_away_and_a_gaussian_one_none():
    """Why secrets are not ternary: where both are 1 or both -1, the sum of two says so."""
    generator = np.random.default_rng(5)
    ternary = generator.integers(-1, 2, (2, 1 << 16)).sum(axis=0)
    assert 0.21 < (np.abs(ternary) == 2).mean() < 0.235
    first, second = (gaussian(6.4).sample(rng("pair", i), 1 << 16) for i in range(2))
    for total in (-9, 0, 9):  # given the sum, one secret still deviates by 6.4 / sqrt(2) from half of it
        where = first + second == total
        assert 0.94 < first[where].std() / (6.4 / np.sqrt(2)) < 1.06
