"""The accountant of sums against Opacus', against the Gaussian's own profile, and against itself."""

import math

import pytest
from opacus.accountants import RDPAccountant
from scipy.stats import norm

from shelora import accounting
from shelora.accounting import MULTIPLIER_UNIT, correction, epsilon_of, multiplier_for

SCHEDULES = [(0.3, 1), (0.5, 6), (1.5625, 6), (4.0, 1), (10.0, 100), (300.0, 10_000), (2.0, 10_000)]


@pytest.mark.parametrize(("multiplier", "sums"), SCHEDULES)
def test_it_is_opacus_accountant_at_a_sampling_rate_of_1(multiplier, sums):
    for delta in (1e-3, 1e-5, 1e-9):
        opacus = RDPAccountant()
        opacus.history = [(multiplier, 1.0, sums)]
        found = epsilon_of([multiplier] * sums, delta)
        assert found == pytest.approx(
            max(0.0, opacus.get_epsilon(delta, alphas=list(accounting._ORDERS))), rel=1e-9
        )


@pytest.mark.parametrize(("multiplier", "sums"), SCHEDULES)
def test_it_bounds_the_exact_profile_and_is_no_looser_than_the_plain_bound(multiplier, sums):
    """Balle and Wang, ICML 2018, theorem 8: δ(ε) of Gaussian noise, exactly; several sums are one of less noise."""
    delta, mu = 1e-5, math.sqrt(sums) / multiplier
    epsilon = epsilon_of([multiplier] * sums, delta)
    least = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert least <= delta
    rho = mu**2 / 2
    assert epsilon <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_sums_of_different_noise_add_up_and_none_cost_nothing():
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([1.0, 3.0], 1e-5) == pytest.approx(epsilon_of([math.sqrt(0.9)], 1e-5), rel=1e-9)
    assert epsilon_of([1.0] * 5, 1e-5) > epsilon_of([1.0] * 4, 1e-5)
    assert epsilon_of([1.0], 1e-9) > epsilon_of([1.0], 1e-5)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 3.0, 8.0, 100.0])
@pytest.mark.parametrize("sums", [1, 6, 1000])
def test_the_noise_found_is_the_least(epsilon, sums):
    found = multiplier_for(epsilon, 1e-5, sums)
    assert (found / MULTIPLIER_UNIT).is_integer()
    assert epsilon_of([found] * sums, 1e-5) <= epsilon
    assert found == MULTIPLIER_UNIT or epsilon_of([found - MULTIPLIER_UNIT] * sums, 1e-5) > epsilon


def test_what_no_noise_keeps_is_refused():
    with pytest.raises(ValueError, match=r"0\.0001"):
        multiplier_for(1e-4, 1e-5, 10_000)


def test_the_correction_for_sums_of_discrete_gaussians_is_what_the_paper_says_and_does_not_matter():
    assert correction(1, 1) == 0
    assert correction(1, 3) == pytest.approx(
        10 * (math.exp(-(math.pi**2)) + math.exp(-4 / 3 * math.pi**2)), rel=1e-12
    )
    assert 0 < accounting._CORRECTION < 1e-60
