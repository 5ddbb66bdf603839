"""How a plan serves this client: what its next vote weighs, and what it reports of drift.

The coverage and the weight stay here; only the weight's effect on an encrypted (or order-preserved) vote leaves.
"""

import structlog

from client_agent.learning import LocalLearner
from client_agent.progress import Activity
from client_agent.state import AgentState, PlanFit
from shelora.federation import ProtectionSpec
from shelora.negotiation.coverage import coverage, drift_report, next_weight, overlap
from shelora.negotiation.plan import Plan
from shelora.negotiation.protocol import Stake

_log = structlog.get_logger(__name__)


def stake_of(fit: PlanFit, protection: ProtectionSpec, budget: float) -> Stake:
    """What this client brings to a vote."""
    largest = protection.largest_vote
    return Stake(budget, min(max(fit.weight, 1.0), largest), largest)


def assess(
    state: AgentState,
    learner: LocalLearner,
    plan: Plan,
    vote_round_id: str,
    *,
    floor: float,
    largest: float,
    budget: float,
    reports_drift: bool,
    activity: Activity,
) -> float | None:
    """Measures how a new plan fits this client, once. Returns what it reports of drift, None if it is not asked.

    Args: vote_round_id: Identifies the vote behind the plan, so that a repeated round moves no weight twice.
    Raises: Stopped.
    """
    fit = state.plan_fit()
    new = fit.vote_round_id != vote_round_id
    if not (reports_drift or (floor and new)):
        return None
    scores, matrices = learner.score(activity), learner.model.matrices
    present = overlap(plan, scores, matrices, budget)
    if new:
        covered = coverage(plan, scores, matrices, budget)
        weight = next_weight(fit.weight, covered, floor, largest)
        fit = PlanFit(vote_round_id, weight, present)
        state.save_plan_fit(fit)
        _log.info("plan_assessed", coverage=covered, floor=floor, next_vote_weight=weight)
    return drift_report(present, fit.fresh_overlap) if reports_drift else None
