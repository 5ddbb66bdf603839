"""What a round's cohort has committed: updates and ballots; and what was refused."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from enum import IntEnum

from coordinator.records import Commit, Dealt, Dropped, FederationRecord, UpdateRecord
from coordinator.scripts import COMMIT
from coordinator.store.database import Database, available


class CommitOutcome(IntEnum):
    """What became of a commit; the numbers are the script's."""

    COMMITTED = 1
    REPEATED = 2
    REWRITTEN = 3
    NOT_COLLECTING = 4


class UpdateStore:
    """Committed updates of a round, one a client."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._commit = db.redis.register_script(COMMIT)

    @available
    async def commit(
        self, federation: FederationRecord, sequence: int, update: UpdateRecord, dealt: Dealt | None = None
    ) -> tuple[CommitOutcome, int]:
        """Counts an update of a collecting round once. Returns the update count of the (first) receipt.

        `dealt`: kept in the same step; None without a committee.
        """
        keys, scope = self.db.keys, (federation.federation_id, federation.instance, sequence)
        parts: dict[str, bytes] = {}
        if dealt is not None:
            parts = {keys.dealings(*scope): dealt.dealing}
            parts |= {keys.shares(*scope, place): share for place, share in enumerate(dealt.shares)}
        outcome, count = await self._commit(
            keys=[keys.round(*scope), keys.commits(*scope), *parts],
            args=[
                update.client_id,
                update.manifest_digest,
                update.model_dump_json(),
                self.db.retention_ms,
                keys.changes(federation.federation_id),
                *parts.values(),
            ],
        )
        return CommitOutcome(outcome), int(count)

    @available
    async def commit_of(self, federation: FederationRecord, sequence: int, client_id: str) -> Commit | None:
        """The committed update of a client."""
        data = await self.db.field(self._commits_key(federation, sequence), client_id)
        return None if data is None else _commit_from(data)

    @available
    async def commits(self, federation: FederationRecord, sequence: int) -> list[Commit]:
        """All committed updates, in the order they came."""
        fields = await self.db.fields(self._commits_key(federation, sequence))
        return sorted((_commit_from(data) for data in fields.values()), key=lambda commit: commit.ordinal)

    @available
    async def count(self, federation: FederationRecord, sequence: int) -> int:
        """Number of committed updates."""
        return int(await self.db.redis.hlen(self._commits_key(federation, sequence)))

    @available
    async def committed(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> AbstractSet[str]:
        """Those of some clients that have committed."""
        if not client_ids:
            return set()
        key = self._commits_key(federation, sequence)
        async with self.db.redis.pipeline(transaction=False) as pipeline:
            for client_id in client_ids:
                pipeline.hexists(key, client_id)
            found = zip(client_ids, await pipeline.execute(), strict=True)
        return {client_id for client_id, there in found if there}

    @available
    async def committers(self, federation: FederationRecord, sequence: int) -> AbstractSet[str]:
        """Everyone who has committed."""
        return await self.db.names(self._commits_key(federation, sequence))

    @available
    async def put_refusal(self, federation: FederationRecord, sequence: int, refusal: Dropped) -> None:
        """Keeps why a client's update was refused, or the client gave up; another refusal replaces it."""
        federation_id, client_id = federation.federation_id, refusal.client_id
        key = self.db.keys.refusals(federation_id, federation.instance, sequence)
        await self.db.put_field(federation_id, key, client_id, refusal.model_dump_json())
        if refusal.gave_up:  # it concerns the driver
            await self.db.announce(federation_id, client_id)

    @available
    async def refusals(self, federation: FederationRecord, sequence: int) -> list[Dropped]:
        """Refused updates, by client."""
        key = self.db.keys.refusals(federation.federation_id, federation.instance, sequence)
        return [Dropped.read(data) for data in (await self.db.fields(key)).values()]

    @available
    async def put_ballot(
        self, federation: FederationRecord, sequence: int, client_id: str, ballot: bytes
    ) -> None:
        """Keeps a client's ballot while its vote collects; before it is committed a repeat replaces it."""
        scope = (federation.federation_id, federation.instance, sequence)
        key, round_ = self.db.keys.ballots(*scope), self.db.keys.round(*scope)
        await self.db.put_field(federation.federation_id, key, client_id, ballot, collecting=round_)

    @available
    async def ballot(self, federation: FederationRecord, sequence: int, client_id: str) -> bytes | None:
        """A client's ballot; None if there is none (any more)."""
        key = self.db.keys.ballots(federation.federation_id, federation.instance, sequence)
        return await self.db.field(key, client_id)

    @available
    async def drop_ballots(self, federation: FederationRecord, sequence: int) -> None:
        """Deletes all ballots of a vote."""
        scope = (federation.federation_id, federation.instance, sequence)
        await self.db.redis.unlink(self.db.keys.ballots(*scope))

    def _commits_key(self, federation: FederationRecord, sequence: int) -> str:
        return self.db.keys.commits(federation.federation_id, federation.instance, sequence)


def _commit_from(data: bytes) -> Commit:
    ordinal, _, update = data.split(b" ", 2)
    return Commit(ordinal=int(ordinal), update=UpdateRecord.read(update))
