"""For whom a round waits, how long, and what is said of those it did without."""

import pytest

from coordinator.checks import given_up
from coordinator.records import Phase, Sighting
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import spec

HOUR = 3600


def said(client: str, assignment: pb.Assignment, reason=Reason.VALUE_NOT_FINITE, why="the loss is nan"):
    return assignment.assignment_id, given_up(
        pb.GiveUpRequest(
            client_id=client, assignment_id=assignment.assignment_id, reason=reason.value, why=why
        )
    )


async def give_up(fed, client: str, **words) -> None:
    await fed.handlers.members.give_up("fed", *said(client, await fed.assignment(client), **words))


async def seconds_to_the_end(fed, step_s: int = 5) -> float:
    begun = fed.now_ms
    while not (await fed.federation()).ended:
        await fed.settle()
        await fed.act()
        fed.now_ms += 1000 * step_s
        assert fed.now_ms - begun < 10 * HOUR * 1000
    return (fed.now_ms - begun) / 1000


async def test_a_member_that_never_trains_costs_a_grace_once_and_not_a_deadline_a_round(fed):
    fed.idle = {"d"}
    await fed.begin(spec("none", rounds=5, clients=4, deadline_s=HOUR), "abcd")
    assert await seconds_to_the_end(fed) < 60 + 5 * 30
    assert {r.update_count for r in (await fed.shown()).history} == {3}


async def test_without_a_grace_it_costs_a_deadline_once(fed):
    """The control: the round waits; and the next one does not."""
    fed.idle = {"d"}
    await fed.begin(spec("none", rounds=2, clients=4, deadline_s=HOUR, grace=0), "abcd")
    assert HOUR <= await seconds_to_the_end(fed, 20) < 1.5 * HOUR


async def test_who_missed_a_round_is_waited_for_again_once_it_is_seen_working(fed):
    await fed.begin(spec("none", rounds=3, clients=3, deadline_s=HOUR), "abc")
    fed.idle = {"c"}
    await fed.settle()
    while (await fed.federation()).trained < 1:
        await fed.act()
        fed.now_ms += 5000
        await fed.settle()
    working = fed.now_ms + 20_000
    await fed.store.presence.see("fed", "c", Sighting(stage="training", progress=0.5, at_ms=working))
    for client in "ab":
        await fed.do(client, await fed.assignment(client))
    fed.now_ms = working
    await fed.settle()
    record = (await fed.store.rounds.read(await fed.federation(), 2)).record
    assert (record.laggards, record.round.state) == (("c",), "COLLECTING")
    await fed.do("c", await fed.assignment("c"))
    await fed.settle()
    assert (await fed.federation()).trained == 2


async def test_a_round_closes_at_once_when_all_that_are_missing_have_given_up(fed):
    await fed.begin(spec("none", rounds=1, clients=4, deadline_s=HOUR), "abcd")
    await fed.settle()
    for client in "ab":
        await fed.do(client, await fed.assignment(client))
    for client in "cd":
        await fed.settle()
        assert (await fed.federation()).phase is Phase.RUNNING
        await give_up(fed, client)
    await fed.settle()
    assert (await fed.federation()).phase is Phase.FINISHED
    (round_,) = (await fed.shown()).history
    assert [(d.client_id, d.reason, d.why, d.gave_up) for d in round_.dropped] == [
        (client, "VALUE_NOT_FINITE", "the loss is nan", True) for client in "cd"
    ]


async def test_a_failure_names_what_agents_said_and_who_was_silent(fed):
    await fed.begin(spec("none", clients=3, deadline_s=HOUR, max_attempts=2), "abc")
    fed.idle = {"a"}
    for attempt in (1, 2):
        await fed.settle()
        assert (await fed.shown()).current.attempt == attempt
        await give_up(fed, "b", reason=Reason.DATA_INVALID, why="train.jsonl, row 3: no label")
        await give_up(fed, "c")
    await fed.settle()
    record = await fed.federation()
    assert record.phase is Phase.FAILED
    assert "b: DATA_INVALID, train.jsonl, row 3: no label" in record.failure
    assert "c: VALUE_NOT_FINITE" in record.failure
    assert "nothing came from a" in record.failure
    assert fed.now_ms == 1_000_000, "no deadline was waited for"


async def test_giving_up_an_assignment_of_yesterday_changes_nothing(fed):
    await fed.begin(spec("none", clients=3), "abc")
    await fed.settle()
    old = await fed.assignment("c")
    await fed.act()
    await fed.settle()
    await fed.handlers.members.give_up("fed", *said("c", old))
    assert await fed.store.updates.refusals(await fed.federation(), 2) == []


async def test_who_committed_cannot_be_taken_for_one_that_gave_up(fed):
    await fed.begin(spec("none", clients=3), "abc")
    await fed.settle()
    assignment = await fed.assignment("c")
    await fed.do("c", assignment)
    await fed.handlers.members.give_up("fed", *said("c", assignment))
    assert (await fed.shown()).current.dropped == []


