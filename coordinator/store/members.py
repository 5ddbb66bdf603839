"""Who has joined a federation, and with which model; and who could not."""

from typing import Final

from coordinator.records import MemberRecord, Model, Sighting
from coordinator.store.database import Database, available

MAX_APPLICANTS: Final = 100
"""Clients kept that could not join: enough to see what is wrong."""


class MemberStore:
    """Members of a federation by client."""

    def __init__(self, db: Database) -> None:
        self.db = db

    @available
    async def put(self, federation_id: str, member: MemberRecord) -> None:
        """Adds or replaces a member, which is no longer an applicant."""
        key = self.db.keys.members(federation_id)
        await self.db.put_field(federation_id, key, member.client_id, member.model_dump_json())
        await self.db.redis.hdel(self.db.keys.applicants(federation_id), member.client_id)
        # It concerns the driver: what the other members should do does not change.
        await self.db.announce(federation_id, member.client_id)

    @available
    async def count(self, federation_id: str) -> int:
        """Number of members."""
        return int(await self.db.redis.hlen(self.db.keys.members(federation_id)))

    @available
    async def all(self, federation_id: str) -> dict[str, MemberRecord]:
        """Members by client, sorted."""
        fields = await self.db.fields(self.db.keys.members(federation_id))
        return {name: MemberRecord.read(data) for name, data in fields.items()}

    @available
    async def find(self, federation_id: str, client_id: str) -> MemberRecord | None:
        """A client that has joined, whether it was revoked since or not; None if it has not joined."""
        data = await self.db.field(self.db.keys.members(federation_id), client_id)
        return None if data is None else MemberRecord.read(data)

    @available
    async def has(self, federation_id: str, client_id: str) -> bool:
        """Whether a client has joined."""
        return bool(await self.db.redis.hexists(self.db.keys.members(federation_id), client_id))

    @available
    async def put_applicant(self, federation_id: str, client_id: str, said: Sighting) -> None:
        """Keeps why a client could not join; of more than MAX_APPLICANTS nothing. Raises: FEDERATION_UNKNOWN."""
        key = self.db.keys.applicants(federation_id)
        if await self.db.redis.hlen(key) < MAX_APPLICANTS or await self.db.redis.hexists(key, client_id):
            await self.db.put_field(federation_id, key, client_id, said.model_dump_json())

    @available
    async def applicants(self, federation_id: str) -> dict[str, Sighting]:
        """What clients said that could not join, by client, sorted."""
        fields = await self.db.fields(self.db.keys.applicants(federation_id))
        return {name: Sighting.read(data) for name, data in fields.items()}

    @available
    async def put_shapes(self, federation_id: str, client_id: str, model: Model) -> None:
        """Keeps the model of a client until the first round."""
        key = self.db.keys.shapes(federation_id)
        await self.db.put_field(federation_id, key, client_id, model.model_dump_json())

    @available
    async def shapes(self, federation_id: str, client_id: str) -> Model | None:
        """The model of a client; None if it is not kept (any more)."""
        data = await self.db.field(self.db.keys.shapes(federation_id), client_id)
        return None if data is None else Model.read(data)

    @available
    async def drop_shapes(self, federation_id: str) -> None:
        """Deletes the models of all clients."""
        await self.db.redis.unlink(self.db.keys.shapes(federation_id))
