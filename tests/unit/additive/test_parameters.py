from dataclasses import replace

import pytest

from shelora.additive import INSECURE_TOY, PROFILES, STANDARD, profile
from shelora.errors import DomainError, Reason


@pytest.mark.parametrize(
    "change",
    [
        {"degree": 1000},
        {"degree": 32},
        {"modulus_bits": 28},
        {"modulus_bits": 19},
        {"deviation": 3.2},
        {"deviation": 0.1},
        {"kept_bits": 17},
        {"kept_bits": 8},
        {"degree": 512},
        {"degree": 4096},
        {"modulus_bits": 20},
    ],
    ids=str,
)
def test_numbers_that_are_unusable_or_insecure_are_refused(change):
    with pytest.raises(DomainError) as error:
        replace(STANDARD, **change)
    assert error.value.reason is Reason.INVALID_ARGUMENT


def test_an_insecure_set_says_so():
    assert [p.name for p in PROFILES.values() if not p.secure] == ["insecure-toy"]
    assert replace(INSECURE_TOY, deviation=3.2).deviation == 3.2


def test_a_digest_is_of_the_numbers_and_not_of_the_name():
    assert replace(STANDARD, name="x").digest == STANDARD.digest
    assert len({p.digest for p in PROFILES.values()}) == len(PROFILES)


def test_profiles_are_found_by_name():
    assert profile("standard") is STANDARD
    with pytest.raises(DomainError) as error:
        profile("none")
    assert "compact" in error.value.message


@pytest.mark.parametrize("count", [0, -1, 16385])
def test_a_sum_has_a_stated_number_of_contributors(count):
    with pytest.raises(DomainError):
        STANDARD.scale(count)
