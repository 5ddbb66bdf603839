import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Matrix
from shelora.lora.protect import protect
from shelora.lora.restore import restore
from shelora.negotiation.plan import check_plan, make_plan
from shelora.negotiation.votes import cast_votes, summed_scores, vote_bound, vote_layout
from tests.unit.lora.cohorts import TOY_KEY

MATRICES = (Matrix("q", 8, 300), Matrix("k", 8, 1000), Matrix("v", 4, 7))
TOTAL = 1307


def vote_sum(key, votes, matrices=MATRICES):
    """The votes of several clients, summed under encryption as aggregation does it."""
    layout = vote_layout(matrices, key.parameters.name, key.key_id)
    updates = []
    for vote in votes:
        contents = protect(layout, {}, vote, 0, {}, Encryptor(key))
        updates.append([encode_update(layout, content) for content in contents])
        for index, data in enumerate(updates[-1]):
            validate_update(layout, index, data)
    contributions = [Contribution(str(i), 1 / len(votes)) for i in range(len(votes))]
    results = []
    for index in range(len(layout.shards)):
        data = aggregate_shard(layout, index, contributions, lambda c, i=index: updates[int(c)][i])
        results.append(decode_result(layout, index, data))
    return summed_scores(matrices, restore(layout, results, {}, Decryptor(key)).tensors)


def joined(values):
    return np.concatenate([values[m.name] for m in MATRICES])


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([0.3, 1.0, 5.0]),
    size=st.sampled_from([5e-324, 1e-300, 1e-6, 1.0, 1e300]),
)
def test_every_client_has_one_vote_whatever_the_size_of_its_activations(seed, shape, size):
    rng = np.random.default_rng(seed)
    relative = {m.name: rng.gamma(shape, size=m.in_features) for m in MATRICES}
    scores = {name: np.minimum(values, 5) * size for name, values in relative.items()}
    votes = cast_votes(MATRICES, scores)
    assert all(vote.dtype == np.float32 and (vote >= 0).all() for vote in votes.values())
    assert joined(votes).sum(dtype=np.float64) == pytest.approx(1, rel=1e-5)


def test_votes_are_in_proportion_to_scores():
    scores = {m.name: np.arange(1.0, m.in_features + 1) for m in MATRICES}
    votes, total = cast_votes(MATRICES, scores), joined(scores).sum()
    assert joined(votes) == pytest.approx(joined(scores) / total, rel=1e-6)


def test_scores_whose_sum_passes_float64_are_normalized():
    """Regression: the sum overflowed and every vote became zero."""
    scores = {m.name: np.full(m.in_features, 1e308) for m in MATRICES}
    assert joined(cast_votes(MATRICES, scores)) == pytest.approx(1 / TOTAL)


def test_a_client_without_any_sensitivity_votes_evenly():
    votes = cast_votes(MATRICES, {m.name: np.zeros(m.in_features) for m in MATRICES})
    assert (joined(votes) == np.float32(1 / TOTAL)).all()


def test_one_column_with_all_the_sensitivity_is_cut_at_the_bound_and_encrypted():
    """Regression: where float32 rounds the bound up, the encryptor refused the vote."""
    matrices = (Matrix("q", 8, 1000),)
    scores = {"q": np.zeros(1000)}
    scores["q"][17] = 1
    assert float(np.float32(vote_bound(matrices))) > vote_bound(matrices)
    votes = cast_votes(matrices, scores)
    assert votes["q"].max() == np.float32(vote_bound(matrices))
    summed = vote_sum(TOY_KEY, [votes, votes], matrices)
    assert summed["q"].argmax() == 17


@pytest.mark.parametrize(("columns", "bound"), [(1, 1.0), (256, 1.0), (512, 0.5), (2**20, 2.0**-12)])
def test_the_bound_is_so_many_even_votes_and_at_most_one(columns, bound):
    assert vote_bound([Matrix("q", 1, columns)]) == bound


def test_the_layout_of_a_vote_holds_encrypted_vectors_only():
    layout = vote_layout(MATRICES, TOY_KEY.parameters.name, TOY_KEY.key_id)
    assert layout.encrypt_tensors
    assert not layout.matrices
    assert [(t.name, t.shape) for t in layout.tensors] == [(m.name, (m.in_features,)) for m in MATRICES]


def test_votes_summed_under_encryption_rank_columns_as_the_clear_sum_does():
    rng = np.random.default_rng(1)
    key = SecretKey.generate(STANDARD)
    votes = [
        cast_votes(MATRICES, {m.name: rng.gamma(0.5, size=m.in_features) for m in MATRICES}) for _ in range(5)
    ]
    summed = joined(vote_sum(key, votes))
    exact = np.mean([joined(vote) for vote in votes], axis=0, dtype=np.float64)
    noise = np.abs(summed - exact).max()
    assert noise < 1e-3 / TOTAL
    ranking = np.argsort(-summed, kind="stable")
    assert (np.diff(exact[ranking]) <= 2 * noise).all()
    distinct = np.flatnonzero(np.abs(np.diff(np.sort(exact))) > 2 * noise)
    assert len(distinct) > TOTAL / 3


def test_a_plan_from_encrypted_votes_is_accepted_by_every_agent():
    rng = np.random.default_rng(2)
    votes = [
        cast_votes(MATRICES, {m.name: rng.exponential(size=m.in_features) for m in MATRICES})
        for _ in range(3)
    ]
    summed = vote_sum(TOY_KEY, votes)
    plan = make_plan(summed, MATRICES, (0.05, 0.4))
    check_plan(plan, summed, MATRICES, (0.05, 0.4))
    exact = np.mean([joined(vote) for vote in votes], axis=0, dtype=np.float64)
    best = np.sort(exact)[::-1][: len(plan.columns)].sum()
    assert exact[plan.columns].sum() > 0.999 * best


def test_noise_below_zero_becomes_zero():
    assert (summed_scores([Matrix("q", 1, 2)], {"q": np.float32([-1e-9, 0.5])})["q"] == [0, 0.5]).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.SHAPE_MISMATCH),
        (np.zeros(999), Reason.SHAPE_MISMATCH),
        (np.full(1000, np.nan), Reason.VALUE_NOT_FINITE),
        (np.full(1000, np.inf), Reason.VALUE_NOT_FINITE),
        (np.full(1000, -1e-9), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_unusable_scores_are_refused_by_the_name_of_their_matrix(value, reason):
    scores = {m.name: np.ones(m.in_features) for m in MATRICES} | {"k": value}
    with pytest.raises(DomainError) as refusal:
        cast_votes(MATRICES, scores)
    assert refusal.value.reason is reason
    assert "k" in refusal.value.message.split()
