"""Sealed plans by digest, and who rejects them."""

from coordinator.records import Dropped, FederationRecord
from coordinator.store.database import Database, available
from shelora.errors import DomainError, Reason


class PlanStore:
    """Plans of a federation."""

    def __init__(self, db: Database) -> None:
        self.db = db

    @available
    async def put(self, federation_id: str, sha256: str, sealed: bytes) -> None:
        """Keeps a sealed plan for some minutes, and as long as its federation once a record names it.

        Raises: FEDERATION_UNKNOWN.
        """
        await self.db.put_value(federation_id, self.db.keys.plan(federation_id, sha256), sealed)

    @available
    async def read(self, federation_id: str, sha256: str) -> bytes:
        """Raises PLAN_UNKNOWN."""
        sealed = await self.db.redis.get(self.db.keys.plan(federation_id, sha256))
        if sealed is None:
            raise DomainError(Reason.PLAN_UNKNOWN, "the plan has expired")
        return bytes(sealed)

    @available
    async def put_objection(self, federation: FederationRecord, plan_number: int, objection: Dropped) -> None:
        """Keeps why a client rejects a plan."""
        federation_id, client_id = federation.federation_id, objection.client_id
        key = self.db.keys.plan_objections(federation_id, federation.instance, plan_number)
        await self.db.put_field(federation_id, key, client_id, objection.model_dump_json())
        await self.db.announce(federation_id, client_id)

    @available
    async def objections(self, federation: FederationRecord, plan_number: int) -> dict[str, Dropped]:
        """Who rejects a plan, by client."""
        key = self.db.keys.plan_objections(federation.federation_id, federation.instance, plan_number)
        return {name: Dropped.read(data) for name, data in (await self.db.fields(key)).items()}
