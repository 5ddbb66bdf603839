"""A decrypted sum that throws the model away, beside one that does not."""

from dataclasses import replace

import numpy as np
import pytest

from client_agent.learning import Weights
from client_agent.moderating import Moderator
from shelora.lora.moderation import MULTIPLE
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate, LoraFactors

RNG = np.random.default_rng(0)
SCALING = 2.0


def weights(scale: float = 1.0, seed: int = 1) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return Weights(
        factors={"q": LoraFactors(draw(8, 2), draw(2, 9))},
        tensors={"head": draw(3, 4)},
        frozen={"q": LoraFactors(draw(8, 3), draw(3, 9))},
    )


def product(held: Weights) -> np.ndarray:
    own, frozen = held.factors["q"], held.frozen["q"]
    return SCALING * own.B @ own.A + frozen.B @ frozen.A


def moved(before: Weights, step: float) -> Weights:
    factors = before.factors["q"]
    B = factors.B + np.float32(step) * RNG.standard_normal(factors.B.shape).astype(np.float32)
    head = before.tensors["head"] + np.float32(step)
    return Weights(factors={"q": LoraFactors(B, factors.A)}, tensors={"head": head}, frozen=before.frozen)


def result(matrix: np.ndarray, head: np.ndarray, *, summed: bool = True) -> Restored:
    Q, M = np.linalg.qr(matrix.astype(np.float64))
    return Restored(
        matrices={"q": FactoredUpdate(Q, M)}, tensors={"head": head.astype(np.float32)}, summed=summed
    )


def after(moderator: Moderator, part: Restored) -> tuple[np.ndarray, np.ndarray]:
    (found,) = moderator.parts([part])
    update = found.matrices["q"]
    return update.Q @ update.M, found.tensors["head"]


def test_an_honest_mean_is_taken_over_as_it_is() -> None:
    before = weights()
    own, other = moved(before, 0.01), moved(before, 0.02)
    mean = (product(own) + product(other)) / 2, (own.tensors["head"] + other.tensors["head"]) / 2
    part = result(*mean)
    found = after(Moderator(before=before, own=own, scaling=SCALING), part)
    np.testing.assert_allclose(found[0], mean[0], atol=1e-5)
    np.testing.assert_array_equal(found[1], part.tensors["head"])


def test_a_sum_that_one_member_throws_far_moves_the_model_by_the_multiple_in_its_direction() -> None:
    """The control is the sum as it came."""
    before = weights()
    own = moved(before, 0.01)
    far = product(before) + 1e3 * RNG.standard_normal((8, 9)), before.tensors["head"] + 1e3
    found = after(Moderator(before=before, own=own, scaling=SCALING), result(*far))
    step = np.linalg.norm(product(own) - product(before))
    change, whole = found[0] - product(before), far[0] - product(before)
    assert np.linalg.norm(whole) > 1e3 * MULTIPLE * step
    assert np.linalg.norm(change) < MULTIPLE * step * 1.01
    head = np.linalg.norm(found[1] - before.tensors["head"])
    assert head == pytest.approx(
        MULTIPLE * np.linalg.norm(own.tensors["head"] - before.tensors["head"]), rel=1e-3
    )


def test_who_missed_rounds_takes_as_many_steps() -> None:
    before = weights()
    own = moved(before, 0.01)
    five = product(before) + 5 * (product(own) - product(before)), before.tensors["head"] + 0.05
    found = after(Moderator(before=before, own=own, scaling=SCALING, rounds=5), result(*five))
    np.testing.assert_allclose(found[0], five[0], atol=1e-4)
    cut = after(Moderator(before=before, own=own, scaling=SCALING), result(*five))
    assert np.linalg.norm(cut[0] - five[0]) > 0.1 * np.linalg.norm(five[0] - product(before))


def test_what_servers_have_screened_is_not_cut_again() -> None:
    before = weights()
    far = weights(scale=50.0, seed=3)
    part = result(product(far), far.tensors["head"], summed=False)
    moderator = Moderator(before=before, own=moved(before, 0.01), scaling=SCALING)
    assert list(moderator.parts([part])) == [part]
    assert not moderator.changes


def test_rounds_are_remembered_by_name() -> None:
    before = weights()
    own = moved(before, 0.01)
    moderator = Moderator(before=before, own=own, scaling=SCALING)
    after(moderator, result(product(own), own.tensors["head"]))
    assert moderator.changes.keys() == {"q", "head"}
    step = np.linalg.norm(product(own) - product(before))
    assert moderator.changes["q"] == pytest.approx((step,), rel=1e-3)


def test_a_sums_direction_is_held_against_the_own_step_over_all_matrices() -> None:
    before = weights()
    own = moved(before, 0.01)
    step = product(own) - product(before)
    moderator = Moderator(before=before, own=own, scaling=SCALING)
    after(moderator, result(product(before) - 3 * step, own.tensors["head"]))
    motion = moderator.motion
    assert motion.along == pytest.approx(-3 * motion.own, rel=1e-3)
    assert motion.change == pytest.approx(9 * motion.own, rel=1e-3)
    assert motion.own == pytest.approx(float(np.sum(step**2)), rel=1e-3)


def test_who_trained_and_moved_nothing_takes_over_what_the_others_learned() -> None:
    """The difference of equal factors is rounding, not 0: a limit made of it would cut the result to nothing."""
    before = weights()
    other = moved(before, 0.05)
    part = result(product(other), other.tensors["head"])
    moderator = Moderator(before=before, own=before, scaling=SCALING)
    found = after(moderator, part)
    np.testing.assert_allclose(found[0], product(other), atol=1e-5)
    np.testing.assert_array_equal(found[1], part.tensors["head"])
    assert moderator.motion.own == 0
    assert not moderator.changes["q"], "such a round says nothing of honest steps"


@pytest.mark.parametrize("rounds", [0, 1, 1000])
def test_whose_update_is_in_a_sum_bounds_it_whatever_round_a_server_says_it_is_of(rounds: int) -> None:
    """A coordinator in league with a member would lift the limit. The control is one whose update is not in it."""
    before = weights()
    own = moved(before, 0.01)
    far = result(product(before) + 100.0, before.tensors["head"] + 100.0)
    limit = MULTIPLE * 1.01 * np.linalg.norm(product(own) - product(before))
    for share in (0.25, 0.0):
        moderator = Moderator(before=before, own=own, scaling=SCALING, rounds=rounds)
        found = after(moderator, replace(far, own_share=share))
        assert (np.linalg.norm(found[0] - product(before)) < limit) == bool(share or rounds == 1)
        assert moderator.summed == bool(share or rounds)
