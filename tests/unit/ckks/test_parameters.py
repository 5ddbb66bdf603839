from dataclasses import replace

import pytest

from shelora.ckks import INSECURE_TOY, LARGE, PROFILES, STANDARD, profile
from shelora.ckks.seal import seal_context
from shelora.errors import DomainError, Reason


@pytest.mark.parametrize("parameters", [STANDARD, LARGE])
def test_secure_profiles_are_accepted_by_seal_at_128_bits(parameters):
    assert parameters.secure
    assert seal_context(parameters).native.parameters_set()


def test_seal_itself_refuses_a_secure_claim_that_our_table_would_miss(monkeypatch):
    monkeypatch.setattr("shelora.ckks.parameters.MAX_MODULUS_BITS_128", {64: 60})
    liar = replace(INSECURE_TOY, secure=True)
    with pytest.raises(DomainError) as refusal:
        seal_context(liar)
    assert refusal.value.reason is Reason.INVALID_ARGUMENT


def test_standard_has_the_documented_numbers():
    assert (STANDARD.slots, STANDARD.coefficient_bits, STANDARD.product_scale) == (2048, 53, 2.0**52)
    assert (STANDARD.chunks(0), STANDARD.chunks(2048), STANDARD.chunks(2049)) == (0, 1, 2)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_is_found_by_its_name(name):
    assert profile(name).name == name


def test_an_unknown_profile_is_refused_and_the_known_ones_named():
    with pytest.raises(DomainError, match="insecure-toy, large, standard") as refusal:
        profile("TINY")
    assert refusal.value.reason is Reason.INVALID_ARGUMENT


def test_the_digest_depends_on_every_number_and_not_on_the_name():
    variants = [
        replace(STANDARD, scale_bits=25),
        replace(STANDARD, weight_scale_bits=23),
        replace(STANDARD, secure=False),
        replace(STANDARD, poly_degree=1024, secure=False),
        replace(STANDARD, modulus=0x1FFFFFFFFC9001),
    ]
    assert len({STANDARD.digest, *(variant.digest for variant in variants)}) == 6
    assert replace(STANDARD, name="OTHER").digest == STANDARD.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"poly_degree": 96}, "power of two"),
        ({"poly_degree": 32}, "power of two"),
        ({"modulus": (1 << 61) - 1}, "33 to 60 bits"),
        ({"modulus": 0x1FFFFFFFFE1003}, "1 modulo"),
        ({"modulus": 4096 * 3 * 2**31 + 1}, "prime"),
        ({"scale_bits": 0}, "above one"),
        ({"scale_bits": 30}, "as wide as q"),
        ({"poly_degree": 1024}, "too wide"),
        ({"modulus": 0x3FFFFFFFFED001}, "too wide"),  # 54 bits: the standard of 2018 allowed them
    ],
)
def test_an_unsound_literal_is_refused(change, message):
    with pytest.raises(DomainError, match=message) as refusal:
        replace(STANDARD, **change)
    assert refusal.value.reason is Reason.INVALID_ARGUMENT


def test_a_scale_without_room_for_noise_is_refused():
    # A 53-bit prime just above 2^52: product scale 2^52 would let a pair of 1/2 pass q / 2.
    candidate = (1 << 52) + 1
    while True:
        try:
            replace(INSECURE_TOY, modulus=candidate, weight_scale_bits=20)
            break
        except DomainError:
            candidate += 128
    with pytest.raises(DomainError, match="room for noise"):
        replace(INSECURE_TOY, modulus=candidate, weight_scale_bits=26)
