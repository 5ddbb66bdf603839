"""The operator's use cases: federations from creation to deletion."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from coordinator import transitions
from coordinator.handlers.limits import Limits, limit_reached
from coordinator.handlers.lookup import Lookup
from coordinator.records import FederationRecord, Phase
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class FederationHandlers:
    """What an operator asks for.

    Attributes:
        lookup: Records.
        new_instance: Eight random hex digits.
        limits: How much the coordinator takes on.
    """

    lookup: Lookup
    new_instance: Callable[[], str]
    limits: Limits

    async def create(self, spec: FederationSpec) -> FederationRecord:
        """Creates a federation, or finds it created.

        Raises: FEDERATION_EXISTS for another specification, LIMIT_REACHED.
        """
        await self._require_room(spec)
        record = FederationRecord(
            federation_id=spec.name,
            instance=self.new_instance(),
            spec=spec,
            created_ms=self.lookup.clock_ms(),
        )
        if await self.lookup.store.federations.write("create_federation", record, None):
            _log.info("federation_created", federation_id=spec.name)
            return record
        found = (await self.lookup.store.federations.read(spec.name)).record
        if found.spec != spec:
            raise DomainError(
                Reason.FEDERATION_EXISTS,
                f"federation {spec.name} exists with another specification: choose another name",
            )
        return found

    async def _require_room(self, spec: FederationSpec) -> None:
        if spec.round.clients > self.limits.max_members:
            raise limit_reached(
                f"round.clients = {spec.round.clients} can never join: this coordinator takes "
                f"{self.limits.max_members} members a federation (max_members)"
            )
        names = await self.lookup.store.federations.ids()
        if len(names) >= self.limits.max_federations and spec.name not in names:
            raise limit_reached(
                f"this coordinator holds {len(names)} federations, the most it takes (max_federations): wait until "
                "ended ones expire, or raise it"
            )

    async def start(self, federation_id: str) -> FederationRecord:
        """Lets a federation begin. Raises FEDERATION_UNKNOWN, FEDERATION_CLOSED."""
        return await self.lookup.store.federations.transact(
            "start_federation", federation_id, transitions.started
        )

    async def rotate(self, federation_id: str, from_epoch: int) -> FederationRecord:
        """Has a federation leave an epoch. Raises FEDERATION_UNKNOWN, FEDERATION_CLOSED, INVALID_ARGUMENT."""
        return await self.lookup.store.federations.transact(
            "ask_rotation", federation_id, lambda r: transitions.rotation_asked(r, from_epoch)
        )

    async def stop(self, federation_id: str) -> FederationRecord:
        """Has a federation end with its newest result. Raises FEDERATION_UNKNOWN."""
        record = await self.lookup.store.federations.transact(
            "ask_stop", federation_id, transitions.stop_asked
        )
        _log.info("stop_asked", federation_id=federation_id, trained=record.trained)
        return record

    async def extend(self, federation_id: str, rounds: int) -> FederationRecord:
        """Has a federation train so many rounds in all.

        Raises: FEDERATION_UNKNOWN, INVALID_ARGUMENT, FEDERATION_CLOSED.
        """
        before = await self.lookup.federation(federation_id)
        if before.phase is Phase.FINISHED and transitions.extended(before, rounds) != before:
            await self._require_result(before)
        record = await self.lookup.store.federations.transact(
            "extend_federation", federation_id, lambda r: transitions.extended(r, rounds)
        )
        _log.info("federation_extended", federation_id=federation_id, rounds=record.rounds)
        return record

    async def _require_result(self, record: FederationRecord) -> None:
        """Raises: FEDERATION_CLOSED unless aggregation still keeps the result that a finished federation ended with."""
        found = await self.lookup.store.rounds.read(record, record.result_sequence)
        if (
            found is None
            or self.lookup.clock_ms() > found.record.round.ended_ms + 1000 * self.limits.result_life_s
        ):
            raise DomainError(
                Reason.FEDERATION_CLOSED,
                f"federation {record.federation_id} finished so long ago that its last result is stored no longer "
                "(result_ttl_days): create another one; agents keep the adapter",
            )

    async def delete(self, federation_id: str) -> None:
        """Has everything of a federation deleted. Raises FEDERATION_UNKNOWN."""
        await self.lookup.store.federations.transact(
            "ask_deletion", federation_id, transitions.deletion_asked
        )
        _log.info("deletion_asked", federation_id=federation_id)

    async def all(self) -> list[FederationRecord]:
        """All federations, by name. One that expires meanwhile is left out."""
        records = []
        for federation_id in await self.lookup.store.federations.ids():
            with suppress(DomainError):
                records.append(await self.lookup.federation(federation_id))
        return records
