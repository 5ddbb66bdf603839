"""From a run that failed to the fewest faults with which it still fails."""

from collections.abc import Callable
from typing import Final

from tests.simulation.faults import Fault
from tests.simulation.simulation import Report, Schedule, run

MOST_RUNS: Final = 200
"""A run that hangs takes seconds; this many are minutes."""


def shrunk(failed: Report, again: Callable[[Schedule], Report] = run) -> Report:
    """The smallest failing report found by leaving out halves, quarters and so on of the faults, down to single ones.

    Any violation counts as the failure: a smaller schedule that breaks another rule is as good a bug.
    """
    best = failed
    runs = 0
    size = len(best.met)
    while size:
        start = 0
        while start < len(best.met) and runs < MOST_RUNS:
            kept = _without(best.met, start, size)
            report = again(best.schedule.with_only(kept))
            runs += 1
            if report.violation and len(report.met) < len(best.met):
                best = report
            else:
                start += size
        size = min(size // 2, len(best.met))
    return best


def _without(faults: tuple[Fault, ...], start: int, size: int) -> tuple[Fault, ...]:
    return (*faults[:start], *faults[start + size :])
