"""When members were last heard of, and which of their processes takes part."""

from collections.abc import Sequence

from coordinator.records import Sighting
from coordinator.scripts import BEGIN_SESSION, SEE, TOUCH
from coordinator.store.database import Database, available, unknown


class PresenceStore:
    """Sightings of clients, and their sessions. Args: sighting_ms: life of a sighting."""

    def __init__(self, db: Database, sighting_ms: int) -> None:
        self.db = db
        self._sighting_ms = sighting_ms
        self._begin = db.redis.register_script(BEGIN_SESSION)
        self._see = db.redis.register_script(SEE)
        self._touch = db.redis.register_script(TOUCH)

    @available
    async def see(self, federation_id: str, client_id: str, sighting: Sighting, session: str = "") -> int:
        """Keeps what a member said of itself until the sighting expires.

        Returns the number of members; 0: the client is none; -1: another session of it began since.
        """
        names = self.db.keys
        keys = [
            names.members(federation_id),
            names.sighting(federation_id, client_id),
            names.sessions(federation_id),
            names.copies(federation_id),
        ]
        said = sighting.model_dump_json()
        return int(await self._see(keys, [client_id, said, self._sighting_ms, session, sighting.at_ms]))

    @available
    async def touch(self, federation_id: str, client_id: str, at_ms: int) -> None:
        """Notes that a client called, also before it is a member; what it last said of itself stays."""
        first = Sighting(stage="", progress=0.0, at_ms=at_ms)
        key = self.db.keys.sighting(federation_id, client_id)
        await self._touch([key], [at_ms, first.model_dump_json(), self._sighting_ms])

    @available
    async def sightings(self, federation_id: str, client_ids: Sequence[str]) -> dict[str, Sighting]:
        """Sightings that have not expired, by client."""
        if not client_ids:
            return {}
        keys = [self.db.keys.sighting(federation_id, client_id) for client_id in client_ids]
        found = zip(client_ids, await self.db.redis.mget(keys), strict=True)
        return {name: Sighting.read(data) for name, data in found if data is not None}

    @available
    async def begin_session(self, federation_id: str, client_id: str, session: str) -> None:
        """Makes a process the one that takes part as this client. Raises FEDERATION_UNKNOWN."""
        keys = [self.db.keys.federation(federation_id), self.db.keys.sessions(federation_id)]
        overtaken = 2
        answer = overtaken
        while answer == overtaken:
            seen = await self.db.field(keys[1], client_id) or b""
            answer = int(await self._begin(keys, [client_id, seen, session, self.db.retention_ms]))
        if not answer:
            raise unknown(federation_id)

    @available
    async def copies(self, federation_id: str) -> dict[str, int]:
        """When another process than the one taking part was last refused, Unix milliseconds by client."""
        fields = await self.db.fields(self.db.keys.copies(federation_id))
        return {name: int(at_ms) for name, at_ms in fields.items()}
