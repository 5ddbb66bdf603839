import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shelora.errors import DomainError, Reason
from shelora.lora.codec import decode_result, decode_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Tensor
from shelora.lora.restore import restore
from shelora.lora.shards import LoraFactors
from tests.unit.lora.cohorts import Cohort, Member, layout_of, lora_factors, planned

ROOT = Path(__file__).parents[3]
SHAPES = [(20, 30), (12, 40), (16, 24)]


def cohort_of(ranks=(2, 3, 2), tiers=(2, 1, 0), budgets=(0.2, 0.6), seed=1, **layout_changes):
    rng = np.random.default_rng(seed)
    matrices, orders = planned(SHAPES, budgets)
    layout = layout_of(matrices, [Tensor("head", (4, 5))], tiers=budgets, cuts={2}, **layout_changes)
    members = tuple(
        Member(
            1 / len(ranks),
            8 / rank,
            min(encrypted, len(budgets)),
            lora_factors(rng, matrices, rank),
            {"head": rng.uniform(-1, 1, (4, 5)).astype(np.float32)},
        )
        for rank, encrypted in zip(ranks, tiers, strict=True)
    )
    return Cohort(layout, orders, members)


def refused(call, *arguments):
    with pytest.raises(DomainError) as error:
        call(*arguments)
    return error.value.reason


def error_of(cohort, restored, name):
    update, exact = restored.matrices[name], cohort.exact(name)
    return np.abs(update.Q @ update.M - exact).max() / max(np.abs(exact).max(), 1e-300)


def test_clear_parts_in_16_bits_are_half_the_bytes_and_cost_a_thousandth():
    whole, half = cohort_of(tiers=(0, 0, 0)), cohort_of(tiers=(0, 0, 0), clear_bits=16)
    sizes = [len(c.updates()[0][0]) for c in (whole, half)]
    values = 2 * (20 + 30 + 12 + 40)  # rank 2; the first shard's two matrices
    assert sizes[0] - sizes[1] == pytest.approx(2 * values, abs=16)
    restored = half.restored()
    for name in half.layout.matrices[0].name, half.layout.matrices[2].name:
        update, exact = restored.matrices[name], half.exact(name)
        assert np.linalg.norm(update.Q @ update.M - exact) < 2**-8 * np.linalg.norm(exact)
    for client in range(len(half.members)):
        with pytest.raises(DomainError, match="does not fit its layout: B of"):
            decode_update(whole.layout, 0, _relabelled(half, whole, client))


def _relabelled(half, whole, client):
    """A 16-bit shard that says it was made for the 32-bit layout."""
    return half.updates()[client][0].replace(half.layout.digest, whole.layout.digest)


def test_directions_beyond_the_limit_are_cut_to_the_best_approximation_of_the_stacked_b():
    limit = 4
    cohort = cohort_of(max_directions=limit)
    contents = cohort.contents()
    restored = cohort.restored(contents)
    for name, part in zip(["layer.0", "layer.1"], contents[0].matrices, strict=True):
        B, A = cohort.stacked(name)
        left, values, _ = np.linalg.svd(B, full_matrices=False)
        best = left[:, :limit] @ left[:, :limit].T @ B @ A
        update = restored.matrices[name]
        assert update.Q.shape[1] == limit
        assert np.abs(update.Q @ update.M - best).max() < 1e-4 * np.abs(best).max()
        assert part.energy_left_out == pytest.approx((values[limit:] ** 2).sum() / (values**2).sum())


def test_a_long_cohort_is_cut_near_the_best_approximation_in_bounded_memory():
    cohort = cohort_of(ranks=(2,) * 12, tiers=(1,) * 12, max_directions=6)
    content = cohort.contents()[0]
    B, _ = cohort.stacked("layer.0")
    values = np.linalg.svd(B, compute_uv=False)
    best = (values[6:] ** 2).sum() / (values**2).sum()
    assert best <= content.matrices[0].energy_left_out < 1.2 * best


def test_within_the_limit_nothing_is_left_out():
    assert {m.energy_left_out for m in cohort_of(max_directions=7).contents()[0].matrices} == {0.0}


