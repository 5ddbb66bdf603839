"""What a round's committee states and receives, until the round is over; and what opens its sum afterwards."""

import hashlib
import json
from collections.abc import Sequence
from enum import IntEnum

from coordinator.keys import Keys
from coordinator.records import FederationRecord, Statement
from coordinator.scripts import STATE
from coordinator.store.database import Database, available
from shelora.committee.rules import MAX_MEMBERS
from shelora.errors import DomainError, Reason


class StateOutcome(IntEnum):
    """What became of a statement; the numbers are the script's."""

    STATED = 1
    REPEATED = 2
    REWRITTEN = 3
    OVER = 4


class CommitteeStore:
    """Statements by kind and client, dealings and shares by client, openings by digest."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._state = db.redis.register_script(STATE)

    @available
    async def state(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_id: str,
        content: bytes,
        order: tuple[str, ...] = (),
    ) -> StateOutcome:
        """Keeps what a client states, once, while the round is in a state of that kind. `order`: of a view."""
        keys, scope = self.db.keys, (federation.federation_id, federation.instance, sequence)
        names, kept = [keys.round(*scope), keys.statements(*scope, kind)], []
        if order:
            names.append(keys.orders(*scope))
            kept = [order_digest(order), json.dumps(order)]
        outcome = await self._state(
            keys=names,
            args=[
                client_id,
                content,
                self.db.retention_ms,
                keys.changes(federation.federation_id),
                f",{','.join(sorted(kind.states))},",
                *kept,
            ],
        )
        return StateOutcome(int(outcome))

    @available
    async def statements(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_ids: Sequence[str] | None = None,
    ) -> dict[str, bytes]:
        """What clients have stated, by client, sorted. Args: client_ids: only theirs."""
        return await self.db.fields(self._statements_key(kind, federation, sequence), client_ids)

    @available
    async def statement(
        self, kind: Statement, federation: FederationRecord, sequence: int, client_id: str
    ) -> bytes | None:
        """What a client has stated."""
        return await self.db.field(self._statements_key(kind, federation, sequence), client_id)

    @available
    async def speakers(self, kind: Statement, federation: FederationRecord, sequence: int) -> frozenset[str]:
        """Who has stated something of that kind."""
        return await self.db.names(self._statements_key(kind, federation, sequence))

    @available
    async def orders(self, federation: FederationRecord, sequence: int) -> dict[str, tuple[str, ...]]:
        """The committees that clients have stated, by `order_digest`."""
        key = self.db.keys.orders(federation.federation_id, federation.instance, sequence)
        return {digest: tuple(json.loads(names)) for digest, names in (await self.db.fields(key)).items()}

    @available
    async def dealers(self, federation: FederationRecord, sequence: int) -> frozenset[str]:
        """Whose updates have been committed with a Dealing."""
        key = self.db.keys.dealings(federation.federation_id, federation.instance, sequence)
        return await self.db.names(key)

    @available
    async def dealings(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        """The Dealings of those clients' committed updates, without shares, by client, sorted."""
        key = self.db.keys.dealings(federation.federation_id, federation.instance, sequence)
        return await self.db.fields(key, client_ids)

    @available
    async def shares(
        self, federation: FederationRecord, sequence: int, place: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        """The shares of those clients that are sealed to the member of a place, by client."""
        key = self.db.keys.shares(federation.federation_id, federation.instance, sequence, place)
        return await self.db.fields(key, client_ids)

    @available
    async def drop(self, federation: FederationRecord, sequence: int) -> None:
        """Deletes all statements, dealings and shares of a round."""
        await self.db.redis.unlink(*committee_keys(self.db.keys, federation, sequence))

    @available
    async def put_opening(self, federation_id: str, sha256: str, opening: bytes) -> None:
        """Keeps an opening for some minutes, and as long as its federation once a record in use names it.

        Raises: FEDERATION_UNKNOWN.
        """
        await self.db.put_value(federation_id, self.db.keys.opening(federation_id, sha256), opening)

    @available
    async def opening(self, federation_id: str, sha256: str) -> bytes:
        """Raises RESULT_UNKNOWN."""
        found = await self.db.redis.get(self.db.keys.opening(federation_id, sha256))
        if found is None:
            raise DomainError(Reason.RESULT_UNKNOWN, "what opens the result has expired")
        return bytes(found)

    def _statements_key(self, kind: Statement, federation: FederationRecord, sequence: int) -> str:
        return self.db.keys.statements(federation.federation_id, federation.instance, sequence, kind)


def order_digest(order: Sequence[str]) -> str:
    """SHA-256 in hex of a committee in its order."""
    return hashlib.sha256(json.dumps(order).encode()).hexdigest()


def committee_keys(keys: Keys, federation: FederationRecord, sequence: int) -> list[str]:
    """Keys of all statements, dealings and shares of a round."""
    scope = (federation.federation_id, federation.instance, sequence)
    return [
        *(keys.statements(*scope, kind) for kind in Statement),
        *(keys.shares(*scope, place) for place in range(MAX_MEMBERS)),
        keys.orders(*scope),
        keys.dealings(*scope),
    ]
