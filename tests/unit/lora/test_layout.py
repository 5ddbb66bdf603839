from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks.parameters import INSECURE_TOY, PROFILES, STANDARD
from shelora.ckks.secret import Encryptor
from shelora.errors import DomainError, Reason
from shelora.lora.codec import encode_update
from shelora.lora.kinds import kind_of
from shelora.lora.layout import (
    HARD_CLEAR_BYTES,
    MAX_CHUNKS,
    SOFT_CLEAR_BYTES,
    Layout,
    Matrix,
    Shard,
    Tensor,
    build_layout,
    tiers_reaching,
)
from shelora.lora.protect import protect
from shelora.lora.shards import LoraFactors
from tests.unit.lora.cohorts import TOY_KEY, layout_of, planned
from tests.vectors.make_lora_vectors import golden, golden_layout, sums_layout

KEY_ID = bytes(16)
BASE = Layout(
    parameters="insecure-toy",
    key_id=KEY_ID,
    matrices=(Matrix("q", 8, 12, tier_columns=(2, 4)), Matrix("k", 6, 12, tier_columns=(0, 3))),
    tensors=(Tensor("head", (3, 4), 2.0),),
    tiers=(0.25, 0.5),
    encrypt_tensors=True,
    max_rank=4,
    max_directions=16,
    shards=(Shard(matrices=(0, 1)), Shard(tensors=(0,))),
)


def built(matrices, tensors=(), *, max_rank=8, tiers=(0.01,), parameters=STANDARD.name, **options):
    values = {"key_id": KEY_ID, "encrypt_tensors": True, "max_directions": 64} | options
    return build_layout(
        parameters=parameters, matrices=matrices, tensors=tensors, tiers=tiers, max_rank=max_rank, **values
    )


def clear_bytes(layout, shard):
    return sum(
        4 * layout.max_rank * (layout.matrices[i].out_features + layout.matrices[i].clear)
        for i in shard.matrices
    )


def test_the_published_shapes_at_one_percent_fill_two_chunks():
    layout = built([Matrix(f"m{i}", 3200, 3200, tier_columns=(32,)) for i in range(104)])
    assert [kind_of(shard).chunk_count(layout, shard) for shard in layout.shards] == [1, 1]
    assert kind_of(layout.shards[0]).slot_count(layout, layout.shards[0]) > 0.9 * STANDARD.slots


@settings(max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from([64, 576, 3200, 20000]), st.sampled_from([64, 577, 3200]), st.floats(0, 1)),
        min_size=1,
        max_size=60,
    ),
    rank=st.sampled_from([1, 8, 64]),
)
def test_shards_are_runs_that_keep_their_limits_and_are_not_closed_early(shapes, rank):
    matrices = [
        Matrix(f"m{i}", out, n, tier_columns=(int(share * n),)) for i, (out, n, share) in enumerate(shapes)
    ]
    layout = built(matrices, max_rank=rank)
    assert [i for shard in layout.shards for i in shard.matrices] == list(range(len(matrices)))
    for shard, following in zip(layout.shards, (*layout.shards[1:], None), strict=True):
        if len(shard.matrices) > 1:
            assert clear_bytes(layout, shard) <= HARD_CLEAR_BYTES
            assert kind_of(shard).chunk_count(layout, shard) <= MAX_CHUNKS
        if following is not None:
            joined = Shard((*shard.matrices, following.matrices[0]))
            filled = kind_of(shard).slot_count(layout, shard) % STANDARD.slots / STANDARD.slots
            assert (
                clear_bytes(layout, joined) > HARD_CLEAR_BYTES
                or kind_of(joined).slot_count(layout, joined) > MAX_CHUNKS * STANDARD.slots
                or (clear_bytes(layout, shard) >= SOFT_CLEAR_BYTES and (filled == 0 or filled >= 0.9))
            )


def test_one_matrix_may_pass_every_limit_alone():
    matrices = [Matrix(f"m{i}", 2**20, 2**20, tier_columns=(2**19,)) for i in range(2)]
    assert len(built(matrices, max_rank=64).shards) == 2


