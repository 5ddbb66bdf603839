"""The whole engine: what agents reconstruct is sum_i w_i s_i B_i A_i, within bounds that are derived and not tuned."""

import numpy as np
import pytest
from hypothesis import given, settings

from shelora.ckks.parameters import LARGE, STANDARD
from shelora.ckks.secret import SecretKey
from shelora.lora.bounds import encrypted_row_errors, tensor_error_bound, update_error_bound
from shelora.lora.layout import Tensor
from tests.unit.lora.cohorts import Cohort, Member, cohorts, layout_of, lora_factors, planned


def check_bounds(cohort, *, worst_case_rounding):
    contents = cohort.contents()
    restored = cohort.restored(contents)
    for shard, content in zip(cohort.layout.shards, contents, strict=True):
        for index, part in zip(shard.matrices, content.matrices, strict=True):
            name = cohort.layout.matrices[index].name
            B, A = cohort.stacked(name)
            errors = encrypted_row_errors(
                cohort.layout, part.row_exponents, cohort.terms, worst_case_rounding=worst_case_rounding
            )
            update = restored.matrices[name]
            assert (np.abs(update.Q @ update.M - B @ A) <= update_error_bound(update, errors, B, A)).all()
    for tensor in cohort.layout.tensors:
        error = np.abs(restored.tensors[tensor.name] - cohort.mean(tensor.name)).max()
        assert error <= tensor_error_bound(cohort.layout, tensor, len(cohort.members))
        assert restored.tensors[tensor.name].shape == tensor.shape
    return restored


@settings(max_examples=120)
@given(cohort=cohorts())
def test_agents_reconstruct_the_exact_sum_within_the_rigorous_bound(cohort):
    check_bounds(cohort, worst_case_rounding=True)


def standard_cohort(rng, parameters, *, shapes, budgets, ranks, tiers, tensors=()):
    key = SecretKey.generate(parameters)
    matrices, orders = planned(shapes, budgets, seed=int(rng.integers(2**31)))
    layout = layout_of(matrices, tensors, tiers=budgets, key=key, max_rank=64, max_directions=256)
    weights = rng.dirichlet(np.ones(len(ranks)))
    members = tuple(
        Member(
            weight=float(weight),
            scaling=16 / rank,
            encrypted_tiers=encrypted,
            factors=lora_factors(rng, matrices, rank),
            tensors={t.name: rng.uniform(-t.bound, t.bound, t.shape).astype(np.float32) for t in tensors},
        )
        for weight, rank, encrypted in zip(weights, ranks, tiers, strict=True)
    )
    return Cohort(layout, orders, members, key)


@pytest.mark.parametrize("parameters", [STANDARD, LARGE])
@pytest.mark.parametrize(
    ("shapes", "budgets", "ranks", "tiers"),
    [
        ([(576, 576)] * 6, (0.01, 0.1), (8, 8, 16), (1, 2, 2)),
        ([(192, 576)] * 4, (0.5,), (4, 8), (1, 0)),
        ([(384, 384), (1536, 384), (384, 1536)], (1.0,), (8, 4, 8, 16), (1, 1, 1, 1)),
        ([(64, 2048)], (1.0,), (8, 8), (1, 1)),
    ],
)
def test_at_the_magnitudes_of_lora_the_error_is_below_2_to_the_minus_14_of_the_largest_entry(
    parameters, shapes, budgets, ranks, tiers
):
    rng = np.random.default_rng(len(shapes))
    tensors = [Tensor("head", (8, 384))]
    cohort = standard_cohort(
        rng, parameters, shapes=shapes, budgets=budgets, ranks=ranks, tiers=tiers, tensors=tensors
    )
    restored = check_bounds(cohort, worst_case_rounding=False)
    for name, update in restored.matrices.items():
        exact = cohort.exact(name)
        assert np.abs(update.Q @ update.M - exact).max() < 2**-14 * np.abs(exact).max()
    head = np.abs(restored.tensors["head"] - cohort.mean("head")).max()
    assert head < 2**-14


def test_the_bound_is_not_idle():
    """A bound a thousand times too wide would pass every test above."""
    rng = np.random.default_rng(3)
    cohort = standard_cohort(
        rng, STANDARD, shapes=[(64, 96)] * 30, budgets=(0.5,), ranks=(8, 8, 8), tiers=(1, 1, 1)
    )
    contents = cohort.contents()
    restored, closest = cohort.restored(contents), 0.0
    for matrix, part in zip(cohort.layout.matrices, contents[0].matrices, strict=True):
        B, A = cohort.stacked(matrix.name)
        update = restored.matrices[matrix.name]
        errors = encrypted_row_errors(cohort.layout, part.row_exponents, cohort.terms)
        found = np.abs(update.Q @ update.M - B @ A)
        closest = max(closest, (found / update_error_bound(update, errors, B, A)).max())
    assert closest > 1 / 50
