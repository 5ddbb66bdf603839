"""The noise against the definition of a discrete Gaussian; seeds are fixed, so that nothing here fails by chance."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.stats import chisquare

from shelora.additive.noise import LARGEST_DEVIATION, NoiseSampler, noise_sampler
from shelora.additive.sampler import Csprng

SEED = bytes(range(32))


@pytest.mark.parametrize("deviation", [1, 4, 37])
def test_the_table_is_the_cumulative_distribution_to_127_bits(deviation):
    """Computed term by term with other digits, and with the tail beyond the table."""
    sampler = NoiseSampler(deviation)
    with localcontext() as context:
        context.prec = 120
        weights = {
            x: (-Decimal(x * x) / (2 * Decimal(deviation) ** 2)).exp()
            for x in range(-20 * deviation, 20 * deviation + 1)
        }
        total, below = sum(weights.values()), sum(weights[x] for x in range(-20 * deviation, -sampler.bound))
        beyond = 2 * below / total
        for x, entry in zip(range(-sampler.bound, sampler.bound), sampler.table, strict=True):
            below += weights[x]
            assert abs(Decimal(entry) - below / total * 2**127) <= 1 + 2**127 * beyond
    assert beyond < Decimal(2) ** -127


def test_samples_have_the_distribution():
    sampler = noise_sampler(4)
    drawn = sampler.sample(Csprng(SEED), 400_000)
    values = np.arange(-12, 13)
    weights = np.exp(-(values**2) / 32)
    inside = drawn[np.abs(drawn) <= 12]
    found = np.bincount(inside + 12, minlength=25)
    assert chisquare(found, len(inside) * weights / weights.sum()).pvalue > 0.01
    assert drawn.var() == pytest.approx(16, rel=4 * math.sqrt(2 / len(drawn)))


@pytest.mark.parametrize("deviation", [64, LARGEST_DEVIATION])
def test_wide_samples_have_the_deviation_and_the_sum_of_several_theirs(deviation):
    rng, sampler = Csprng(SEED), noise_sampler(deviation)
    drawn = np.array([sampler.sample(rng, 50_000) for _ in range(5)])
    tolerance = 4 * math.sqrt(2 / 50_000)
    assert drawn[0].var() == pytest.approx(deviation**2, rel=tolerance)
    assert drawn.sum(axis=0).var() == pytest.approx(5 * deviation**2, rel=tolerance)
    assert abs(drawn.sum(axis=0).mean()) < 4 * deviation * math.sqrt(5 / 50_000)
    assert np.abs(drawn).max() <= sampler.bound
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 0.03


class Words:
    """A stream of chosen words."""

    def __init__(self, *words):
        self.left = list(words)

    def words(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, dtype=np.uint64)


def test_where_the_upper_bits_do_not_decide_the_lower_ones_do():
    sampler = noise_sampler(4)
    place = sampler.bound  # P(X <= 0)
    entry = sampler.table[place]
    upper, lower = entry >> 64, entry % 2**64
    assert sampler.sample(Words(upper << 1, lower - 1), 1)[0] == 0
    assert sampler.sample(Words(upper << 1, lower), 1)[0] == 1
    assert sampler.sample(Words((upper - 1) << 1), 1)[0] == 0
    assert sampler.sample(Words((upper + 1) << 1), 1)[0] == 1
    assert sampler.sample(Words(0, 0), 1)[0] <= 1 - sampler.bound
    assert sampler.sample(Words(2**64 - 1, 2**64 - 1), 1)[0] == sampler.bound


def test_no_two_streams_are_alike_and_one_seed_gives_one():
    sampler = noise_sampler(64)
    assert np.array_equal(sampler.sample(Csprng(SEED), 100), sampler.sample(Csprng(SEED), 100))
    assert not np.array_equal(sampler.sample(Csprng.fresh(), 100), sampler.sample(Csprng.fresh(), 100))


@pytest.mark.parametrize("deviation", [0, LARGEST_DEVIATION + 1])
def test_other_deviations_are_refused(deviation):
    with pytest.raises(ValueError, match="1 to 4096"):
        NoiseSampler(deviation)
