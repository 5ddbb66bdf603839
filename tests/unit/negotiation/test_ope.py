import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix
from shelora.negotiation.ballots import MAX_VALUE, Ballot, Tally, ballot_bytes
from shelora.negotiation.ope import LEVELS, Ope, quantize
from shelora.negotiation.protocol import Stake
from shelora.negotiation.ranking import Ranking
from shelora.obfuscation import Obfuscation

SECRETS = st.binary(min_size=32, max_size=32)
VOTES = st.text(min_size=1, max_size=20)


@given(SECRETS, VOTES, st.integers(1, 500))
def test_the_keyed_function_is_strictly_increasing(secret, vote, levels):
    values = Obfuscation(secret, 1).increasing(vote, levels)
    assert len(values) == levels
    assert (values[1:] > values[:-1]).all()
    assert values[0] > 0


def test_the_keyed_function_of_all_levels_fits_a_ballot():
    assert Obfuscation(bytes(32), 1).increasing("fed.1", LEVELS)[-1] <= MAX_VALUE


@given(SECRETS, SECRETS, VOTES, VOTES)
def test_secret_and_vote_both_change_the_function_and_the_labels(secret, other_secret, vote, other_vote):
    def drawn(key, name):
        keyed = Obfuscation(key, 1)
        return keyed.increasing(name, 64).tolist(), keyed.labels(name, "m", 64).tolist()

    assert drawn(secret, vote) == drawn(secret, vote)
    for different in ((other_secret, vote), (secret, other_vote)):
        if different != (secret, vote):
            values, labels = drawn(*different)
            assert values != drawn(secret, vote)[0]
            assert labels != drawn(secret, vote)[1]


def test_the_keyed_function_is_far_from_a_straight_line():
    x = np.arange(LEVELS)
    curves = [
        Obfuscation(bytes([i]) * 32, 1).increasing("fed.1", LEVELS).astype(np.float64) for i in range(8)
    ]
    deviations = [np.abs(y / y[-1] - x / LEVELS).max() for y in curves]
    assert np.median(deviations) > 0.1


def test_vote_and_matrix_names_cannot_be_shifted_into_one_another():
    keyed = Obfuscation(bytes(32), 1)
    assert keyed.labels("a", "b/c", 64).tolist() != keyed.labels("a/b", "c", 64).tolist()


def test_labels_are_no_column_order():
    keyed = Obfuscation(bytes(32), 1)
    assert keyed.labels("fed.1", "m", 64).tolist() != keyed.permutation("m", 64).tolist()


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_quantizing_keeps_the_order(values):
    levels = quantize(np.sort(values))
    assert (np.diff(levels) >= 0).all()
    assert levels.min() >= 0
    assert levels.max() < LEVELS


@st.composite
def elections(draw):
    matrices = [
        Matrix(f"m{i}", 4, n)
        for i, n in enumerate(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    ]
    seed = draw(st.integers(0, 2**32 - 1))
    budgets = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=5))
    return matrices, seed, budgets


def cast(matrices, seed, budgets):
    rng = np.random.default_rng(seed)
    negotiator = Ope(matrices, Obfuscation(bytes(32), 1), "fed.1")
    all_scores = [{m.name: rng.exponential(size=m.in_features) for m in matrices} for _ in budgets]
    return [negotiator.cast(s, Stake(budget=b)) for s, b in zip(all_scores, budgets, strict=True)]


def ranked(matrices, ballots, tiers, **how) -> Ranking:
    tally = Tally([m.in_features for m in matrices])
    for ballot in ballots:
        tally.add(ballot)
    return tally.rank(tiers, **how)


@pytest.mark.parametrize("refine", [False, True])
def test_the_ranking_is_the_same_whatever_order_ballots_come_in(refine):
    matrices, seed, budgets = [Matrix("a", 4, 30), Matrix("b", 4, 7)], 5, [0.1, 0.5, 0.5, 1.0]
    ballots, total = cast(matrices, seed, budgets), sum(m.in_features for m in matrices)
    first = ranked(matrices, ballots, (0.5, 1.0), refine=refine).columns
    again = ranked(matrices, ballots[::-1], (0.5, 1.0), refine=refine).columns
    np.testing.assert_array_equal(first, again)
    assert sorted(first.tolist()) == list(range(total))


@pytest.mark.parametrize(("weight", "first"), [(1.0, [0, 1]), (0.0, [1, 2])])
def test_a_fixed_weight_of_one_gives_common_alone_and_of_zero_sensitivity(weight, first):
    ballots = [
        Ballot(np.array([0, 1], np.uint32), np.array([5, 9], np.uint64)),
        Ballot(np.array([0, 2], np.uint32), np.array([4, 7], np.uint64)),
    ]
    ranking = ranked([Matrix("m", 4, 4)], ballots, (0.5, 1.0), common_weight=weight)
    assert ranking.columns[:2].tolist() == first


def test_without_ballots_labels_follow_by_number():
    assert ranked([Matrix("m", 4, 4)], [], (0.5,)).columns.tolist() == [0, 1]


@given(elections())
def test_a_ballot_survives_the_wire_at_the_announced_size(election):
    matrices, seed, budgets = election
    total = sum(m.in_features for m in matrices)
    for ballot in cast(matrices, seed, budgets):
        data = ballot.encode()
        assert len(data) == ballot_bytes(len(ballot.labels))
        decoded = Ballot.decode(data, total, total)
        np.testing.assert_array_equal(decoded.labels, ballot.labels)
        np.testing.assert_array_equal(decoded.values, ballot.values)


def reason_of(decode) -> Reason | None:
    """Why it refuses; None if it does not."""
    try:
        decode()
    except DomainError as error:
        return error.reason
    return None


@given(st.binary(max_size=80))
def test_any_bytes_are_a_ballot_or_refused_by_name(data):
    if reason_of(lambda: Ballot.decode(data, 10, 10)) is not Reason.BALLOT_REFUSED:
        assert Ballot.decode(data, 10, 10).encode() == data


@given(st.binary(max_size=80))
def test_any_bytes_are_a_ranking_or_refused_by_name(data):
    assert reason_of(lambda: Ranking.decode(data).require_fit(10, (0.5,))) in {None, Reason.PLAN_REFUSED}


@pytest.mark.parametrize(
    ("labels", "values"),
    [([1, 1], [1, 2]), ([2, 1], [1, 2]), ([1, 10], [1, 2]), ([1, 2, 3, 4], [1] * 4), ([1], [2**63])],
)
def test_a_ballot_of_wrong_labels_values_or_size_is_refused(labels, values):
    data = Ballot(np.array(labels, np.uint32), np.array(values, np.uint64)).encode()
    with pytest.raises(DomainError) as refused:
        Ballot.decode(data, total=10, most=3)
    assert refused.value.reason is Reason.BALLOT_REFUSED


@pytest.mark.parametrize("columns", [[0, 0], [0, 9], [0], [0, 1, 2]])
def test_a_ranking_that_does_not_fit_is_refused(columns):
    negotiator = Ope([Matrix("m", 4, 4)], Obfuscation(bytes(32), 1), "fed.1")
    with pytest.raises(DomainError) as refused:
        negotiator.plan(Ranking((0.5,), np.array(columns, np.uint32)), (0.5,))
    assert refused.value.reason is Reason.PLAN_REFUSED
