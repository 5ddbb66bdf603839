"""What a client refuses of a result, and what it must not refuse."""

import re
from dataclasses import replace

import numpy as np
import pytest

from client_agent.learning import Weights
from client_agent.plausibility import (
    FEWEST,
    NEGLIGIBLE,
    STEP_MARGIN,
    TIMES_OWN,
    WORSE_BY,
    WORSE_BY_FACTOR,
    Expectation,
    Losses,
    Motion,
    believed_tensors,
    objection_to,
    plausible,
    turned,
    update_norm,
)
from shelora.errors import DomainError, Reason
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate, LoraFactors

RNG = np.random.default_rng(7)
STEP = 0.05


def factors() -> LoraFactors:
    return LoraFactors(
        RNG.standard_normal((6, 2)).astype(np.float32), RNG.standard_normal((2, 5)).astype(np.float32)
    )


def expectation(**changes) -> Expectation:
    head = RNG.standard_normal((3, 4)).astype(np.float32)
    own = head + (STEP / 2 * RNG.standard_normal((3, 4))).astype(np.float32)
    values = {
        "base": Weights(factors={"q": factors()}, tensors={"head": head}),
        "trained": Weights(factors={"q": factors()}, tensors={"head": own}),
        "scaling": 2.0,
        "step": STEP,
    }
    return Expectation(**{**values, **changes})


def result(own: Weights, scaling: float, *, times: float = 1.0) -> Restored:
    update = times * scaling * own.factors["q"].B.astype(np.float64) @ own.factors["q"].A
    Q, M = np.linalg.qr(update)
    return Restored(matrices={"q": FactoredUpdate(Q[:, :2], M[:2])})


def refused(part: Restored, expected: Expectation) -> str:
    with pytest.raises(DomainError) as error:
        list(plausible([part], expected))
    assert error.value.reason is Reason.RESULT_REFUSED
    return error.value.message


