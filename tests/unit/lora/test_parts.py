"""A shard aggregated in parts is the shard aggregated by one worker."""

import io

import numpy as np
import pytest

from shelora.additive.adder import Adder
from shelora.additive.parameters import INSECURE_TOY
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.additive.wire import HEADER_BYTES, ShardShape
from shelora.errors import DomainError, Reason
from shelora.lora import parts
from shelora.lora.aggregate import Aggregation
from shelora.lora.arrays import pack, unpack
from shelora.lora.codec import decode_result
from tests.unit.lora.cohorts import layout_of
from tests.unit.lora.test_aggregate import SHAPES, cohort_of, planned, refused

RANKS = (2, 3, 2, 1, 4, 2, 3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_RUN", 2)


def work(cohort, index, updates):
    return Aggregation(
        cohort.layout, index, cohort.contributions(), lambda client: updates[int(client)][index]
    )


def shared(cohort, index, updates, own):
    """The result if the leader makes the parts in `own`, and others, one each, all the others."""
    leader = work(cohort, index, updates)
    common = leader.common()
    total = leader.sum(common)
    for part in range(leader.parts):
        if part in own:
            leader.add(total, part)
    for part in set(range(leader.parts)) - set(own):
        helper = work(cohort, index, updates)
        partial = helper.sum(common)
        helper.add(partial, part)
        total.merge(partial.partial())
    return leader.finished(total)


@pytest.mark.parametrize("own", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(
    ("tiers", "changes"),
    [
        ((2,) * 7, {"max_directions": 64}),
        ((2,) * 7, {"max_directions": 6}),
        ((0, 1, 2, 0, 1, 2, 2), {"max_directions": 6}),
        ((0,) * 7, {"max_directions": 6, "encrypt_tensors": False, "clear_bits": 16}),
    ],
    ids=["exact", "cut", "some clear", "clear"],
)
def test_whoever_makes_which_part_the_result_is_the_same(tiers, changes, own):
    cohort = cohort_of(RANKS, tiers=tiers, **changes)
    updates = cohort.updates()
    for index in range(len(cohort.layout.shards)):
        assert work(cohort, index, updates).parts == 3
        whole = decode_result(cohort.layout, index, work(cohort, index, updates).whole())
        found = decode_result(cohort.layout, index, shared(cohort, index, updates, own))
        if 0 not in tiers:
            assert bytes(found.ciphertexts) == bytes(whole.ciphertexts)
        assert len(found.ciphertexts) == len(whole.ciphertexts)
        assert found.contributor_count == whole.contributor_count == len(RANKS)
        for one, other in zip(found.matrices, whole.matrices, strict=True):
            assert (one.Q == other.Q).all()
            assert (one.row_exponents, one.energy_left_out) == (other.row_exponents, other.energy_left_out)
            np.testing.assert_allclose(one.clear_M, other.clear_M, rtol=1e-5, atol=1e-9)
        for one, other in zip(found.clear_tensors, whole.clear_tensors, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)
    whole, found = (
        cohort.restored([decode_result(cohort.layout, i, data) for i, data in enumerate(results)])
        for results in (
            [work(cohort, index, updates).whole() for index in range(len(cohort.layout.shards))],
            [shared(cohort, index, updates, own) for index in range(len(cohort.layout.shards))],
        )
    )
    for name, update in found.matrices.items():
        wanted = whole.matrices[name].M
        np.testing.assert_allclose(update.M, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_sums_of_sums_are_the_sum_to_the_last_byte():
    shape = ShardShape(INSECURE_TOY, 0, 300)
    summands = []
    for number in range(5):
        encryption = SecretKey.draw(INSECURE_TOY, Csprng.fresh()).encryption(bytes(32), 8, Csprng.fresh())
        summands.append(encryption.encrypt(np.full(300, number / 10)))
    whole, total, other = Adder(shape), Adder(shape), Adder(shape)
    for number, data in enumerate(summands):
        whole.add(data)
        (total if number < 3 else other).add(data)
    partial = other.finish()
    total.merge(partial)
    assert (total.finish(), total.contributors) == (whole.finish(), 5)
    for data, reason in (
        (summands[0], Reason.CIPHERTEXT_WRONG_SHAPE),
        (partial[:-1], Reason.CIPHERTEXT_TRUNCATED),
        (partial[: HEADER_BYTES - 1], Reason.CIPHERTEXT_TRUNCATED),
        (b"XXXX" + partial[4:], Reason.CIPHERTEXT_MALFORMED),
    ):
        assert refused(total.merge, data) is reason


def test_what_is_no_partial_sum_of_this_aggregation_is_refused():
    cohort = cohort_of(RANKS, tiers=(2,) * 7, max_directions=6)
    updates = cohort.updates()
    one, other = (work(cohort, index, updates) for index in (0, 1))
    total, foreign = one.sum(one.common()), other.sum(other.common())
    other.add(foreign, 0)
    arrays = unpack(foreign.partial())
    for data in (b"", b"PK\x03\x04 no archive", pack({}), pack(arrays), pack({"0.M": np.zeros(3)})):
        assert refused(total.merge, data) in {
            Reason.SHARD_MALFORMED,
            Reason.SHAPE_MISMATCH,
            Reason.CIPHERTEXT_WRONG_SHAPE,
        }
    with pytest.raises(DomainError, match="cannot be read"):
        unpack(_pickled())


def _pickled():
    """An archive as `np.savez` writes objects: reading it would run what they name."""
    buffer = io.BytesIO()
    np.savez(buffer, evil=np.array([{}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize("contributors", [2, 7, 8, 16, 100, 10_000])
def test_parts_hold_every_contributor_once(contributors, monkeypatch):
    monkeypatch.setattr(parts, "LEAST_RUN", 8)
    matrices, _ = planned(SHAPES, (0.2,))
    count = parts.part_count(layout_of(matrices, tiers=(0.2,)), 0, contributors)
    runs = [range(contributors)[parts.run_of(part, count, contributors)] for part in range(count)]
    assert [i for run in runs for i in run] == list(range(contributors))
    assert count == 1 or min(map(len, runs)) >= 8
    assert count <= parts.MOST_PARTS


def test_a_shard_of_large_sums_is_not_cut_in_more_than_fit(monkeypatch):
    matrices, _ = planned(SHAPES, (0.2,))
    layout = layout_of(matrices, tiers=(0.2,))
    monkeypatch.setattr(parts, "MOST_PARTIAL_BYTES", 1000)
    assert parts.part_count(layout, 0, 1000) == 1
