import pytest

from coordinator.assignments import Finish, Halt, MakePlan, Train, Vote, Wait, assignment_for
from coordinator.records import Phase
from shelora.rounds import RoundKind, RoundState
from tests.unit.coordinator.records import NEGOTIATION, PLAN, a_round, federation, ticket

TRAINING = federation(ticket=ticket(plan=PLAN), plan=PLAN, sequence=2)
VOTING = federation(ticket=ticket(RoundKind.VOTE), sequence=2)


@pytest.mark.parametrize(
    ("record", "round_", "client", "committed", "expected"),
    [
        (federation(phase=Phase.CREATED), None, "a", False, Wait),
        (federation(), None, "a", False, Wait),
        (federation(phase=Phase.FINISHED, result_sequence=3, sequence=3), None, "a", False, Finish),
        (federation(phase=Phase.FAILED, failure="why"), None, "a", False, Halt),
        (federation(negotiation=NEGOTIATION, sequence=1), None, "a", False, MakePlan),
        (federation(negotiation=NEGOTIATION, sequence=1), None, "b", False, Wait),
        (TRAINING, None, "a", False, Wait),
        (TRAINING, a_round(RoundState.SELECTING), "a", False, Wait),
        (TRAINING, a_round(), "a", False, Train),
        (TRAINING, a_round(), "a", True, Wait),
        (TRAINING, a_round(), "stranger", False, Wait),
        (TRAINING, a_round(RoundState.AGGREGATING), "a", False, Wait),
        (TRAINING, a_round(RoundState.PUBLISHED), "a", True, Wait),
        (TRAINING, a_round(RoundState.ABANDONED), "a", False, Wait),
        (VOTING, a_round(kind=RoundKind.VOTE), "a", False, Vote),
        (VOTING, a_round(kind=RoundKind.VOTE), "a", True, Wait),
    ],
)
def test_every_phase_gives_each_member_its_work(record, round_, client, committed, expected):
    assert isinstance(assignment_for(record, round_, client, committed=committed).work, expected)


def test_training_names_the_plan_the_base_and_the_plan_of_the_base():
    record = federation(ticket=ticket(plan=PLAN), plan=PLAN, sequence=2, result_sequence=1, result_plan=None)
    work = assignment_for(record, a_round(), "a", committed=False).work
    assert work == Train(round=a_round(), plan=PLAN, base_sequence=1, base_plan=None)


def test_the_identifier_stays_while_only_others_progress():
    before = assignment_for(TRAINING, a_round(), "a", committed=False)
    busier = TRAINING.model_copy(update={"garbage": (), "planned_at": 7})
    assert assignment_for(busier, a_round(), "a", committed=False).assignment_id == before.assignment_id


def test_the_identifier_changes_with_the_work():
    ids = [
        assignment_for(TRAINING, a_round(), "a", committed=False).assignment_id,
        assignment_for(TRAINING, a_round(sequence=3), "a", committed=False).assignment_id,
        assignment_for(TRAINING, a_round(), "a", committed=True).assignment_id,
        assignment_for(TRAINING, a_round(RoundState.AGGREGATING), "a", committed=False).assignment_id,
        assignment_for(VOTING, a_round(kind=RoundKind.VOTE), "a", committed=False).assignment_id,
        assignment_for(federation(negotiation=NEGOTIATION), None, "a", committed=False).assignment_id,
        assignment_for(
            federation(negotiation=NEGOTIATION.model_copy(update={"plan_number": 2})),
            None,
            "a",
            committed=False,
        ).assignment_id,
        assignment_for(federation(phase=Phase.FINISHED), None, "a", committed=False).assignment_id,
        assignment_for(federation(phase=Phase.FAILED, failure="x"), None, "a", committed=False).assignment_id,
    ]
    assert len(set(ids)) == len(ids)


def test_only_finish_and_halt_are_last():
    assert assignment_for(federation(phase=Phase.FINISHED), None, "a", committed=False).last
    assert assignment_for(federation(phase=Phase.FAILED), None, "a", committed=False).last
    assert not assignment_for(TRAINING, a_round(), "a", committed=False).last
