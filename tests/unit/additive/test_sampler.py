"""The Gaussian against its definition; seeds are fixed, so that nothing here fails by chance."""

import math
from fractions import Fraction

import numpy as np
import pytest

from shelora.additive.sampler import Csprng, Gaussian, gaussian

SEED = bytes(range(32))


def probabilities(deviation, bound):
    weights = {x: math.exp(-x * x / (2 * deviation**2)) for x in range(-bound, bound + 1)}
    total = math.fsum(weights.values())
    return {x: weight / total for x, weight in weights.items()}


def test_the_table_is_the_cumulative_distribution_to_its_last_bits():
    sampler = Gaussian(6.4)
    exact = probabilities(6.4, sampler.bound)
    below = 0.0
    for x, entry in zip(range(-sampler.bound, sampler.bound), sampler.table.tolist(), strict=True):
        below += exact[x]
        assert abs(Fraction(entry, 2**63) - Fraction(below)) < 2**-49  # floats of the test, not of the table


def test_the_table_ends_where_nothing_is_left():
    sampler = Gaussian(6.4)
    assert sampler.bound == 59
    beyond = (
        2
        * math.fsum(math.exp(-x * x / (2 * 6.4**2)) for x in range(60, 200))
        / (6.4 * math.sqrt(2 * math.pi))
    )
    assert beyond < 2**-63


def test_samples_have_the_distribution():
    count, sampler = 1 << 20, gaussian(6.4)
    samples = sampler.sample(Csprng(SEED), count)
    exact = probabilities(6.4, sampler.bound)
    counts = np.bincount(samples + sampler.bound, minlength=2 * sampler.bound + 1)
    inner = range(-28, 29)  # at least 30 expected in each
    statistic = sum((counts[x + sampler.bound] - count * exact[x]) ** 2 / (count * exact[x]) for x in inner)
    assert statistic < 120  # 57 cells: beyond it once in 10^6
    assert abs(samples.mean()) < 5 * 6.4 / math.sqrt(count)
    assert abs(samples.std() / 6.4 - 1) < 5 / math.sqrt(2 * count)
    serial = np.corrcoef(samples[:-1], samples[1:])[0, 1]
    assert abs(serial) < 5 / math.sqrt(count)


def test_every_word_is_decided_as_by_a_search_of_the_whole_table():
    sampler = gaussian(6.4)
    samples = sampler.sample(Csprng(SEED), 100_000)
    words = Csprng(SEED).words(100_000) >> np.uint64(1)
    expected = np.searchsorted(sampler.table, words, side="right") - sampler.bound
    assert np.array_equal(samples, expected)


@pytest.mark.parametrize("edge", [0, 2**63 - 1])
def test_the_ends_of_the_table_are_the_ends_of_the_range(edge):
    sampler = gaussian(6.4)

    class Fixed:
        def words(self, count):
            return np.full(count, edge << 1, dtype=np.uint64)

    assert abs(int(sampler.sample(Fixed(), 1)[0])) in {sampler.bound - 1, sampler.bound}


def test_a_stream_is_its_seed_and_goes_on():
    first, second = Csprng(SEED), Csprng(SEED)
    assert first.bytes(10) + first.bytes(22) == second.bytes(32)
    assert Csprng.fresh().bytes(32) != Csprng.fresh().bytes(32)
    with pytest.raises(ValueError, match="32 bytes"):
        Csprng(bytes(31))
