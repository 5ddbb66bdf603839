"""What a driver has heard of a round's committee: every statement is read and parsed once, however often it looks.

A statement never changes once it is made (`scripts.STATE`, `scripts.COMMIT`), and what is kept of it is small: of a
dealing its digest and weight. A look costs the names of who has stated something, and what is new.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Final, TypeAlias

from coordinator.committees import Proceedings, context_of
from coordinator.records import FederationRecord, RoundRecord, Statement
from coordinator.statements import checked_in, dealings_in, views_in
from coordinator.store import Store
from shelora.committee.verdict import Checked
from shelora.rounds import RoundState

BATCH: Final = 256
"""Statements read at once: dealings are a few kilobytes each."""

Place: TypeAlias = tuple[FederationRecord, int]
Read: TypeAlias = Callable[[list[str]], Awaitable[dict[str, bytes]]]


class Hearing:
    """Of one round; the round is known by its identifier, which no other round of any federation has."""

    def __init__(self, store: Store, round_id: str) -> None:
        self.round_id = round_id
        self._store = store
        self._views: dict[str, str] = {}
        self._dealings: dict[str, tuple[bytes, int]] = {}
        self._checks: dict[int, Checked] = {}
        self._checkers: set[str] = set()

    async def proceedings(self, federation: FederationRecord, record: RoundRecord) -> Proceedings:
        """What the round's committee has come to, as far as the state of the round asks for it."""
        state, place = record.round.state, (federation, record.sequence)
        departed = await self._store.committees.speakers(Statement.DEPARTURE, *place)
        if state is RoundState.KEYING:
            orders = await self._store.committees.orders(*place)
            return Proceedings(orders=orders, views=await self._heard_views(place), departed=departed)
        self._views.clear()
        if state not in {RoundState.CERTIFYING, RoundState.AGGREGATING}:
            return Proceedings(departed=departed)
        shards = await self._store.rounds.shards(federation, record)
        return Proceedings(
            departed=departed,
            dealings=await self._heard_dealings(place, record),
            checks=await self._heard_checks(place, record),
            signed=await self._store.committees.speakers(Statement.SIGNATURE, *place),
            answered=await self._store.committees.speakers(Statement.ANSWER, *place),
            aggregated=len(shards) == record.shard_count,
        )

    async def _heard_views(self, place: Place) -> dict[str, str]:
        names = await self._store.committees.speakers(Statement.VIEW, *place)
        read = self._reader(Statement.VIEW, place)
        async for views in _new(names, self._views.keys(), read):
            self._views |= views_in(views)
        return self._views

    async def _heard_dealings(self, place: Place, record: RoundRecord) -> dict[str, tuple[bytes, int]]:
        """Of updates that count, until a set of them is proposed."""
        if record.proposed:
            self._dealings.clear()
            return {}
        federation, sequence = place
        context = context_of(federation, record)
        names = await self._store.committees.dealers(federation, sequence)

        async def read(batch: list[str]) -> dict[str, bytes]:
            return await self._store.committees.dealings(federation, sequence, batch)

        async for dealings in _new(names, self._dealings.keys(), read):
            self._dealings |= dealings_in(context, dealings)
        return {name: dealt for name, dealt in self._dealings.items() if name not in record.dropped_ids}

    async def _heard_checks(self, place: Place, record: RoundRecord) -> dict[int, Checked]:
        names = await self._store.committees.speakers(Statement.CHECK, *place)
        async for checks in _new(names, self._checkers, self._reader(Statement.CHECK, place)):
            self._checks |= checked_in(context_of(place[0], record), record, checks)
            self._checkers |= checks.keys()
        return self._checks

    def _reader(self, kind: Statement, place: Place) -> Read:
        async def read(batch: list[str]) -> dict[str, bytes]:
            return await self._store.committees.statements(kind, *place, batch)

        return read


async def _new(names: Iterable[str], known: AbstractSet[str], read: Read) -> AsyncIterator[dict[str, bytes]]:
    """What those have stated that are not known yet, a batch at a time."""
    missing = sorted(name for name in names if name not in known)
    for first in range(0, len(missing), BATCH):
        yield await read(missing[first : first + BATCH])