@pytest.mark.parametrize("silent", [(0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("max_directions", [64, 3])
def test_clients_whose_b_is_zero_add_nothing_and_cost_no_direction(silent, max_directions):
    cohort = cohort_of(max_directions=max_directions)
    for index in silent:
        for f in cohort.members[index].factors.values():
            f.B[:] = 0
    contents = cohort.contents()
    rank = sum(2 + (i == 1) for i in range(3) if i not in silent)
    assert all(m.Q.shape[1] == min(rank, max_directions) for m in contents[0].matrices)
    restored = cohort.restored(contents)
    if max_directions == 64:
        assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-4
    assert np.abs(restored.tensors["head"] - cohort.mean("head")).max() < 1e-5


def test_an_aggregate_that_is_zero_is_restored_as_zero():
    """Regression: an aggregate without directions was taken to be without encrypted columns."""
    cohort = cohort_of()
    for member in cohort.members:
        for f in member.factors.values():
            f.B[:] = 0
    contents = cohort.contents()
    assert not contents[0].ciphertexts
    for matrix in cohort.layout.matrices:
        update = cohort.restored(contents).matrices[matrix.name]
        assert (update.Q.shape, update.M.shape) == ((matrix.out_features, 0), (0, matrix.in_features))


def test_a_row_of_a_that_is_zero_is_summed():
    cohort = cohort_of()
    for f in cohort.members[1].factors.values():
        f.A[1] = 0
    restored = cohort.restored()
    assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-4


def test_updates_that_lie_in_one_direction_need_one_direction():
    cohort = cohort_of()
    for member in cohort.members:
        for f in member.factors.values():
            f.B[:] = np.linspace(-1, 1, len(f.B), dtype=np.float32)[:, None]
    contents = cohort.contents()
    assert {m.Q.shape[1] for content in contents for m in content.matrices} == {1}
    restored = cohort.restored(contents)
    assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-4


def test_no_row_of_the_result_is_one_client_s():
    """Regression: with Q from Gram-Schmidt in the clients' order the last row was the last client's alone."""
    cohort = cohort_of(ranks=(2, 3, 2), tiers=(2, 2, 2))
    restored = cohort.restored()
    for matrix in cohort.layout.matrices:
        M = restored.matrices[matrix.name].M
        for member in cohort.members:
            A = member.factors[matrix.name].A.astype(np.float64)
            outside = M - (M @ np.linalg.pinv(A)) @ A
            assert (np.linalg.norm(outside, axis=1) > 0.05 * np.linalg.norm(M, axis=1)).all()


def test_the_order_of_clients_changes_neither_q_nor_m():
    """Q and M say what ΔW says: nothing in them depends on who came first."""
    cohort = cohort_of()
    other = replace(cohort, members=cohort.members[::-1])
    for one, two in zip(cohort.contents(), other.contents(), strict=True):
        for a, b in zip(one.matrices, two.matrices, strict=True):
            assert np.abs(a.Q - b.Q).max() < 1e-6
            assert np.abs(a.clear_M - b.clear_M).max() <= 1e-6 * np.abs(a.clear_M).max(initial=1e-30)


def test_without_protection_no_key_is_needed_and_the_result_is_float32_exact():
    cohort = cohort_of(budgets=(), tiers=(0, 0, 0), encrypt_tensors=False, key_id=b"")
    contents = cohort.contents()
    assert all(not content.ciphertexts for content in contents)
    restored = restore(cohort.layout, contents, cohort.orders, None)
    assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-6
    assert np.abs(restored.tensors["head"] - cohort.mean("head")).max() < 1e-7


def test_columns_that_nobody_encrypted_come_back_too():
    """Slots that no ciphertext reached are trivial ciphertexts of the clear sum."""
    cohort = cohort_of(tiers=(0, 0, 0))
    restored = cohort.restored()
    assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-6


SCRIPT = """
import hashlib, pickle, sys
from shelora.lora.aggregate import Contribution, aggregate_shard
layout, updates, members = pickle.load(sys.stdin.buffer)
contributions = [Contribution(str(i), *member) for i, member in enumerate(members)]
for index in range(len(layout.shards)):
    data = aggregate_shard(layout, index, contributions, lambda c: updates[int(c)][index])
    print(hashlib.sha256(data).hexdigest())
"""


def test_the_same_contributions_give_the_same_bytes_here_and_in_another_process():
    import pickle  # noqa: PLC0415 - for this test alone

    cohort = cohort_of()
    updates = cohort.updates()
    digests = [hashlib.sha256(data).hexdigest() for data in cohort.results(updates)]
    assert digests == [hashlib.sha256(data).hexdigest() for data in cohort.results(updates)]
    members = [(m.weight, m.scaling) for m in cohort.members]
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=pickle.dumps((cohort.layout, updates, members)),
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    assert other.stdout.decode().split() == digests


@pytest.mark.parametrize(("max_directions", "passes"), [(64, 2), (3, 3)])
def test_contributions_are_loaded_one_at_a_time_and_let_go(max_directions, passes):
    cohort = cohort_of(max_directions=max_directions)
    updates, loaded = cohort.updates(), []

    class Held(bytes):
        """Counts itself out when nobody holds it any more."""

        alive = 0

        def __del__(self):
            Held.alive -= 1

    def load(client):
        loaded.append(client)
        Held.alive += 1
        assert Held.alive <= 2, "the one before may live until the next one has arrived"
        return Held(updates[int(client)][0])

    cohort.result(0, load)
    assert loaded == ["0", "1", "2"] * passes


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_updates_are_not_aggregated(count):
    cohort = cohort_of()
    alone = replace(cohort, members=cohort.members[:count])
    assert refused(alone.results, cohort.updates()) is Reason.TOO_FEW_CONTRIBUTORS


def test_agents_refuse_to_decrypt_an_aggregate_of_one():
    cohort = cohort_of()
    contents = [replace(content, contributor_count=1) for content in cohort.contents()]
    assert refused(cohort.restored, contents) is Reason.TOO_FEW_CONTRIBUTORS


def test_an_encrypted_result_is_not_restored_without_a_key():
    cohort = cohort_of()
    contents = cohort.contents()
    assert refused(restore, cohort.layout, contents, cohort.orders, None) is Reason.SECRET_UNAVAILABLE


def test_a_stored_shard_of_another_layout_is_refused():
    cohort, other = cohort_of(), cohort_of(max_directions=9)
    assert refused(other.results, cohort.updates()) is Reason.LAYOUT_MISMATCH


def test_a_shard_that_does_not_exist_is_refused():
    cohort = cohort_of()
    assert refused(cohort.result, 9, lambda _: b"") is Reason.SHARD_UNKNOWN


def test_weights_of_very_different_clients_keep_the_small_one_exact():
    """A client of weight 10^-9 beside one of weight 1: its share is exact in proportion to the whole."""
    cohort = cohort_of(ranks=(2, 2), tiers=(2, 2))
    members = tuple(replace(m, weight=w) for m, w in zip(cohort.members, (1 - 1e-9, 1e-9), strict=True))
    cohort = replace(cohort, members=members)
    restored = cohort.restored()
    assert max(error_of(cohort, restored, m.name) for m in cohort.layout.matrices) < 1e-4


def test_a_contribution_scales_its_block_in_float64():
    B = np.full((2, 1), 0.1, dtype=np.float32)
    block = Contribution("a", 0.5, 3.0).block(B)
    assert block.dtype == np.float64
    assert (block == 1.5 * B.astype(np.float64)).all()


def test_results_of_a_shard_do_not_depend_on_the_others():
    cohort = cohort_of()
    updates = cohort.updates()
    alone = cohort.restored([decode_result(cohort.layout, 1, cohort.results(updates)[1])])
    assert list(alone.matrices) == ["layer.2"]
    assert error_of(cohort, alone, "layer.2") < 1e-4


def test_factors_are_not_changed_by_protection():
    cohort = cohort_of()
    before = {n: LoraFactors(f.B.copy(), f.A.copy()) for n, f in cohort.members[0].factors.items()}
    cohort.updates()
    for name, f in cohort.members[0].factors.items():
        assert (f.B == before[name].B).all()
        assert (f.A == before[name].A).all()
