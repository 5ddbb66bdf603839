"""Servers that give agents two results of a round: what stops these from growing apart, and where nothing does."""

from tests.simulation.cluster import Size
from tests.simulation.forgers import two_results
from tests.simulation.simulation import Report, Schedule, run

ROUNDS = 3
VICTIM = "agent-1"


def five(number: int, *, hidden: bool) -> Report:
    with two_results({VICTIM}, number, hidden=hidden):
        return run(Schedule(0, Size(5, ROUNDS, complete=True), ()), traced=True)


def said(report: Report, who: str, what: str) -> list[str]:
    return [line for line in report.trace if line.split()[1] == who and what in line]


def fingerprints(report: Report) -> dict[str, str]:
    """By agent, what its owner reads of the last result."""
    saved = [line.split() for line in report.trace if "adapter_saved" in line]
    return {words[1]: words[-1] for words in saved}


def test_an_agent_that_is_given_another_result_refuses_it_and_the_round_that_starts_from_it():
    """The control is the next test: this other result opens."""
    report = five(1, hidden=False)
    assert not said(report, VICTIM, "evaluated"), "it did not apply it"
    why = (
        "COMMITTEE_REFUSED, 'the round is refused: it starts from another result than this client was given'"
    )
    assert report.violation == f"{VICTIM} ended with DomainError({why})"


def test_an_agent_that_is_shown_another_start_finds_no_committee_and_the_others_leave_it_out():
    """The coordinator lies to it about the round as well, and takes whatever anyone signs."""
    report = five(1, hidden=True)
    assert (report.violation, report.phase) == ("", "FINISHED")
    assert said(report, VICTIM, "evaluated round=fed.de863ee1.1"), "the control: it took the other result"
    (failed,) = said(report, VICTIM, "assignment_failed reason=QUORUM_MISSING")
    assert "have a key and 4 must" in failed
    assert "is not signed by it for this round" in failed
    assert len(said(report, "agent-0", "evaluated")) == ROUNDS
    assert len(set(fingerprints(report).values())) == 1, "it came back to the others"


def test_not_guaranteed_no_round_follows_the_last_result_so_that_only_its_owners_can_compare():
    report = five(ROUNDS, hidden=False)
    assert (report.violation, report.phase) == ("", "FINISHED")
    found = fingerprints(report)
    assert len(found) == 5
    others = {print_ for name, print_ in found.items() if name != VICTIM}
    assert len(others) == 1
    assert found[VICTIM] not in others
