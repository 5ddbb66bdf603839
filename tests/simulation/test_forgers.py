"""Servers that give agents two results of a round: what stops these from growing apart, and where nothing does."""

from pathlib import Path
from unittest import mock

from client_agent.learning import Origin
from tests.simulation.cluster import Size
from tests.simulation.forgers import two_results
from tests.simulation.learner import MarkedLearner
from tests.simulation.simulation import Report, Schedule, run

ROUNDS = 3
VICTIM = "agent-1"


def five(number: int, *, hidden: bool) -> tuple[Report, dict[str, str]]:
    """A run in which the victim is given another result of a round; and what owners read in cards at its end."""
    cards: dict[str, str] = {}

    def saved(learner: MarkedLearner, _folder: Path, made: Origin) -> None:
        cards[learner._client_id] = made.fingerprint

    with (
        two_results({VICTIM}, number, hidden=hidden),
        mock.patch.object(MarkedLearner, "save_adapter", saved),
    ):
        return run(Schedule(0, Size(5, ROUNDS, complete=True), ()), traced=True), cards


def said(report: Report, who: str, what: str) -> list[str]:
    return [line for line in report.trace if line.split()[1] == who and what in line]


def test_an_agent_that_is_shown_another_start_finds_no_committee_and_the_others_leave_it_out():
    """The coordinator lies to it about the round as well, and takes whatever anyone signs."""
    report, cards = five(1, hidden=True)
    assert (report.violation, report.phase) == ("", "FINISHED")
    assert said(report, VICTIM, "evaluated round=fed.de863ee1.1"), "the control: it took the other result"
    (failed,) = said(report, VICTIM, "assignment_failed reason=QUORUM_MISSING")
    assert "have a key and 4 must" in failed
    assert "is not signed by it for this round" in failed
    assert len(said(report, "agent-0", "evaluated")) == ROUNDS
    assert len(set(cards.values())) == 1, "it came back to the others"


def test_not_guaranteed_no_round_follows_the_last_result_so_that_only_its_owners_can_compare():
    report, cards = five(ROUNDS, hidden=False)
    assert (report.violation, report.phase) == ("", "FINISHED")
    assert len(cards) == 5
    others = {fingerprint for name, fingerprint in cards.items() if name != VICTIM}
    assert len(others) == 1
    assert cards[VICTIM] not in others
