"""Which entries of the audit log get a record of their own. The others are counted, so that nobody fills the disk."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shelora.audit import AuditEntry, AuditEvent

REFUSALS_PER_MINUTE: Final = 30
"""Refusals, of releases and of calls each, that get a record of their own; the others are counted. Nobody may fill the
disk by being refused."""

REPEATS_S: Final = 3600.0
"""Seconds in which a release or a refusal like one before is counted, not listed: what it tells is on disk already."""

MAX_REPEATED: Final = 10_000
"""Different ones that are counted at once."""

_MINUTE_S: Final = 60.0


class Listing:
    """Lists entries, or counts them until they are listed in one record. Not thread-safe.

    Args:
        write: Puts an entry on disk. Raises: DomainError STORE_UNAVAILABLE; then nothing that was counted is forgotten.
        monotonic: Seconds.
    """

    def __init__(self, write: Callable[[AuditEntry], None], monotonic: Callable[[], float]) -> None:
        self._write = write
        self._monotonic = monotonic
        self._lately: OrderedDict[AuditEntry, _Repeated] = OrderedDict()
        self.refusals = MinuteBudget(REFUSALS_PER_MINUTE, monotonic)
        """Of releases that are refused."""
        self.denials = MinuteBudget(REFUSALS_PER_MINUTE, monotonic)
        """Of calls that are refused."""

    def append(self, entry: AuditEntry) -> None:
        """Lists an entry, after how many were not listed before it."""
        self._list_overspent()
        self._write(entry)

    def note(self, entry: AuditEntry, budget: "MinuteBudget | None" = None) -> None:
        """Lists an entry, or counts it if one like it was listed lately, or the budget is spent."""
        self.list_repeats()
        if entry in self._lately:
            self._lately[entry].count += 1
            return
        if budget is not None and not budget.spend():
            return
        self.append(entry)
        self._lately[entry] = _Repeated(self._monotonic())
        if len(self._lately) > MAX_REPEATED:
            self._list_oldest()

    def list_repeats(self) -> None:
        """Lists how often what was listed an hour ago came again."""
        self._list_until(self._monotonic() - REPEATS_S)

    def list_all(self) -> None:
        """Lists whatever is only counted yet."""
        self._list_until(self._monotonic())
        self._list_overspent()

    def _list_until(self, until: float) -> None:
        while self._lately and next(iter(self._lately.values())).since <= until:
            self._list_oldest()

    def _list_oldest(self) -> None:
        """The entry again with how often it came since; not forgotten before it is on disk."""
        entry, repeated = next(iter(self._lately.items()))
        if repeated.count:
            self.append(entry.model_copy(update={"count": repeated.count}))
        del self._lately[entry]

    def _list_overspent(self) -> None:
        budgets = (self.refusals, self.denials)
        if count := sum(budget.overspent for budget in budgets):
            self._write(AuditEntry(event=AuditEvent.REFUSALS_NOT_LISTED, count=count))
            for budget in budgets:
                budget.overspent = 0


@dataclass
class _Repeated:
    """When an entry was written, and how often it came since."""

    since: float
    count: int = 0


class MinuteBudget:
    """So many a minute. What goes beyond is counted in `overspent`."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._monotonic = monotonic
        self._minute_began = monotonic()
        self._spent = 0
        self.overspent = 0

    def spend(self) -> bool:
        """Whether there was one left; it is spent."""
        now = self._monotonic()
        if now - self._minute_began >= _MINUTE_S:
            self._minute_began, self._spent = now, 0
        if self._spent >= self._per_minute:
            self.overspent += 1
            return False
        self._spent += 1
        return True
