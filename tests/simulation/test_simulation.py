"""Schedules of faults against a whole cluster; `make simulate` runs thousands."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.simulation.cluster import Size
from tests.simulation.faults import (
    Call,
    Crash,
    Jitter,
    Loss,
    Outage,
    Pause,
    Skew,
    Slow,
    Store,
    WorkerDeath,
)
from tests.simulation.parties import PARTIES
from tests.simulation.simulation import Report, Schedule, run

SINGLE = (
    Jitter(),
    Call("agent-0", "Join", 1, "drop-response", 0.5),
    Call("agent-0", "CommitUpdate", 1, "drop-response", 1.0),
    Call("agent-1", "CommitUpdate", 1, "duplicate", 0.01),
    Call("agent-1", "PutShard", 1, "break", 0.5, 1),
    Call("agent-0", "Watch", 1, "break", 20.0, 1),
    Call("coordinator-0", "AggregateShard", 1, "drop-response", 0.0),
    Crash("coordinator-0", 60, 0.0, 5.0),
    Crash("aggregation-0", 12, 0.001, 5.0),
    Crash("agent-0", 6, 0.0, 2.0),
    Pause("coordinator-0", 60, 25.0),
    Store("coordinator-0", 60, "repeat"),
    Store("aggregation-1", 9, "late", 3.0),
    Outage(3.0, 5.0),
    Loss(2, 0.0),
    WorkerDeath("aggregation-0", 1, 3),
    Slow("agent-0", 3, 70.0),
    Skew("coordinator-1", 2500),
)


def explained(report: Report) -> str:
    faults = "\n".join(f"  {fault}" for fault in report.met)
    return (
        f"{report.violation}\n{faults}\n"
        f"make simulate SCHEDULES=1 SEED={report.schedule.seed} shows the smallest schedule that fails"
    )


def plain() -> Schedule:
    """Without hostile members, protection, or orders after the start."""
    return Schedule(0, Size(3, 2), ())


def test_without_faults_a_federation_finishes():
    report = run(plain())
    assert (report.violation, report.phase, report.met) == ("", "FINISHED", ())
    assert report.virtual_s < 60


PROTECTED = (
    Call("coordinator-1", "OpenEpoch", 1, "drop-response", 1.0),
    Call("coordinator-1", "RetireEpochs", 1, "drop-response", 1.0),
    Call("agent-0", "GetEpochSecrets", 1, "drop-response", 1.0),
    Call("agent-0", "GetPlan", 1, "break", 0.5, 0),
    Crash("authority", 1, 0.0, 5.0),
    Crash("authority", 2, 0.0, 5.0),
    Crash("authority", 3, 0.0, 40.0),
    Crash("coordinator-0", 40, 0.0, 5.0),
    Crash("coordinator-1", 80, 0.0, 5.0),
    Crash("agent-1", 12, 0.0, 2.0),
    Outage(6.15, 5.0),
    Loss(1, 0.0),
    WorkerDeath("aggregation-0", 1, 3),
    Pause("agent-2", 14, 35.0),
)
"""Where keys are made and destroyed, columns voted on and plans made."""
BY_NEGOTIATION = {
    "sealed": (*PROTECTED, Call("agent-0", "PublishPlan", 1, "drop-response", 1.0)),
    "ope": (
        *PROTECTED,
        Call("agent-0", "CastBallot", 1, "drop-response", 1.0),
        Call("agent-1", "CastBallot", 1, "break", 0.5, 1),
    ),
}


COMPLETE = (
    Call("agent-0", "PostCommitteeKey", 1, "drop-response", 1.0),
    Call("agent-1", "PostCommitteeKey", 1, "duplicate", 0.5),
    Call("agent-0", "GetCommitteeKeys", 1, "drop-response", 1.0),
    Call("agent-0", "CommitUpdate", 1, "drop-response", 1.0),
    Call("agent-1", "GetShares", 1, "break", 0.5, 1),
    Call("agent-1", "PostCheck", 1, "drop-response", 1.0),
    Call("agent-2", "SignSet", 1, "drop-response", 1.0),
    Call("agent-2", "SignSet", 1, "duplicate", 3.0),
    Call("agent-3", "PostAnswer", 1, "drop-response", 1.0),
    Call("agent-3", "GetOpening", 1, "drop-response", 1.0),
    *(Crash(f"coordinator-{index}", nth, 0.0, 5.0) for index in (0, 1) for nth in (45, 75, 105)),
    *(Crash("agent-1", nth, 0.0, 1.0) for nth in (6, 12, 18)),
    Pause("agent-1", 10, 30.0),
    Outage(5.5, 4.0),
    Loss(2, 0.0),
    WorkerDeath("aggregation-0", 1, 3),
    Slow("agent-0", 3, 70.0),
)
"""Where a committee is seated, agrees and opens the sum."""


def complete() -> Schedule:
    """Five clients, all of them on the committee, which withstands one that is lost."""
    return Schedule(0, Size(5, 2, max_attempts=3, complete=True, key_rotation=1), ())


def test_without_faults_a_complete_federation_finishes_in_two_draws():
    report = run(complete(), traced=True)
    assert (report.violation, report.phase, report.met) == ("", "FINISHED", ())
    logged = Counter(line.split()[3] for line in report.trace if " info " in line)
    assert [logged[name] for name in ("seat_committee", "propose_set", "certify_set")] == [2, 2, 2]
    assert (logged["epoch_opened"], logged["evaluated"]) == (2, 10)


@pytest.mark.parametrize("fault", COMPLETE, ids=str)
def test_a_complete_federation_keeps_its_promises_whichever_fault_it_meets(fault):
    report = run(complete().with_only([fault]))
    assert not report.violation, explained(report)
    assert report.phase == "FINISHED", "three attempts are enough for one fault"


def protected(negotiation: str) -> Schedule:
    """Votes again and gets new keys after its first round."""
    return Schedule(0, Size(3, 2, negotiation=negotiation, replan_every=1, key_rotation=1), ())


@pytest.mark.parametrize("negotiation", BY_NEGOTIATION)
def test_without_faults_a_protected_federation_finishes_under_its_second_keys(negotiation):
    report = run(protected(negotiation), traced=True)
    assert (report.violation, report.phase, report.met) == ("", "FINISHED", ())
    logged = Counter(line.split()[3] for line in report.trace if " info " in line)
    assert (logged["epoch_opened"], logged["epochs_retired"], logged["evaluated"]) == (2, 1, 6)


@pytest.mark.parametrize(
    ("negotiation", "fault"),
    [(negotiation, fault) for negotiation, faults in BY_NEGOTIATION.items() for fault in faults],
    ids=str,
)
def test_a_protected_federation_keeps_its_promises_whichever_fault_it_meets(negotiation, fault):
    report = run(protected(negotiation).with_only([fault]))
    assert report.met == (fault,)
    assert not report.violation, explained(report)


@pytest.mark.parametrize("negotiation", ["", *BY_NEGOTIATION])
@pytest.mark.parametrize("hostile", PARTIES)
def test_one_hostile_member_of_three_keeps_nobody_from_finishing(negotiation, hostile):
    size = Size(3, 3, negotiation=negotiation, replan_every=2, key_rotation=0, hostile=hostile)
    report = run(Schedule(0, replace(size, deadline_s=600, max_attempts=1), ()))
    assert (report.violation, report.phase) == ("", "FINISHED")
    assert report.virtual_s < 400, "it costs less than one deadline in all"


@pytest.mark.parametrize("negotiation", ["", *BY_NEGOTIATION])
@pytest.mark.parametrize("orders", [("stop",), ("extend",), ("stop", "extend"), ("delete",)], ids="+".join)
def test_what_an_operator_orders_happens_whenever_it_does(negotiation, orders):
    size = Size(3, 2, negotiation=negotiation, replan_every=1, key_rotation=1, orders=orders)
    report = run(Schedule(0, size, ()))
    assert not report.violation, explained(report)


@pytest.mark.parametrize("fault", SINGLE, ids=str)
def test_a_federation_keeps_its_promises_whichever_fault_it_meets(fault):
    report = run(plain().with_only([fault]))
    assert not report.violation, explained(report)


SHARED = (
    Call("coordinator-0", "HelpAggregate", 1, "drop-request", 0.0),
    Call("coordinator-0", "AggregateShard", 1, "drop-response", 0.0),
    Crash("aggregation-0", 12, 0.001, 5.0),
    WorkerDeath("aggregation-1", 2, 4),
)
"""Where replicas share a shard."""
SHARING = (
    *((Size(4, 2), fault) for fault in SHARED),
    *(
        (Size(5, 2, complete=True, key_rotation=1), WorkerDeath(f"aggregation-{index}", 1, 4))
        for index in (0, 1)
    ),
)


@pytest.mark.parametrize(("size", "fault"), SHARING)
def test_replicas_that_share_a_shard_count_every_update_once(size, fault, monkeypatch):
    monkeypatch.setattr("shelora.lora.parts.LEAST_RUN", 2)
    monkeypatch.setattr("coordinator.aggregation.LEAST_RUN", 2)
    monkeypatch.setattr("services.aggregation.sharing.PATIENCE", 0.0)
    report = run(Schedule(0, size, (fault,)))
    assert not report.violation, explained(report)
    assert report.phase == "FINISHED"


@pytest.mark.parametrize("seed", range(80))  # `make simulate` draws as many as one likes
def test_a_federation_keeps_its_promises_under_faults_at_random(seed):
    report = run(Schedule.of(seed))
    assert not report.violation, explained(report)
