import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix
from shelora.negotiation.plan import (
    Plan,
    check_layout,
    check_plan,
    column_orders,
    make_plan,
    open_plan,
    plan_context,
    seal_plan,
    tier_ends,
)
from shelora.obfuscation import Obfuscation

MATRICES = (Matrix("q", 8, 30), Matrix("k", 4, 50), Matrix("v", 4, 20))
TIERS = (0.1, 0.5)
SECRET = bytes(range(32))
KEY = Obfuscation(SECRET, 1).plan_key()
CONTEXT = plan_context("hospital", 3)


def scores_of(seed=0, matrices=MATRICES):
    rng = np.random.default_rng(seed)
    return {m.name: rng.exponential(size=m.in_features) for m in matrices}


SCORES = scores_of()
PLAN = make_plan(SCORES, MATRICES, TIERS)


def message_of(call, *arguments):
    with pytest.raises(DomainError) as refusal:
        call(*arguments)
    assert refusal.value.reason is Reason.PLAN_REFUSED
    return refusal.value.message


@settings(max_examples=60)
@given(values=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.2, 0.7, 3.0]), min_size=1, max_size=9))
def test_every_prefix_of_a_plan_covers_as_much_as_any_set_of_its_size(values):
    matrices = [Matrix("q", 1, len(values))]
    scores = {"q": np.array(values)}
    plan = make_plan(scores, matrices, (1.0,))
    for size in range(1, len(values) + 1):
        best = max(sum(subset) for subset in itertools.combinations(values, size))
        assert scores["q"][plan.columns[:size]].sum() == pytest.approx(best)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    tiers=st.lists(st.floats(0.001, 1), max_size=4, unique=True).map(sorted),
)
def test_a_plan_passes_its_own_check_and_its_counts_add_up(seed, sizes, tiers):
    matrices = [Matrix(f"m{i}", 4, size) for i, size in enumerate(sizes)]
    scores = scores_of(seed, matrices)
    plan = make_plan(scores, matrices, tiers)
    check_plan(plan, scores, matrices, tiers)
    counted = plan.matrices_with_counts(matrices)
    check_layout(plan, counted)
    total = sum(sizes)
    ends = tier_ends(tiers, total)
    assert plan.tier_sizes(total) == np.diff([0, *ends]).tolist()
    assert [sum(m.tier_columns[t] for m in counted) for t in range(len(tiers))] == plan.tier_sizes(total)


@pytest.mark.parametrize(
    ("tier", "total", "end"),
    [
        (0.07, 100, 7),
        (0.1, 30, 3),
        (0.29, 100, 29),
        (0.01, 332_800, 3328),
        (0.001, 5, 1),
        (1.0, 9, 9),
        (0.5, 9, 5),
    ],
)
def test_a_budget_is_its_share_of_columns_rounded_up(tier, total, end):
    """Regression: 0.07 of 100 columns were 8, as float64 makes the product 7.000000000000001."""
    assert tier_ends((tier,), total) == [end]


def test_without_tiers_a_plan_is_empty():
    plan = make_plan(SCORES, MATRICES, ())
    assert len(plan.columns) == 0
    check_plan(plan, SCORES, MATRICES, ())
    assert plan.matrices_with_counts(MATRICES) == MATRICES


def test_ties_go_to_the_column_that_comes_first():
    plan = make_plan({"q": np.array([1.0, 2.0, 2.0, 1.0])}, [Matrix("q", 1, 4)], (1.0,))
    assert plan.columns.tolist() == [1, 2, 0, 3]


def swapped(columns, one, two):
    columns = columns.copy()
    columns[[one, two]] = columns[[two, one]]
    return columns


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (replace(PLAN, tiers=(0.1, 0.6)), "other budgets"),
        (replace(PLAN, tiers=(0.1,)), "other budgets"),
        (replace(PLAN, columns=PLAN.columns[:-1]), "other budgets"),
        (replace(PLAN, columns=np.append(PLAN.columns, np.uint32(99))), "other budgets"),
        (replace(PLAN, columns=np.append(PLAN.columns[:-1], PLAN.columns[0])), "twice"),
        (replace(PLAN, columns=np.append(PLAN.columns[:-1], np.uint32(100))), "does not exist"),
        (replace(PLAN, columns=swapped(PLAN.columns, 9, 10)), "does not rank"),
        (replace(PLAN, columns=PLAN.columns[::-1]), "does not rank"),
        (make_plan({n: -s for n, s in SCORES.items()}, MATRICES, TIERS), "does not rank"),
        (make_plan(scores_of(1), MATRICES, TIERS), "does not rank"),
    ],
)
def test_a_wrong_plan_is_refused(plan, why):
    assert why in message_of(check_plan, plan, SCORES, MATRICES, TIERS)


def test_an_order_within_a_tier_is_the_leader_s_choice():
    check_plan(replace(PLAN, columns=swapped(PLAN.columns, 2, 7)), SCORES, MATRICES, TIERS)


def test_equal_columns_may_be_ranked_either_way():
    """Leaders on other machines may break a tie by the last bit."""
    scores = {m.name: np.ones(m.in_features) for m in MATRICES}
    columns = np.arange(100)[::-1][:50].astype(np.uint32)
    check_plan(Plan(TIERS, columns), scores, MATRICES, TIERS)


