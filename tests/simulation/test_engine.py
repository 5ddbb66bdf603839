"""The engine itself: the same run every time, the same run again from what was noted, fewer faults when it shrinks."""

import os
import subprocess
import sys

import pytest

from shelora.committee.rules import committee_rule
from tests.simulation.faults import Call, Jitter, Loss
from tests.simulation.liars import CHEATS, LIARS, SPOILERS
from tests.simulation.shrinking import shrunk
from tests.simulation.simulation import Report, Schedule, run

SEED = 2
SEALED, OPE, COMPLETE = 13, 4, 8
"""Seeds whose federations encrypt: by negotiation, or everything."""


@pytest.mark.parametrize("seed", [SEED, SEALED, OPE, COMPLETE])
def test_a_seed_gives_the_same_run_every_time(seed):
    assert run(Schedule.of(seed), traced=True) == run(Schedule.of(seed), traced=True)


def test_federations_of_each_kind_are_run():
    assert [Schedule.of(seed).size.negotiation for seed in (SEED, SEALED, OPE)] == ["", "sealed", "ope"]
    assert Schedule.of(COMPLETE).size.complete


def test_most_federations_are_in_complete_mode_and_have_all_kinds_of_liars():
    sizes = [Schedule.of(seed).size for seed in range(3000)]
    assert 0.6 < sum(size.complete for size in sizes) / len(sizes) < 0.75
    assert {kind for size in sizes for _, kind in size.liars} == LIARS.keys() | SPOILERS.keys()
    assert {size.coordinators for size in sizes} == {"", *CHEATS}
    assert all(len(size.liars) <= committee_rule(size.clients).threshold for size in sizes)
    reached = {size.clients for size in sizes if len(size.liars) == committee_rule(size.clients).threshold}
    assert reached == {2, 3, 4, 5, 7}


def test_a_seed_gives_the_same_run_in_another_process():
    """Another process hashes strings otherwise, so sets have another order."""
    code = (
        "from tests.simulation.simulation import Schedule, run\n"
        f"print('\\n'.join(run(Schedule.of({SEED}), traced=True).trace))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    assert other.stdout.decode().splitlines() == run(Schedule.of(SEED), traced=True).trace


def test_the_faults_that_were_noted_make_the_same_run_again():
    drawn = run(Schedule.of(SEED), traced=True)
    again = run(drawn.schedule.with_only(drawn.met), traced=True)
    assert drawn.met
    assert (again.trace, again.met) == (drawn.trace, drawn.met)


def test_shrinking_keeps_the_faults_that_matter_and_no_others():
    faults = (Jitter(), *(Loss(n, 0.0) for n in range(9)), Call("agent-0", "Join", 1, "duplicate", 0.0))
    runs = []

    def again(schedule):
        runs.append(schedule)
        fails = {Jitter(), Loss(7, 0.0)} <= set(schedule.faults)
        return Report(schedule, "wrong" if fails else "", "FAILED", schedule.faults, 1.0)

    least = shrunk(again(Schedule.of(0).with_only(faults)), again)
    assert least.met == (Jitter(), Loss(7, 0.0))
    assert len(runs) < 40