@pytest.mark.parametrize(
    "fields",
    [
        {"why": "\x1b[2J"},
        {"why": "two\nlines"},
        {"why": "x" * 501},
        {"reason": "BECAUSE"},
        {"assignment_id": ""},
        {"assignment_id": "x" * 257},
    ],
)
def test_what_an_agent_says_is_bounded_and_printable(fields):
    usual = {"client_id": "a", "assignment_id": "train/fed.1.1", "reason": "DATA_INVALID", "why": "no"}
    with pytest.raises(DomainError) as refused:
        given_up(pb.GiveUpRequest(**{**usual, **fields}))
    assert refused.value.reason is Reason.INVALID_ARGUMENT


async def test_a_silent_leader_costs_a_minute(fed):
    await fed.begin(spec(deadline_s=HOUR), "abc")
    await fed.settle()
    await fed.act()
    await fed.settle()
    assert (await fed.assignment("a")).HasField("make_plan")
    for seconds, leader in ((59, "a"), (60, "b")):
        now_ms = 1_000_000 + 1000 * seconds
        for client in "abc":
            await fed.store.presence.see("fed", client, Sighting(stage="idle", progress=0, at_ms=now_ms))
        fed.now_ms = now_ms
        await fed.settle()
        assert (await fed.assignment(leader)).HasField("make_plan")


async def test_a_leader_that_works_is_waited_for(fed):
    await fed.begin(spec(deadline_s=HOUR), "abc")
    await fed.settle()
    await fed.act()
    await fed.settle()
    fed.now_ms += 600_000
    await fed.store.presence.see("fed", "a", Sighting(stage="decrypting", progress=0, at_ms=fed.now_ms))
    for client in "bc":
        await fed.store.presence.see("fed", client, Sighting(stage="idle", progress=0, at_ms=fed.now_ms))
    await fed.settle()
    assert (await fed.assignment("a")).HasField("make_plan")


async def test_a_leader_that_gives_up_is_replaced_at_once(fed):
    await fed.begin(spec(deadline_s=HOUR), "abc")
    await fed.settle()
    await fed.act()
    await fed.settle()
    await give_up(fed, "b")  # which waits: it has nothing to give up
    assert (await fed.assignment("a")).HasField("make_plan")
    await give_up(fed, "a", reason=Reason.MEMORY_UNAVAILABLE, why="1 MB is free")
    await fed.settle()
    assert (await fed.assignment("b")).HasField("make_plan")
    assert (await fed.play()).phase is Phase.FINISHED


async def test_a_vote_closes_without_those_that_gave_up(fed):
    await fed.begin(spec(deadline_s=HOUR), "abc")
    await fed.settle()
    await give_up(fed, "c", reason=Reason.DATA_INVALID, why="no")
    for client in "ab":
        await fed.do(client, await fed.assignment(client))
    await fed.settle()
    assert outcomes(await fed.shown()) == [("VOTE", 0, 1, "PUBLISHED", "")]
    fed.idle = set()
    await until_training(fed)


async def send_slowly(fed, stage: str = "uploading", reason: Reason | None = None) -> None:
    """Two of three have committed when the deadline passes; the third, which is needed, said last what it is doing."""
    await fed.begin(spec("none", rounds=1, clients=3, min_updates=3, deadline_s=HOUR, max_attempts=1), "abc")
    await fed.settle()
    for client in "ab":
        await fed.do(client, await fed.assignment(client))
    await fed.settle()
    fed.now_ms += 1000 * HOUR
    await see(fed, stage, reason)


async def see(fed, stage: str, reason: Reason | None = None) -> None:
    said = Sighting(stage=stage, progress=0.5, at_ms=fed.now_ms, reason=reason)
    await fed.store.presence.see("fed", "c", said)
    await fed.settle()


@pytest.mark.parametrize(
    ("stage", "reason"), [("uploading", None), ("paused", Reason.STORE_UNAVAILABLE)], ids=["sends", "cut off"]
)
async def test_a_late_round_waits_for_the_update_it_needs_while_that_is_being_sent(fed, stage, reason):
    await send_slowly(fed, stage, reason)
    for _ in range(2 * 12):
        fed.now_ms += 300_000  # asleep for less than ten minutes
        await see(fed, stage, reason)
    assert (await fed.federation()).phase is Phase.RUNNING
    await fed.do("c", await fed.assignment("c"))
    await fed.settle()
    assert (await fed.federation()).phase is Phase.FINISHED
    assert [r.update_count for r in (await fed.shown()).history] == [3]


@pytest.mark.parametrize("stage", ["training", "idle", "paused"])
async def test_a_late_round_does_not_wait_for_who_does_not_send(fed, stage):
    await send_slowly(fed, stage)
    assert (await fed.federation()).phase is Phase.FAILED


async def test_a_late_round_gives_up_who_fell_silent_while_sending(fed):
    await send_slowly(fed)
    fed.now_ms += 599_000
    await fed.settle()
    assert (await fed.federation()).phase is Phase.RUNNING
    fed.now_ms += 2_000
    await fed.settle()
    assert (await fed.federation()).phase is Phase.FAILED


async def test_who_sends_for_ever_keeps_a_round_open_for_its_grace_and_no_longer(fed):
    await send_slowly(fed)
    hours = 0
    while (await fed.federation()).phase is Phase.RUNNING:
        fed.now_ms += 500_000
        hours += 500 / 3600
        await see(fed, "uploading")
    assert 3 <= hours < 3.2, "three times the deadline: the default grace"
