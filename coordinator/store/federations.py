"""Records of federations, and the index of them."""

from collections.abc import Callable
from typing import Final

from coordinator.keys import Keys
from coordinator.metrics import TRANSACTION_TOTAL
from coordinator.records import FederationRecord
from coordinator.store.database import DELETING, Database, Versioned, available, unknown
from shelora.errors import DomainError, Reason

MAX_CONFLICTS: Final = 50
"""Attempts of a transaction. Writers of one federation are its RPCs and one driver; fifty lost races are a fault."""


class FederationStore:
    """Federations by name."""

    def __init__(self, db: Database) -> None:
        self.db = db

    @available
    async def ids(self) -> list[str]:
        """All federations, by name."""
        live = await self.db.redis.zrangebyscore(self.db.keys.index, self.db.clock_ms(), "+inf")
        return sorted(name.decode() for name in live)

    @available
    async def read(self, federation_id: str) -> Versioned[FederationRecord]:
        """Raises FEDERATION_UNKNOWN."""
        found = await self.db.read(self.db.keys.federation(federation_id), FederationRecord)
        if found is None:
            raise unknown(federation_id)
        return found

    @available
    async def write(
        self, name: str, record: FederationRecord, before: Versioned[FederationRecord] | None
    ) -> bool:
        """Writes if what was read before is still the newest; None creates. Plans that are in use no more expire soon.

        False: another writer was first. `name` is counted.
        """
        federation_id = record.federation_id
        await self._index(federation_id, new=before is None)
        keys = [self.db.keys.federation(federation_id), *_kept(self.db.keys, record)]
        old = set(plans_and_openings(self.db.keys, before.record)) if before else set()
        revision = before.revision if before else 0
        state = DELETING if record.deleting else record.phase
        return await self.db.write(
            name, federation_id, keys, record, state, revision, unused=sorted(old - set(keys))
        )

    async def transact(
        self, name: str, federation_id: str, change: Callable[[FederationRecord], FederationRecord]
    ) -> FederationRecord:
        """Applies a pure function, again if another writer was first. An equal record is not written.

        Raises: FEDERATION_UNKNOWN; whatever `change` raises; STORE_UNAVAILABLE after MAX_CONFLICTS conflicts.
        """
        for _ in range(MAX_CONFLICTS):
            found = await self.read(federation_id)
            changed = change(found.record)
            if changed == found.record:
                TRANSACTION_TOTAL.labels(name, "unchanged").inc()
                return changed
            if await self.write(name, changed, found):
                return changed
        raise DomainError(Reason.STORE_UNAVAILABLE, f"{name} was overtaken {MAX_CONFLICTS} times")

    async def _index(self, federation_id: str, *, new: bool) -> None:
        """Lists a federation until its record expires. Written first: an entry without a record is harmless.

        One that is not new is not listed again: it may have been deleted since it was read.
        """
        now_ms = self.db.clock_ms()
        async with self.db.redis.pipeline(transaction=True) as pipeline:
            pipeline.zremrangebyscore(self.db.keys.index, "-inf", now_ms)
            pipeline.zadd(self.db.keys.index, {federation_id: now_ms + self.db.retention_ms}, xx=not new)
            pipeline.pexpire(self.db.keys.index, self.db.retention_ms)
            await pipeline.execute()


def plans_and_openings(keys: Keys, record: FederationRecord) -> list[str]:
    """Keys of the plans and the openings that a record names."""
    openings = (result.opening for result in record.results)
    return [
        *(keys.plan(record.federation_id, plan.digest.sha256) for plan in record.plans),
        *(keys.opening(record.federation_id, opening.sha256) for opening in openings if opening),
    ]


def _kept(keys: Keys, record: FederationRecord) -> list[str]:
    """Keys that must live as long as the federation, whatever happens to it."""
    scope = record.federation_id, record.instance
    return [
        keys.members(record.federation_id),
        *plans_and_openings(keys, record),
        *(keys.round(*scope, sequence) for sequence in sorted(record.results_in_use)),
        *(keys.layout(record.federation_id, digest) for digest in sorted(record.layouts_in_use)),
    ]
