"""Records of rounds; the layouts of their updates, what has been aggregated, what members measured."""

from typing import Final

from coordinator.records import (
    Dropped,
    EvaluationRecord,
    FederationRecord,
    LayoutRecord,
    RoundRecord,
    ShardResult,
)
from coordinator.store.database import Database, Versioned, available
from shelora.errors import DomainError, Reason

SHARDS_MS: Final = 3_600_000
"""Life of a round's aggregated shards, in ms, from the last one on."""


class RoundStore:
    """Rounds of a federation by their sequence number."""

    def __init__(self, db: Database) -> None:
        self.db = db

    @available
    async def read(self, federation: FederationRecord, sequence: int) -> Versioned[RoundRecord] | None:
        """A round, or None if there is no record of it (any more)."""
        key = self.db.keys.round(federation.federation_id, federation.instance, sequence)
        return await self.db.read(key, RoundRecord)

    @available
    async def write(
        self, name: str, federation: FederationRecord, record: RoundRecord, revision: int
    ) -> bool:
        """Writes if the revision is still the newest; 0 creates. `name` is counted.

        False: another writer was first, or the federation is deleted.
        """
        names, federation_id = self.db.keys, federation.federation_id
        scope = (federation_id, federation.instance, record.sequence)
        keys = [names.round(*scope), names.commits(*scope), names.layout(federation_id, record.layout_digest)]
        if record.ranked is not None:  # in force once the round is settled
            keys.append(names.plan(federation_id, record.ranked.digest.sha256))
        if record.opening is not None:
            keys.append(names.opening(federation_id, record.opening.sha256))
        return await self.db.write(name, federation_id, keys, record, record.round.state, revision)

    @available
    async def put_layout(self, federation_id: str, layout: LayoutRecord, digest: str) -> None:
        """Keeps a layout for some minutes, and as long as its federation once a round names it.

        Raises: FEDERATION_UNKNOWN.
        """
        key = self.db.keys.layout(federation_id, digest)
        await self.db.put_value(federation_id, key, layout.model_dump_json())

    @available
    async def layout(self, federation_id: str, digest: str) -> LayoutRecord:
        """Raises ROUND_UNKNOWN: the layout has expired, and with it the rounds that used it."""
        data = await self.db.redis.get(self.db.keys.layout(federation_id, digest))
        if data is None:
            raise DomainError(Reason.ROUND_UNKNOWN, "the layout of the round has expired")
        return LayoutRecord.read(data)

    @available
    async def put_shard(
        self, federation: FederationRecord, record: RoundRecord, index: int, result: ShardResult
    ) -> None:
        """Keeps the result of a shard for the round's present set of contributors."""
        # Aggregation knows them, too: they spare calls while a round is aggregated, and are not history.
        key = self._shards_key(federation, record)
        await self.db.put_field(
            federation.federation_id, key, str(index), result.model_dump_json(), SHARDS_MS
        )

    @available
    async def shards(self, federation: FederationRecord, record: RoundRecord) -> dict[int, ShardResult]:
        """Shards aggregated so far, by index."""
        fields = await self.db.fields(self._shards_key(federation, record))
        return {int(index): ShardResult.read(data) for index, data in fields.items()}

    @available
    async def put_objection(self, federation: FederationRecord, sequence: int, objection: Dropped) -> bool:
        """Keeps why a round's result serves a client badly. False, and nothing is written, if it has said so before."""
        federation_id, client_id = federation.federation_id, objection.client_id
        key = self.db.keys.objections(federation_id, federation.instance, sequence)
        if await self.db.field(key, client_id) is not None:
            return False
        await self.db.put_field(federation_id, key, client_id, objection.model_dump_json())
        await self.db.announce(federation_id, client_id)
        return True

    @available
    async def objections(self, federation: FederationRecord, sequence: int) -> list[Dropped]:
        """Objections to a round's result, by client."""
        key = self.db.keys.objections(federation.federation_id, federation.instance, sequence)
        return [Dropped.read(data) for data in (await self.db.fields(key)).values()]

    @available
    async def put_evaluation(
        self, federation: FederationRecord, sequence: int, evaluation: EvaluationRecord
    ) -> None:
        """Adds or replaces a client's evaluation of a round's result."""
        key = self._evaluations_key(federation, sequence)
        data = evaluation.model_dump_json()
        await self.db.put_field(federation.federation_id, key, evaluation.client_id, data)

    @available
    async def evaluations(self, federation: FederationRecord, sequence: int) -> list[EvaluationRecord]:
        """Evaluations of a round's result, by client."""
        fields = await self.db.fields(self._evaluations_key(federation, sequence))
        return [EvaluationRecord.read(data) for data in fields.values()]

    def _evaluations_key(self, federation: FederationRecord, sequence: int) -> str:
        return self.db.keys.evaluations(federation.federation_id, federation.instance, sequence)

    def _shards_key(self, federation: FederationRecord, record: RoundRecord) -> str:
        generation = len(record.dropped)
        return self.db.keys.shards(federation.federation_id, federation.instance, record.sequence, generation)
