"""What every use case looks up first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from coordinator.records import FederationRecord, MemberRecord, RoundRecord
from coordinator.store import Store
from shelora.errors import DomainError, Reason

Current: TypeAlias = tuple[FederationRecord, RoundRecord | None]
"""A federation, and the round in progress if there is one."""


@dataclass(frozen=True)
class Lookup:
    """Reads records, and notes who called.

    Attributes:
        store: State.
        clock_ms: Unix milliseconds.
    """

    store: Store
    clock_ms: Callable[[], int]

    async def federation(self, federation_id: str) -> FederationRecord:
        """Raises FEDERATION_UNKNOWN."""
        return (await self.store.federations.read(federation_id)).record

    async def current(self, federation_id: str) -> Current:
        """A federation, and the round in progress if its record exists. Raises FEDERATION_UNKNOWN."""
        federation = await self.federation(federation_id)
        ticket = federation.ticket
        found = await self.store.rounds.read(federation, ticket.sequence) if ticket else None
        return federation, found.record if found else None

    async def round(self, federation: FederationRecord, round_id: str) -> RoundRecord:
        """Raises ROUND_UNKNOWN."""
        sequence = federation.sequence_of(round_id)
        found = await self.store.rounds.read(federation, sequence) if sequence else None
        if found is None:
            raise DomainError(Reason.ROUND_UNKNOWN, "the federation has no such round (any more)")
        return found.record

    async def member(self, federation_id: str, client_id: str) -> MemberRecord:
        """Raises CLIENT_UNKNOWN."""
        member = await self.store.members.find(federation_id, client_id)
        if member is None:
            await self.federation(federation_id)  # FEDERATION_UNKNOWN says more
            raise not_joined()
        return member

    async def touch(self, federation_id: str, client_id: str) -> None:
        """Notes that a client called."""
        await self.store.presence.touch(federation_id, client_id, self.clock_ms())


def not_joined() -> DomainError:
    """The client is not a member."""
    return DomainError(Reason.CLIENT_UNKNOWN, "this client has not joined the federation: join first")
