"""What any negotiation must do, run over every protocol."""

import numpy as np
import pytest

from shelora.errors import DomainError, Reason
from shelora.negotiation.coverage import coverage, next_weight
from shelora.negotiation.protocol import Stake
from tests.contract.negotiation.protocols import COLUMNS, MATRICES, PROTOCOLS, Client, joined, split


@pytest.fixture(params=sorted(PROTOCOLS))
def negotiate(request):
    return PROTOCOLS[request.param]


def scores(seed: int) -> dict[str, np.ndarray]:
    return split(np.random.default_rng(seed).exponential(size=COLUMNS))


def cohort(count=3) -> list[Client]:
    return [Client(scores(seed)) for seed in range(count)]


def test_all_agents_hold_the_same_plan(negotiate):
    plans = negotiate(cohort(), (0.25, 1.0)).plans
    for plan in plans:
        assert plan.tiers == (0.25, 1.0)
        np.testing.assert_array_equal(plan.columns, plans[0].columns)
    assert sorted(plans[0].columns.tolist()) == list(range(COLUMNS))


TIERS = ((0.05,), (0.3,), (0.05, 0.3), (0.05, 0.3, 0.77))


@pytest.mark.parametrize("tiers", TIERS)
def test_every_budget_is_served_by_a_prefix_of_the_plans_list(negotiate, tiers):
    plan = negotiate(cohort(), tiers).plans[0]
    assert len(set(plan.columns.tolist())) == len(plan.columns)
    assert sum(plan.tier_sizes(COLUMNS)) == len(plan.columns) == int(np.ceil(tiers[-1] * COLUMNS))


@pytest.mark.parametrize("tiers", TIERS)
def test_sealed_votes_give_one_list_whatever_the_budgets(tiers):
    plan, whole = (PROTOCOLS["sealed"](cohort(), t).plans[0] for t in (tiers, (1.0,)))
    np.testing.assert_array_equal(plan.columns, whole.columns[: len(plan.columns)])


def test_clients_that_agree_get_their_own_ranking(negotiate):
    mine = scores(7)
    plan = negotiate([Client(mine, Stake(budget=0.5))] * 3, (0.5,)).plans[0]
    for matrix, tier in zip(MATRICES, plan.split(MATRICES), strict=True):
        covered, count = float(mine[matrix.name][tier == 0].sum()), int((tier == 0).sum())
        assert count > 0
        assert covered == pytest.approx(np.sort(mine[matrix.name])[::-1][:count].sum(), rel=1e-3)


def test_the_size_of_a_clients_activations_does_not_matter(negotiate):
    loud = [Client({name: 1e6 * s for name, s in client.scores.items()}) for client in cohort()[:1]]
    ours, theirs = negotiate(cohort(), (0.5,)), negotiate([*loud, *cohort()[1:]], (0.5,))
    np.testing.assert_array_equal(ours.plans[0].columns, theirs.plans[0].columns)


def test_the_plan_depends_on_the_scores_alone_and_not_on_the_secret_or_the_order_of_votes(negotiate):
    first = negotiate(cohort(), (0.5,), bytes(32)).plans[0]
    other = negotiate(cohort()[::-1], (0.5,), bytes(range(32))).plans[0]
    same = np.isin(first.columns, other.columns).mean()
    assert same > 0.8, "ties and noise may exchange neighbours, no more"


def test_no_score_and_no_true_column_passes_a_server(negotiate):
    clients = cohort()
    negotiated = negotiate(clients, (1.0,), bytes(range(32)))
    seen = b"".join(negotiated.seen)
    values = joined(clients[0].scores)
    for form in ("<f4", "<f8"):
        assert not any(v.astype(form).tobytes() in seen for v in (values, *values / values.sum()))
    columns = negotiated.plans[0].columns
    for k in range(len(columns) - 5):
        assert columns[k : k + 5].astype("<u4").tobytes() not in seen