def test_a_norm_is_that_of_the_product():
    some = factors()
    exact = np.linalg.norm(2.0 * some.B.astype(np.float64) @ some.A)
    assert update_norm({"q": some}, 2.0) == pytest.approx(exact, rel=1e-5)
    assert update_norm({"a": some, "b": some}, 2.0) == pytest.approx(exact * np.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("times", [0.0, 0.1, 1.0, 0.99 * TIMES_OWN])
def test_a_result_of_the_size_of_ones_own_update_is_applied(times):
    expected = expectation()
    part = result(expected.trained, 2.0, times=times)
    assert list(plausible([part], expected)) == [part]


def test_a_result_far_beyond_ones_own_update_is_refused():
    expected = expectation()
    part = result(expected.trained, 2.0, times=1.01 * TIMES_OWN)
    assert "this client's whole update had" in refused(part, expected)
    assert list(plausible([part], replace(expected, trained=None))) == [part], "who did not train cannot tell"


@pytest.mark.parametrize("spoil", [lambda Q: 1.001 * Q, lambda Q: Q[:, ::-1] + Q, np.zeros_like])
def test_a_basis_that_is_not_orthonormal_is_refused_by_everyone(spoil):
    expected = expectation()
    update = result(expected.trained, 2.0).matrices["q"]
    part = Restored(matrices={"q": FactoredUpdate(spoil(update.Q), update.M)})
    assert "not orthonormal" in refused(part, expected)
    assert "not orthonormal" in refused(part, replace(expected, trained=None))


def moved(expected: Expectation, by) -> dict[str, np.ndarray]:
    return {"head": (expected.base.tensors["head"] + by).astype(np.float32)}


def test_tensors_that_moved_as_honest_ones_do_are_believed():
    expected = expectation()
    own = expected.trained.tensors["head"] - expected.base.tensors["head"]
    step = np.clip(own, -STEP, STEP)
    for by in (0.0, step, 0.3 * step):
        assert np.array_equal(
            believed_tensors(moved(expected, by), expected)["head"], moved(expected, by)["head"]
        )


@pytest.mark.parametrize("kind", ["a value too far", "against the own step", "the bound"])
def test_tensors_that_no_mean_of_honest_members_is_stay_as_they_were(kind):
    expected = expectation()
    base = expected.base.tensors["head"]
    own = np.clip(expected.trained.tensors["head"] - base, -STEP, STEP)
    far = own.copy()
    far[0, 0] = 1.01 * STEP_MARGIN * STEP
    by = {"a value too far": far, "against the own step": -0.1 * own, "the bound": -np.sign(base) - base}[
        kind
    ]
    assert np.array_equal(believed_tensors(moved(expected, by), expected)["head"], base)
    late = replace(expected, trained=None)
    assert np.array_equal(believed_tensors(moved(expected, by), late)["head"], moved(expected, by)["head"])


def test_a_result_that_makes_the_model_much_worse_is_objected_to_and_one_that_forgets_a_little_is_not():
    fine = [(2.08, 2.08, 0.5, 0.97), (0.87, 0.9, 0.4, 1.13), (0.02, 0.02, 0.01, 0.07)]
    fine += [(1.0, 1.0, 1.0, WORSE_BY_FACTOR + WORSE_BY), (2.05, 2.05, 0.5, 1.79), (0.5, 1.0, None, 0.99)]
    useless = [(2.06, 2.06, 0.4, 2.05), (0.9, 0.9, 0.4, 2.1), (0.5, 1.2, 1.2, 1.2), (0.0, 0.0, 0.0, 0.3)]
    useless += [(1.0, 1.0, 1.0, float("nan")), (1.0, 1.0, 1.0, float("inf")), (0.5, 1.0, None, 1.1)]
    for best, before, own, after in fine:
        assert objection_to(Losses(best=best, before=before, own=own, after=after)) == ""
    for best, before, own, after in useless:
        why = objection_to(Losses(best=best, before=before, own=own, after=after))
        assert "the loss on this client's own examples" in why
        assert not re.search(r"\d", why), "others read it"


def test_the_noise_of_a_sum_is_no_hostile_members_step():
    """Late rounds of a learning rate that decays move values by less than the noise of the sum."""
    expected = replace(expectation(), step=1e-9)
    by = 1e-6 * np.random.default_rng(1).standard_normal((3, 4))
    assert "moved farther" not in str(doubts(expected, by, noise=1e-6))
    assert "moved farther" in str(doubts(expected, by, noise=1e-9)), "the control"


def doubts(expected: Expectation, by: np.ndarray, noise: float) -> list[str]:
    fresh = replace(expected, doubts=[])
    believed_tensors(moved(fresh, by), fresh, noise=noise)
    return fresh.doubts


def seen(total: np.ndarray, own: np.ndarray, held: float = 0.0) -> Motion:
    motion = Motion()
    for part, mine in zip(np.split(total, 4), np.split(own, 4), strict=True):
        motion.add(float(part @ mine), float(np.linalg.norm(part)), float(np.linalg.norm(mine)), held)
    return motion


@pytest.mark.parametrize("clients", [2, 3, 4, 8, 20, 100])
@pytest.mark.parametrize("common", [0.0, 0.5, 2.0], ids=["unlike", "akin", "alike"])
def test_the_mean_of_honest_updates_is_no_majoritys_opposite_whatever_they_weigh(clients, common):
    shared = common * RNG.standard_normal(4000)
    updates = [shared + RNG.standard_normal(4000) for _ in range(clients)]
    weights = RNG.dirichlet([2.0] * clients)
    mean = sum(w * u for w, u in zip(weights, updates, strict=True))
    found = [bool(turned(seen(mean, u), w, clients)) for w, u in zip(weights, updates, strict=True)]
    assert sum(found) < clients / 2


@pytest.mark.parametrize("attack", ["boosted", "reversed", "elsewhere"])
@pytest.mark.parametrize("clients", [4, 8])
def test_a_sum_that_one_member_leads_is_every_honest_members_opposite(attack, clients):
    shared = RNG.standard_normal(4000)
    honest = [shared + RNG.standard_normal(4000) for _ in range(clients - 1)]
    hostile = {
        "boosted": -9 * (shared + RNG.standard_normal(4000)),
        "reversed": -1.5 * (clients - 1) * (shared + 0.1 * RNG.standard_normal(4000)),
        "elsewhere": 20 * RNG.standard_normal(4000) * np.sqrt(clients),
    }[attack]
    total = sum([*honest, hostile]) / clients
    assert all(turned(seen(total, u), 1 / clients, clients) for u in honest)


def test_whose_update_is_not_in_the_sum_says_nothing_of_its_direction():
    own = RNG.standard_normal(4000)
    assert not turned(seen(-own, own), 0.0, 4)
    assert not turned(seen(own, 0 * own), 0.25, 4)
    assert turned(seen(-own, own), 0.25, 4), "the control"


def test_a_sum_of_two_is_not_judged_by_its_direction():
    """Two with one label each, of two: their steps are opposite, both would object, and no round would succeed."""
    own = RNG.standard_normal(4000)
    total = (own - 0.9 * own) / 2
    assert not turned(seen(total, own), 1 / 2, 2)
    assert turned(seen(total, own), 1 / FEWEST, FEWEST), "the control"


def test_a_step_within_rounding_and_noise_has_no_direction():
    """A learning rate near zero: what the sum differs by is its own error, the same for all."""
    own, error = 1e-6 * RNG.standard_normal(4000), 1e-6 * RNG.standard_normal(4000)
    total = 0.1 * own - error
    assert turned(seen(total, own, held=0.0), 1 / 4, 4), (
        "the control: there is nothing that it could be an error of"
    )
    far = float(np.linalg.norm(own)) / NEGLIGIBLE
    assert not turned(seen(total, own, held=far), 1 / 4, 4)
    assert turned(seen(-own, own, held=far / 10), 1 / 4, 4)
