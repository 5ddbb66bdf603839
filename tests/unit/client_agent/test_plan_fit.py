from types import SimpleNamespace

import numpy as np

from client_agent.plan_fit import assess, stake_of
from client_agent.progress import Activity
from client_agent.state import AgentState, PlanFit
from shelora.federation import ProtectionSpec
from shelora.lora.layout import Matrix
from shelora.negotiation.plan import Plan

MATRICES = (Matrix("m", 4, 8),)
OWN = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])


class Scorer:
    """A learner that only scores."""

    model = SimpleNamespace(matrices=MATRICES)

    def __init__(self, scores=OWN) -> None:
        self.scores = scores
        self.passes = 0

    def score(self, _activity):
        self.passes += 1
        return {"m": self.scores}


def plan(*columns: int) -> Plan:
    return Plan((0.25,), np.array(columns, np.uint32))


def assessed(state, learner, of, vote="fed.1", *, floor=0.8, drift=True):
    return assess(
        state,
        learner,
        of,
        vote,
        floor=floor,
        largest=8.0,
        budget=0.25,
        reports_drift=drift,
        activity=Activity(),
    )


def test_a_plan_that_covers_too_little_makes_the_next_vote_heavier_and_one_vote_counts_once(state):
    assert state.plan_fit() == PlanFit()
    assessed(state, Scorer(), plan(6, 7))
    weight = state.plan_fit().weight
    assert 1 < weight <= 4
    assessed(state, Scorer(), plan(6, 7))
    assert state.plan_fit().weight == weight
    assessed(state, Scorer(), plan(6, 7), "fed.5")
    assert state.plan_fit().weight > weight


def test_a_new_plan_reports_no_drift_however_badly_it_serves(state):
    assert assessed(state, Scorer(), plan(0, 7)) == 1
    assert state.plan_fit().fresh_overlap == 0.5


def test_drift_is_the_loss_of_overlap_since_the_plan_was_new(state):
    assert assessed(state, Scorer(), plan(0, 1)) == 1
    assert assessed(state, Scorer(OWN[[1, 2, 0, 3, 4, 5, 6, 7]]), plan(0, 1)) == 0.5
    assert assessed(state, Scorer(OWN[::-1]), plan(0, 1)) == 0
    assert assessed(state, Scorer(OWN[::-1]), plan(7, 6), "fed.7") == 1


def test_nothing_is_scored_that_nobody_asks_for(state):
    learner = Scorer()
    assert assessed(state, learner, plan(0, 1), floor=0.0, drift=False) is None
    assert learner.passes == 0
    assert assessed(state, learner, plan(0, 1), drift=False) is None
    assert assessed(state, learner, plan(0, 1), drift=False) is None
    assert learner.passes == 1, "once a plan"


def test_a_plan_fit_survives_a_restart_and_a_damaged_one_is_that_of_a_new_client(state, tmp_path):
    kept = PlanFit("fed.3", 2.5, 0.75)
    state.save_plan_fit(kept)
    state.close()
    again = AgentState(tmp_path / "state")
    assert again.plan_fit() == kept
    path = tmp_path / "state" / "plan_fit.json"
    assert path.stat().st_mode & 0o777 == 0o600
    for damage in (b"", b"[]", b'{"format": 1}', b'{"format": 2, "weight": 3}'):
        path.write_bytes(damage)
        assert again.plan_fit() == PlanFit()
    state._lock = again._lock


def test_a_stake_stays_within_what_the_federation_allows():
    allowed = ProtectionSpec(coverage_floor=0.5, max_vote_weight=4.0)
    assert stake_of(PlanFit(weight=2.0), allowed, 0.5).weight == 2
    assert stake_of(PlanFit(weight=64.0), allowed, 0.5).weight == 4
    assert stake_of(PlanFit(weight=0.1), allowed, 0.5).weight == 1
    without = stake_of(PlanFit(weight=3.0), ProtectionSpec(), 0.5)
    assert (without.weight, without.largest) == (1, 1)
