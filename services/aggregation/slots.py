"""Who receives uploads at once: so many in all, of one client, of one federation. The others wait for their turn."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.aggregation.records import ShardSlot


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """Uploads received at once."""

    concurrent: int
    """In all."""
    client: int
    """Of one client; an agent sends one shard after the other."""
    federation: int
    """Of one federation: less than all, so that no federation waits for another's slow members."""


class Slots:
    """The slots of one replica. Who waits for a slot of its own client or federation holds up nobody else."""

    def __init__(self, limits: SlotLimits) -> None:
        self._all = asyncio.Semaphore(limits.concurrent)
        self._clients = _Groups(limits.client)
        self._federations = _Groups(limits.federation)

    @asynccontextmanager
    async def taken(self, slot: ShardSlot) -> AsyncIterator[None]:
        """Waits for a slot, and holds it inside."""
        federation = slot.round_id.partition(".")[0]
        async with (
            self._clients.taken((federation, slot.client_id)),
            self._federations.taken(federation),
            self._all,
        ):
            yield


class _Groups:
    """A semaphore by group, for as long as someone uses or awaits it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._groups: dict[Hashable, tuple[asyncio.Semaphore, int]] = {}

    @asynccontextmanager
    async def taken(self, group: Hashable) -> AsyncIterator[None]:
        semaphore, users = self._groups.get(group, (asyncio.Semaphore(self._size), 0))
        self._groups[group] = semaphore, users + 1
        try:
            async with semaphore:
                yield
        finally:
            _, users = self._groups[group]
            if users == 1:
                del self._groups[group]
            else:
                self._groups[group] = semaphore, users - 1
