"""The rules of screening, and that the norm bounds what it says it bounds, whatever clients send."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks.secret import Encryptor
from shelora.lora.codec import encode_update, validate_update
from shelora.lora.protect import protect
from shelora.lora.screening import (
    counted_norm,
    largest_believed,
    largest_share,
    shares,
    squared_norm,
    update_norm,
)
from tests.unit.lora.cohorts import TOY_KEY, cohorts

NORMS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


def norm_of(cohort, member, shards):
    contents = [validate_update(cohort.layout, index, data) for index, data in enumerate(shards)]
    return update_norm(member.scaling, [squared_norm(cohort.layout, content) for content in contents])


def frobenius(updates):
    return math.sqrt(sum(float(np.linalg.norm(update)) ** 2 for update in updates))


@settings(max_examples=30)
@given(cohorts())
def test_the_norm_bounds_every_update(cohort):
    for member, shards in zip(cohort.members, cohort.updates(), strict=True):
        factors = member.factors.values()
        exact = frobenius(member.scaling * f.B.astype(np.float64) @ f.A.astype(np.float64) for f in factors)
        assert exact <= norm_of(cohort, member, shards) * (1 + 1e-5)


class Garbage:
    """Encrypts nothing: well-formed ciphertexts that decrypt to values all over the modulus."""

    def encrypt(self, values):
        block = Encryptor(TOY_KEY).encrypt(values)
        c0 = np.random.default_rng(0).integers(0, TOY_KEY.parameters.modulus, block.c0.shape, dtype=np.uint64)
        return replace(block, c0=c0)


@settings(max_examples=20)
@given(cohorts())
def test_the_norms_bound_the_aggregate_though_ciphertexts_hold_garbage(cohort):
    updates, hostile = cohort.updates(), cohort.members[0]
    tiers = hostile.encrypted_tiers
    contents = protect(cohort.layout, hostile.factors, hostile.tensors, tiers, cohort.orders, Garbage())
    updates[0] = [encode_update(cohort.layout, content) for content in contents]
    restored = cohort.restored(cohort.contents(updates))
    norms = [norm_of(cohort, m, shards) for m, shards in zip(cohort.members, updates, strict=True)]
    bound = 2 * sum(m.weight * norm for m, norm in zip(cohort.members, norms, strict=True))
    assert frobenius(u.Q @ u.M for u in restored.matrices.values()) <= bound * (1 + 1e-4)
    bounds = {tensor.name: tensor.bound for tensor in cohort.layout.tensors}
    for name, value in restored.tensors.items():
        assert np.abs(value).max(initial=0) <= bounds[name] * (1 + 1e-6)


@given(NORMS, st.floats(2, 100))
def test_an_honest_majority_alone_says_what_is_too_large(norms, ratio):
    most = largest_believed({str(i): norm for i, norm in enumerate(norms)}, ratio)
    assert sum(norm <= most for norm in norms) * 2 >= len(norms)
    assert most <= ratio * max(norms)
    hostile = {str(i): norm for i, norm in enumerate(norms)} | {"h": 1e300}
    if len(norms) >= 2:
        assert largest_believed(hostile, ratio) <= ratio * max(norms), (
            "one member does not move the median far"
        )


def test_nothing_is_too_large_without_a_rule_beside_zeros_or_in_a_pair():
    assert largest_believed({"a": 1, "b": 1, "c": 1e9}, 0) == math.inf
    assert largest_believed({"a": 0, "b": 0, "c": 1e9}, 10) == math.inf
    assert largest_believed({"a": 1, "b": 1e9}, 2) >= 1e9
    assert largest_believed({}, 10) == math.inf


CLAIMS = st.lists(st.integers(1, 10**9), min_size=2, max_size=30)


@given(CLAIMS, st.sampled_from([0.0, 1.0, 3.0, 100.0]))
def test_nobody_weighs_more_than_its_share_whatever_is_claimed(claims, ratio):
    weights = shares(claims, ratio)
    assert math.isclose(math.fsum(weights), 1)
    assert all(0 < weight <= largest_share(len(claims)) * (1 + 1e-9) for weight in weights)
    ordered = sorted(range(len(claims)), key=claims.__getitem__)
    assert all(weights[a] <= weights[b] * (1 + 1e-9) for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize(
    ("clients", "most"),
    [(2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (6, 1 / 4), (8, 1 / 4), (10, 1 / 5), (1000, 2 / 1000)],
)
def test_a_billion_claimed_examples_weigh_as_stated(clients, most):
    honest = [100 + i for i in range(clients - 1)]
    assert math.isclose(shares([*honest, 10**9], 0)[-1], most), "the share alone"
    assert shares([*honest, 10**9], 3)[-1] <= most * (1 + 1e-9)


def test_weights_within_the_limits_are_in_proportion_to_examples():
    assert shares([10, 25, 25, 20, 20], 3) == pytest.approx([0.1, 0.25, 0.25, 0.2, 0.2])
    assert shares([20, 30, 30], 3) == pytest.approx([1 / 3] * 3)
    assert shares([10, 10, 10, 10, 10, 10, 60], 3) == pytest.approx([1 / 8] * 6 + [2 / 8])
    assert shares([5, 5], 0) == [0.5, 0.5]


def test_a_believed_norm_counts_up_to_half_of_what_is_believed():
    assert [counted_norm(norm, 3.0) for norm in (0.0, 1.0, 1.5, 3.0)] == [1.0, 1.0, 1.0, 0.5]
    assert counted_norm(1e9, math.inf) == 1.0