def test_tensors_fill_shards_of_their_own():
    tensors = [Tensor(f"t{i}", (20_001,)) for i in range(8)]
    layout = built([Matrix("m", 8, 8, tier_columns=(1,))], tensors)
    assert [shard.tensors for shard in layout.shards] == [(), (0, 1, 2), (3, 4, 5), (6, 7)]
    assert max(kind_of(shard).chunk_count(layout, shard) for shard in layout.shards) <= MAX_CHUNKS


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 90)), min_size=1, max_size=5),
    budgets=st.lists(st.sampled_from([0.1, 0.3, 0.6, 1.0]), max_size=3, unique=True).map(sorted),
    seed=st.integers(0, 100),
)
def test_segments_cover_every_protected_column_once_and_fewer_tiers_are_a_prefix(shapes, budgets, seed):
    matrices, _ = planned(shapes, budgets, seed)
    layout = layout_of(matrices, tiers=budgets)
    shard = layout.shards[0]
    every = kind_of(shard).segments(layout, shard)
    for tiers in range(len(budgets) + 1):
        some = kind_of(shard).segments(layout, shard, tiers)
        assert every[: len(some)] == some
        for item, matrix in enumerate(matrices):
            columns = [c for s in some if s.item == item for c in range(s.column, s.column + s.length)]
            assert columns == list(range(matrix.protected(tiers)))
        assert kind_of(shard).slot_count(layout, shard, tiers) == sum(s.slots for s in some)
        assert kind_of(shard).chunk_count(layout, shard, tiers) == -(
            -kind_of(shard).slot_count(layout, shard, tiers) // INSECURE_TOY.slots
        )
    ends = [0, *(s.slot + s.slots for s in every)]
    assert [s.slot for s in every] == ends[:-1]
    assert all(s.slot % 2 == 0 and s.length > 0 for s in every)


@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 90)), min_size=1, max_size=4),
    budgets=st.lists(st.sampled_from([0.1, 0.6, 1.0]), max_size=3, unique=True).map(sorted),
    tensors=st.lists(st.sampled_from([(), (7,), (9, 9)]), max_size=2),
    rank=st.integers(1, 4),
    encrypted=st.booleans(),
    tiers=st.integers(0, 3),
)
def test_the_byte_limit_bounds_every_update_and_leaves_little_room(
    shapes, budgets, tensors, rank, encrypted, tiers
):
    matrices, orders = planned(shapes, budgets)
    named = [Tensor(f"t{i}", shape) for i, shape in enumerate(tensors)]
    layout = layout_of(matrices, named, tiers=budgets, encrypt_tensors=encrypted, max_rank=rank)
    factors = {
        m.name: LoraFactors(
            np.ones((m.out_features, rank), np.float32), np.ones((rank, m.in_features), np.float32)
        )
        for m in matrices
    }
    values = {t.name: np.ones(t.shape, np.float32) for t in named}
    for content in protect(layout, factors, values, min(tiers, len(budgets)), orders, Encryptor(TOY_KEY)):
        shard = layout.shards[content.shard]
        size = len(encode_update(layout, content))
        assert size <= kind_of(shard).largest_update_bytes(layout, shard, layout.max_rank)
        if content.encrypted_tiers == len(budgets):
            assert kind_of(shard).largest_update_bytes(layout, shard, layout.max_rank) <= 2 * size + 2**17


def test_the_digest_is_the_one_that_was_published():
    assert golden_layout().digest.hex() == golden()["layout_digest"]
    assert sums_layout().digest.hex() == golden()["sums_layout_digest"]


CHANGES = {
    "parameters": st.sampled_from([name for name in PROFILES if name != BASE.parameters]),
    "key_id": st.binary(min_size=16, max_size=16).filter(lambda b: b != KEY_ID),
    "matrices": st.sampled_from(
        [
            (Matrix("q", 8, 12, tier_columns=(2, 4)), Matrix("v", 6, 12, tier_columns=(0, 3))),
            (Matrix("q", 8, 12, tier_columns=(2, 4)), Matrix("k", 7, 12, tier_columns=(0, 3))),
            (Matrix("q", 8, 12, tier_columns=(2, 4)), Matrix("k", 6, 13, tier_columns=(0, 3))),
            (Matrix("q", 8, 12, tier_columns=(2, 4)), Matrix("k", 6, 12, tier_columns=(3, 0))),
            (Matrix("k", 6, 12, tier_columns=(0, 3)), Matrix("q", 8, 12, tier_columns=(2, 4))),
        ]
    ),
    "tensors": st.sampled_from(
        [(Tensor("tail", (3, 4), 2.0),), (Tensor("head", (4, 3), 2.0),), (Tensor("head", (3, 4), 2.5),)]
    ),
    "tiers": st.tuples(st.floats(0.01, 0.4), st.floats(0.41, 1)).filter(lambda t: t != BASE.tiers),
    "encrypt_tensors": st.just(False),
    "max_rank": st.integers(1, 1024).filter(lambda v: v != 4),
    "max_directions": st.integers(1, 2**20).filter(lambda v: v != 16),
    "clear_bits": st.just(16),
    "shards": st.just((Shard(matrices=(0,)), Shard(matrices=(1,)), Shard(tensors=(0,)))),
}


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(sorted(CHANGES)))
def test_every_field_is_in_the_digest(data, name):
    changed = replace(BASE, **{name: data.draw(CHANGES[name])})
    assert changed.digest != BASE.digest
    assert len(changed.digest) == 32