def test_a_client_without_budget_takes_part(negotiate):
    clients = [*cohort(2), Client(scores(9), Stake(budget=0.0))]
    assert len(negotiate(clients, (0.5, 1.0)).plans) == 3


def test_columns_beyond_all_ballots_complete_the_list(negotiate):
    clients = [Client(scores(seed), Stake(budget=0.1)) for seed in range(2)]
    plan = negotiate(clients, (0.1, 1.0)).plans[0]
    assert sorted(plan.columns.tolist()) == list(range(COLUMNS))


def test_a_heavier_sealed_vote_moves_the_plan_towards_its_client():
    minority, negotiate = scores(50), PROTOCOLS["sealed"]

    def covered(weight: float) -> float:
        clients = [Client(scores(seed), Stake(1.0, 1.0, 16.0)) for seed in range(5)]
        plan = negotiate([*clients, Client(minority, Stake(1.0, weight, 16.0))], (0.25,)).plans[0]
        return coverage(plan, minority, MATRICES, 0.25)

    assert covered(16.0) > covered(1.0)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda s: s.update({MATRICES[0].name: np.ones(3)}), Reason.SHAPE_MISMATCH),
        (lambda s: s[MATRICES[0].name].__setitem__(0, np.nan), Reason.VALUE_NOT_FINITE),
        (lambda s: s[MATRICES[0].name].__setitem__(0, -1.0), Reason.VALUE_OUT_OF_RANGE),
    ],
)
def test_scores_that_are_none_are_refused_by_name(negotiate, damage, reason):
    damaged = scores(0)
    damage(damaged)
    with pytest.raises(DomainError, match=r"layer\.0\.query") as refused:
        negotiate([Client(damaged), *cohort(2)], (1.0,))
    assert refused.value.reason is reason


FLOOR, LARGEST, BUDGET = 0.6, 16.0, 0.5


def two_worlds(minority_columns: int = 8) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sensitivity of a majority, and of a minority in columns that nobody else looks at.

    There is room for both: the majority has 12 columns that matter and others that matter half as much.
    """
    rng = np.random.default_rng(3)
    many, few = rng.uniform(2.5, 3.5, COLUMNS), rng.uniform(0, 0.02, COLUMNS)
    many[:12] += 3
    many[-minority_columns:] = 0.001
    few[-minority_columns:] += rng.uniform(5, 6, minority_columns)
    return split(many), split(few)


def coverages(negotiate, votes: int) -> list[tuple[float, float, float]]:
    """(minority's coverage, a majority client's coverage, minority's weight) after every vote."""
    many, few = two_worlds()
    own = [many] * 9 + [few]
    weights, history = [1.0] * len(own), []
    for _ in range(votes):
        clients = [Client(s, Stake(BUDGET, w, LARGEST)) for s, w in zip(own, weights, strict=True)]
        plan = negotiate(clients, (BUDGET,)).plans[0]
        covered = [coverage(plan, s, MATRICES, BUDGET) for s in own]
        weights = [next_weight(w, c, FLOOR, LARGEST) for w, c in zip(weights, covered, strict=True)]
        history.append((covered[-1], covered[0], weights[-1]))
    return history


def test_a_minority_is_lifted_over_the_floor_while_budget_remains():
    history = coverages(PROTOCOLS["sealed"], votes=8)
    lifted = next(i for i, (minority, _, _) in enumerate(history) if minority >= FLOOR)
    for minority, majority, weight in history[lifted:]:
        assert minority >= FLOOR
        assert majority >= FLOOR
        assert 1 <= weight <= LARGEST


def test_sealed_votes_of_equal_weight_would_leave_that_minority_below_the_floor():
    assert coverages(PROTOCOLS["sealed"], votes=1)[0][0] < FLOOR / 10


@pytest.mark.parametrize("protocol", ["ope", "ope-refined"])
def test_ballots_serve_that_minority_at_once_whatever_its_weight(protocol):
    for minority, majority, _ in coverages(PROTOCOLS[protocol], votes=3):
        assert min(minority, majority) > 0.4
