"""What a client changes is cut to its clip in integers, whatever it is, and the integers always have room."""

import math
from fractions import Fraction

import numpy as np
import pytest

from shelora.additive.noise import noise_sampler
from shelora.additive.parameters import DEFAULT, PROFILES
from shelora.errors import DomainError, Reason
from shelora.lora.noise import Allowance, ClientNoise, limited


def noise(bound=1.0, clip=0.5, multiplier=1.5625, honest=2):
    return ClientNoise(bound=bound, clip=clip, multiplier=multiplier, honest=honest)


CASES = [
    (noise(), 4),
    (noise(bound=4.0), 2),
    (noise(bound=4.0, clip=0.01, multiplier=0.25, honest=1), 16),
    (noise(honest=900), 1000),
    (noise(bound=1.0, clip=2.0, multiplier=8.0, honest=10_000), 2**14),
    (noise(clip=100.0, multiplier=40.0), 4),
]


@pytest.mark.parametrize(("terms", "most"), CASES)
def test_no_value_leaves_what_a_client_may_send_so_no_sum_overflows(terms, most):
    for parameters in (DEFAULT, PROFILES["standard"], PROFILES["small"]):
        grid = terms.grid(parameters, most)
        bound = noise_sampler(grid.deviation).bound
        extreme = np.array([1, -1])
        values = grid.values(100.0 * extreme, terms.bound, grid.clip * extreme, bound * extreme)
        assert np.abs(values).max() <= 1
        assert (
            np.abs(np.rint(values * grid.scale) - values * grid.scale).max() < 1e-6
        )  # encryption rounds: no matter
        assert most * grid.scale + parameters.noise_bound(most) <= parameters.modulus / 2


@pytest.mark.parametrize(("terms", "most"), CASES)
def test_the_noise_of_the_honest_is_at_least_the_multiplier_times_the_clip_in_integers(terms, most):
    grid = terms.grid(DEFAULT, most)
    assert grid.deviation**2 * terms.honest >= (Fraction(terms.multiplier) * grid.clip) ** 2
    assert grid.deviation**2 * terms.honest < (Fraction(terms.multiplier) * (grid.clip + 1)) ** 2
    assert grid.deviation >= 4
    assert grid.unit * grid.deviation == pytest.approx(
        terms.multiplier * terms.clip / math.sqrt(terms.honest)
    )
    assert grid.clip * grid.unit <= terms.clip * (1 + 1e-12)


@pytest.mark.parametrize(("terms", "most"), CASES)
@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0, 7.0, 1e5])
def test_neighbours_differ_by_at_most_the_clip_and_replaced_ones_by_twice_it(terms, most, size):
    """In the integers that are encrypted, over all shards, from one start and with the same noise."""
    grid, rng = terms.grid(DEFAULT, most), np.random.default_rng(0)
    start = rng.uniform(-1, 1, 5000)
    drawn = noise_sampler(grid.deviation).sample(_Rng(), 5000)

    def sent(difference):
        factor, allowance = grid.factor(float(np.linalg.norm(difference))), Allowance(grid)
        parts = []
        for part in (slice(0, 1000), slice(1000, 5000)):
            change = grid.change(difference[part], factor)
            allowance.take(change)
            parts.append(grid.values(start[part], terms.bound, change, drawn[part]))
        return np.rint(np.concatenate(parts) * grid.scale).astype(np.int64)

    def squared(difference):
        assert not (difference % grid.step).any()
        return sum(int(v) ** 2 for v in difference // grid.step)

    one = rng.standard_normal(5000)
    one *= size * terms.clip / np.linalg.norm(one)
    few = np.zeros(5000)
    few[7] = size * terms.clip
    without = sent(np.zeros(5000))
    for difference in (one, -one, few):
        assert squared(sent(difference) - without) <= grid.clip**2
    assert squared(sent(one) - sent(-one)) <= 4 * grid.clip**2
    if size >= 7:  # the control: the clip is used
        assert squared(sent(few) - without) >= (0.99 * grid.clip) ** 2


class _Rng:
    def words(self, count):
        return np.random.default_rng(3).integers(0, 2**64, count, dtype=np.uint64)


def test_what_is_above_the_clip_in_integers_does_not_leave():
    grid = noise().grid(DEFAULT, 4)
    allowance = Allowance(grid)
    allowance.take(np.array([grid.clip]))
    with pytest.raises(DomainError) as refused:
        allowance.take(np.array([1]))
    assert refused.value.reason is Reason.INTERNAL
    huge = np.full(8, 2**31 - 1)  # squares do not wrap
    with pytest.raises(DomainError):
        Allowance(grid).take(huge)


def test_a_short_change_keeps_its_length_and_is_cut_towards_zero():
    grid = noise().grid(DEFAULT, 4)
    difference = np.array([0.1, -0.2, grid.unit * 0.99, -grid.unit * 0.99])
    change = grid.change(difference, grid.factor(float(np.linalg.norm(difference))))
    assert np.abs(change * grid.unit - difference)[:2].max() <= grid.unit
    assert list(change[2:]) == [0, 0]
    assert not grid.change(np.zeros(3), grid.factor(0.0)).any()


def test_a_mean_farther_than_honest_clients_can_take_it_is_cut_and_noise_alone_never_is():
    terms, rng = noise(), np.random.default_rng(1)
    start, deviation = rng.uniform(-1, 1, 2000), 0.3
    for _ in range(20):
        change = rng.standard_normal(2000)
        change *= terms.clip / np.linalg.norm(change)
        honest = start + change + deviation * rng.standard_normal(2000)
        assert limited(honest, start, terms, deviation)[1] is False
    far, cut = limited(start + 1.0, start, terms, deviation)
    assert cut
    assert np.linalg.norm(far - start) == pytest.approx(0.5 + 0.3 * (math.sqrt(2000) + 12))


@pytest.mark.parametrize(
    ("terms", "most", "why"),
    [
        (noise(clip=1e-7, multiplier=1e-3, bound=100.0), 4, "raise clip, or lower"),
        (noise(multiplier=4096.0, honest=1, clip=100.0), 2**14, "raise clip|lower it"),
    ],
)
def test_noise_that_has_no_room_is_refused_with_a_remedy(terms, most, why):
    with pytest.raises(DomainError, match=why) as refused:
        terms.grid(DEFAULT, most)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "field",
    [
        {"bound": 0.0},
        {"clip": 0.0},
        {"clip": math.nan},
        {"multiplier": 0.0},
        {"honest": 0},
        {"honest": 2**15},
    ],
)
def test_terms_out_of_range_are_refused_by_name(field):
    with pytest.raises(DomainError, match=next(iter(field))):
        noise(**field)
