"""What happens to whom, and when: drawn from a seed, so that a run can be repeated."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LONGEST_DEATH_S = 4.0
LONGEST_STOP_S = 12.0
"""Longer than the lease: a stopped coordinator comes back as a late writer."""
LONGEST_STALL_S = 8.0
LONGEST_DELAY_S = 0.05


class Fault(StrEnum):
    KILL = "SIGKILL"
    """The process dies, and is started again after a while."""
    DRAIN = "SIGTERM"
    """As a rolling restart does it: wait for the end, start again."""
    STOP = "SIGSTOP"
    """The process stands still for a while."""
    KILL_WORKER = "SIGKILL worker"
    """One of its worker processes dies."""
    CUT = "reset"
    """Every connection to it is reset."""
    STALL = "stall"
    """Nothing passes to and from it for a while; connections stay."""
    DELAY = "delay"
    """Every 4 KiB to and from it take longer, for a while."""


@dataclass(frozen=True)
class Incident:
    pause_s: float
    """After the beginning of the one before."""
    fault: Fault
    target: str
    """A process, or for the last three faults a front of the relay."""
    lasts_s: float
    strength: float = 0.0
    """Seconds of a delay."""


@dataclass(frozen=True)
class Targets:
    agents: Sequence[str]
    servers: Sequence[str]
    fronts: Sequence[str]


WEIGHTS = {
    Fault.KILL: 8,
    Fault.DRAIN: 3,
    Fault.STOP: 4,
    Fault.KILL_WORKER: 2,
    Fault.CUT: 4,
    Fault.STALL: 2,
    Fault.DELAY: 1,
}


def incidents(seed: int, targets: Targets) -> Iterator[Incident]:
    """Incidents without end."""
    rng = random.Random(seed)
    while True:
        [fault] = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        yield Incident(
            rng.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S),
            fault,
            _target(rng, fault, targets),
            rng.uniform(0, _longest_s(fault)),
            rng.uniform(0, LONGEST_DELAY_S),
        )


def _target(rng: random.Random, fault: Fault, targets: Targets) -> str:
    if fault in {Fault.CUT, Fault.STALL, Fault.DELAY}:
        return rng.choice(targets.fronts)
    if fault is Fault.KILL_WORKER:
        return rng.choice([name for name in targets.servers if name.startswith("aggregation")])
    if fault is Fault.DRAIN:
        return rng.choice([name for name in targets.servers if name != "redis"])
    return rng.choice([*targets.servers, *targets.agents])


def _longest_s(fault: Fault) -> float:
    match fault:
        case Fault.STOP:
            return LONGEST_STOP_S
        case Fault.STALL | Fault.DELAY:
            return LONGEST_STALL_S
        case _:
            return LONGEST_DEATH_S
