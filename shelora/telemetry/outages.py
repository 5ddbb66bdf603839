"""A failure that lasts is logged once, then ever more rarely: a log of a week offline is read in a minute."""

import asyncio
from collections.abc import Callable
from typing import Final

from structlog.types import FilteringBoundLogger

from shelora.errors import DomainError, Reason

FIRST_S: Final = 300.0
"""Seconds from the first record of an outage to the second; doubled each time."""
LONGEST_S: Final = 3600.0


def _loop_s() -> float:
    return asyncio.get_running_loop().time()


class Outage:
    """Something that is tried again and again, and may fail for long.

    Args:
        log: Where it is logged.
        event: Of the warnings while it fails; for another reason there is one at once.
        over: Event of the record when it no longer does; "" for none.
        clock_s: Monotonic seconds; the loop's by default.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        event: str,
        over: str = "",
        clock_s: Callable[[], float] = _loop_s,
    ) -> None:
        self._log = log
        self._event = event
        self._over = over
        self._clock_s = clock_s
        self._since_s: float | None = None
        self._reason: Reason | None = None
        self._due_s = 0.0
        self._pause_s = FIRST_S

    def failed(self, error: DomainError, **fields: object) -> None:
        """Another attempt failed: told now, or left out until it is time."""
        now_s = self._clock_s()
        if self._since_s is None:
            self._since_s, self._pause_s = now_s, FIRST_S
        if error.reason is self._reason and now_s < self._due_s:
            return
        lasts_s = round(now_s - self._since_s)
        self._log.warning(self._event, reason=error.reason, why=error.message, lasts_s=lasts_s, **fields)
        self._reason = error.reason
        self._due_s, self._pause_s = now_s + self._pause_s, min(2 * self._pause_s, LONGEST_S)

    def ended(self, **fields: object) -> None:
        """An attempt succeeded."""
        if self._since_s is None:
            return
        if self._over:
            self._log.info(self._over, lasted_s=round(self._clock_s() - self._since_s), **fields)
        self._since_s = self._reason = None
