"""Deletes all that is stored of a federation, and what Redis' append-only file holds of what was deleted."""

import asyncio

import structlog
from redis.exceptions import RedisError

from coordinator.records import FederationRecord
from coordinator.store.committees import committee_keys
from coordinator.store.database import Database, available
from coordinator.store.federations import plans_and_openings
from coordinator.store.members import MemberStore
from coordinator.store.rounds import RoundStore

_log = structlog.get_logger(__name__)


class Disposal:
    """Deletes federations. Args: rounds, members: asked what there is to delete."""

    def __init__(self, db: Database, rounds: RoundStore, members: MemberStore) -> None:
        self.db = db
        self._rounds = rounds
        self._members = members

    async def delete(self, federation: FederationRecord) -> None:
        """Deletes everything of a federation, its record last."""
        federation_id, keys = federation.federation_id, self.db.keys
        for client_id in await self._members.all(federation_id):
            await self._unlink(keys.sighting(federation_id, client_id))
        for sequence in range(1, federation.sequence + 1):
            await self._unlink(*await self._round_keys(federation, sequence))
        for number in range(1, federation.plan_count + 1):
            await self._unlink(keys.plan_objections(federation_id, federation.instance, number))
        await self._unlink(
            *(keys.layout(federation_id, digest) for digest in federation.layouts_in_use),
            *plans_and_openings(keys, federation),
            keys.shapes(federation_id),
            keys.sessions(federation_id),
            keys.copies(federation_id),
            keys.applicants(federation_id),
            keys.members(federation_id),
        )
        await self._forget(federation_id)

    async def rewrite_log(self) -> None:
        """Has Redis rewrite its append-only file, which keeps deleted values until then. Never raises.

        Does nothing if Redis does not permit it, or is rewriting it already.
        """
        try:
            async with asyncio.timeout(self.db.timeout_s):
                await self.db.redis.execute_command("BGREWRITEAOF")
        except (RedisError, OSError) as error:  # of a user that may not: a NoPermissionError
            _log.info("append_only_file_not_rewritten", why=str(error))

    async def _round_keys(self, federation: FederationRecord, sequence: int) -> list[str]:
        """All keys of a round, and that of its layout."""
        keys, federation_id = self.db.keys, federation.federation_id
        scope = (federation_id, federation.instance, sequence)
        own = [keys.round(*scope), keys.commits(*scope), keys.refusals(*scope), keys.ballots(*scope)]
        own += [keys.evaluations(*scope), keys.objections(*scope)]
        found = await self._rounds.read(federation, sequence)
        if found is None:
            return own
        record = found.record
        own.append(keys.layout(federation_id, record.layout_digest))
        if record.ranked is not None:
            own.append(keys.plan(federation_id, record.ranked.digest.sha256))
        if record.opening is not None:
            own.append(keys.opening(federation_id, record.opening.sha256))
        if record.round.convenes:
            own += committee_keys(keys, federation, sequence)
        return [*own, *(keys.shards(*scope, generation) for generation in range(len(record.dropped) + 1))]

    @available
    async def _unlink(self, *keys: str) -> None:
        if keys:
            await self.db.redis.unlink(*keys)

    @available
    async def _forget(self, federation_id: str) -> None:
        """Deletes the record, and tells everyone who waits for it."""
        await self.db.redis.unlink(self.db.keys.federation(federation_id))
        await self.db.redis.zrem(self.db.keys.index, federation_id)
        await self.db.announce(federation_id)