@pytest.mark.parametrize("change", [(1, 0), (0, 1), (-1, 1)])
def test_a_layout_with_other_counts_is_refused(change):
    matrices = PLAN.matrices_with_counts(MATRICES)
    counts = tuple(count + c for count, c in zip(matrices[0].tier_columns, change, strict=True))
    wrong = (replace(matrices[0], tier_columns=counts), *matrices[1:])
    assert "counts" in message_of(check_layout, PLAN, wrong)


@pytest.mark.parametrize("epoch", [1, 2])
def test_column_orders_are_permutations_that_put_tier_after_tier(epoch):
    orders = column_orders(PLAN, MATRICES, Obfuscation(SECRET, epoch))
    for matrix, tier in zip(MATRICES, PLAN.split(MATRICES), strict=True):
        order = orders[matrix.name]
        assert (np.sort(order) == np.arange(matrix.in_features)).all()
        assert (np.diff(tier[order]) >= 0).all()
    counted = PLAN.matrices_with_counts(MATRICES)
    assert all(
        (PLAN.split(MATRICES)[i][orders[m.name][: m.protected(1)]] == 0).all() for i, m in enumerate(counted)
    )


def test_without_a_plan_all_columns_are_in_secret_order_and_without_a_secret_in_true_order():
    secret = Obfuscation(SECRET, 1)
    for matrix in MATRICES:
        order = column_orders(None, MATRICES, secret)[matrix.name]
        assert (order == secret.permutation(matrix.name, matrix.in_features)).all()
        assert (column_orders(PLAN, MATRICES, None)[matrix.name] == np.arange(matrix.in_features)).all()


def test_the_order_within_a_tier_tells_nothing_of_the_ranks():
    """A server that saw columns by sensitivity could guess which they are. Seeded; the limit is four deviations."""
    matrices, rng = [Matrix("q", 4, 60)], np.random.default_rng(5)
    correlations = []
    for epoch in range(400):
        scores = {"q": rng.exponential(size=60)}
        plan = make_plan(scores, matrices, (0.5,))
        order = column_orders(plan, matrices, Obfuscation(SECRET, epoch))["q"]
        rank = np.argsort(np.argsort(-scores["q"]))
        correlations += [np.corrcoef(np.arange(30), rank[part])[0, 1] for part in (order[:30], order[30:])]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(29 * len(correlations))
    assert np.std(correlations) == pytest.approx(1 / np.sqrt(29), rel=0.15)


def test_a_sealed_plan_is_opened_by_its_key_in_its_context():
    opened = open_plan(seal_plan(PLAN, KEY, CONTEXT), KEY, CONTEXT)
    assert opened.tiers == PLAN.tiers
    assert opened.columns.dtype == np.uint32
    assert (opened.columns == PLAN.columns).all()


def test_a_plan_without_columns_is_sealed_too():
    opened = open_plan(seal_plan(make_plan(SCORES, MATRICES, ()), KEY, CONTEXT), KEY, CONTEXT)
    assert (opened.tiers, len(opened.columns)) == ((), 0)


def test_the_same_plan_is_never_sealed_the_same_way():
    assert seal_plan(PLAN, KEY, CONTEXT) != seal_plan(PLAN, KEY, CONTEXT)


def test_a_sealed_plan_shows_its_length_only():
    sealed = seal_plan(PLAN, KEY, CONTEXT)
    assert PLAN.columns.tobytes() not in sealed
    assert len(sealed) == len(seal_plan(make_plan(scores_of(9), MATRICES, TIERS), KEY, CONTEXT))


@settings(max_examples=60)
@given(data=st.data())
def test_an_altered_sealed_plan_is_refused(data):
    sealed = bytearray(seal_plan(PLAN, KEY, CONTEXT))
    place = data.draw(st.integers(0, len(sealed) - 1))
    if data.draw(st.booleans()):
        sealed[place] ^= data.draw(st.integers(1, 255))
    else:
        del sealed[place:]
    assert "altered" in message_of(open_plan, bytes(sealed), KEY, CONTEXT)


@pytest.mark.parametrize(
    ("key", "context"),
    [
        (Obfuscation(SECRET, 2).plan_key(), CONTEXT),
        (Obfuscation(bytes(32), 1).plan_key(), CONTEXT),
        (KEY, plan_context("hospital", 4)),
        (KEY, plan_context("clinic", 3)),
    ],
)
def test_a_plan_sealed_for_another_epoch_federation_or_number_is_refused(key, context):
    assert "another federation" in message_of(open_plan, seal_plan(PLAN, KEY, CONTEXT), key, context)


@given(data=st.binary(max_size=80))
def test_random_bytes_are_no_plan(data):
    message_of(open_plan, data, KEY, CONTEXT)


def sealed_content(content):
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - to forge what seal_plan cannot

    return bytes(12) + AESGCM(KEY).encrypt(bytes(12), content, CONTEXT)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "truncated"),
        (b"\x01\0\0\0\0\0\0", "truncated"),
        (b"\x02\0\0\0\0\0\0\0", "format"),
        (b"\x01\0\0\0\x01\0\0\0", "format"),
        (b"\x01\0\0\0\0\0\0\0x", "format"),
    ],
)
def test_a_member_that_seals_nonsense_is_refused(content, why):
    assert why in message_of(open_plan, sealed_content(content), KEY, CONTEXT)


def test_contexts_of_different_federations_and_plans_differ():
    contexts = {plan_context(f, n) for f in ("a", "b", "a/1", "") for n in (1, 11)}
    assert len(contexts) == 8