def test_a_digest_does_not_depend_on_how_numbers_are_written():
    """Regression: a budget or bound given as the integer 1 had another digest after a trip through protobuf."""
    whole = replace(BASE, tiers=(0.25, 1), tensors=(Tensor("head", (3, 4), 2),))
    assert whole.digest == replace(BASE, tiers=(0.25, 1.0), tensors=(Tensor("head", (3, 4), 2.0),)).digest


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": "tiny"},
        {"max_rank": 0},
        {"max_rank": 1025},
        {"max_directions": 0},
        {"clear_bits": 8},
        {"tiers": (0.5, 0.25)},
        {"tiers": (0.25, 0.25)},
        {"tiers": (0.0, 0.5)},
        {"tiers": (0.5, 1.5)},
        {"tiers": (float("nan"), 0.5)},
        {"tiers": (0.5,)},
        {"key_id": b""},
        {"key_id": b"short"},
        {
            "key_id": bytes(15),
            "tiers": (),
            "matrices": (),
            "encrypt_tensors": False,
            "shards": (Shard((), (0,)),),
        },
        {"matrices": BASE.matrices[:1]},
        {"matrices": (BASE.matrices[0], BASE.matrices[0])},
        {
            "tensors": (Tensor("head", (1,)), Tensor("head", (2,))),
            "shards": (Shard((0, 1)), Shard((), (0, 1))),
        },
        {"shards": ()},
        {"shards": (Shard((0, 1)),)},
        {"shards": (Shard((1, 0)), Shard((), (0,)))},
        {"shards": (Shard((0,)), Shard((0, 1)), Shard((), (0,)))},
        {"shards": (Shard((0, 1), (0,)),)},
        {"shards": (Shard((0, 1)), Shard((), (0,)), Shard())},
    ],
)
def test_an_invalid_layout_is_refused(change):
    with pytest.raises(DomainError) as refusal:
        replace(BASE, **change)
    assert refusal.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "make",
    [
        lambda: Matrix("", 1, 1),
        lambda: Matrix("m" * 257, 1, 1),
        lambda: Matrix("m", 0, 1),
        lambda: Matrix("m", 1, 0),
        lambda: Matrix("m", 2**20 + 1, 1),
        lambda: Matrix("m", 1, 2**20 + 1),
        lambda: Matrix("m", 1, 4, tier_columns=(3, 2)),
        lambda: Matrix("m", 1, 4, tier_columns=(3, -1)),
        lambda: Tensor("", (1,)),
        lambda: Tensor("t" * 257, (1,)),
        lambda: Tensor("t", (3, 0)),
        lambda: Tensor("t", (2**14, 2**14 + 1)),
        lambda: Tensor("t", (1,) * 9),
        lambda: Tensor("t", (1,), 0.0),
        lambda: Tensor("t", (1,), -1.0),
        lambda: Tensor("t", (1,), float("nan")),
        lambda: Tensor("t", (1,), float("inf")),
        lambda: Tensor("t", (1,), 1e39),
    ],
)
def test_an_invalid_matrix_or_tensor_is_refused(make):
    with pytest.raises(DomainError) as refusal:
        make()
    assert refusal.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("index", [-1, 2, 2**31])
def test_a_shard_that_does_not_exist_is_refused(index):
    with pytest.raises(DomainError) as refusal:
        BASE.shard(index)
    assert refusal.value.reason is Reason.SHARD_UNKNOWN


def test_a_layout_says_whether_it_encrypts():
    bare = replace(BASE, tiers=(), matrices=(Matrix("q", 8, 12), Matrix("k", 6, 12)))
    assert bare.encrypts
    assert not replace(bare, encrypt_tensors=False, key_id=b"").encrypts
    assert not replace(bare, tensors=(), shards=(Shard((0, 1)),), key_id=b"").encrypts
    assert replace(BASE, encrypt_tensors=False).encrypts


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "a\u202eb"])
def test_names_have_no_control_characters(name):
    with pytest.raises(DomainError, match="control characters"):
        Matrix(name, 4, 4)
    with pytest.raises(DomainError, match="control characters"):
        Tensor(name, (4,), 1.0)


@pytest.mark.parametrize(
    ("budget", "count"), [(0.0, 0), (0.05, 1), (0.1, 1), (0.3, 2), (0.5, 2), (0.50001, 3), (1.0, 3)]
)
def test_a_budget_encrypts_the_tiers_that_reach_it(budget, count):
    assert tiers_reaching((0.1, 0.5, 1.0), budget) == count


@pytest.mark.parametrize("tiers", [(), (0.001,), (0.1, 0.999)])
def test_tiers_below_the_budget_are_refused_by_name(tiers):
    with pytest.raises(DomainError, match="this client's budget is 1: nothing was sent") as refused:
        tiers_reaching(tiers, 1.0)
    assert refused.value.reason is Reason.PROTECTION_REFUSED
    assert tiers_reaching(tiers, 0.0) == 0
