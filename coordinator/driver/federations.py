"""Steps of a federation: keys, its model, what is deleted."""

from typing import Protocol

import structlog

from coordinator import transitions
from coordinator.aggregation import AggregationPool
from coordinator.decisions import Delete, FixModel, OpenKeys, RetireEpochs, Sweep
from coordinator.driver.writing import Writer
from coordinator.records import FederationRecord, Garbage
from coordinator.store import Store, Versioned
from coordinator.votes import votes_of
from shelora.errors import DomainError, Reason
from shelora.transport.channel import is_transient

_log = structlog.get_logger(__name__)


class KeyAuthority(Protocol):
    """What the coordinator asks of the key authority."""

    async def open_epoch(self, federation_id: str, epoch: int, parameters: str) -> bytes:
        """The identifier of the epoch's CKKS key, 16 bytes. Raises EPOCH_RETIRED."""

    async def retire_epochs(self, federation_id: str, before: int) -> None:
        """Destroys the keys of the epochs before one."""


class FederationSteps:
    """Takes decisions about a federation.

    Args:
        store: State.
        writer: Of records.
        aggregation: Aggregation replicas.
        authority: The key authority.
    """

    def __init__(
        self, store: Store, writer: Writer, aggregation: AggregationPool, authority: KeyAuthority
    ) -> None:
        self._store = store
        self._writer = writer
        self._aggregation = aggregation
        self._authority = authority

    async def take(
        self,
        decision: OpenKeys | RetireEpochs | FixModel | Sweep | Delete,
        federation: Versioned[FederationRecord],
    ) -> None:
        """Does what was decided, on the revision it was decided on."""
        match decision:
            case OpenKeys(epoch):
                await self._open_keys(federation, epoch)
            case RetireEpochs(before):
                await self._authority.retire_epochs(federation.record.federation_id, before)
                retired = transitions.retired(federation.record, before)
                await self._writer.federation("retire_epochs", retired, federation)
            case FixModel(member):
                await self._fix_model(federation, member)
            case Sweep(garbage):
                for item in garbage:
                    await self._close_round(federation.record, item)
                swept = transitions.swept(federation.record, garbage)
                await self._writer.federation("sweep_garbage", swept, federation)
                if swept.ended and not swept.garbage:
                    await self._store.disposal.rewrite_log()
            case Delete():
                await self._delete(federation.record)

    async def _open_keys(self, federation: Versioned[FederationRecord], epoch: int) -> None:
        record = federation.record
        try:
            epoch, key_id = await self._opened_from(record, epoch)
        except DomainError as error:
            if is_transient(error):
                raise
            why = f"the key authority refused to make keys: {error.message}"
            failed = transitions.failed(record, why)
            await self._writer.federation("fail_federation", failed, federation)
            return
        began = transitions.with_key(record, epoch, key_id)
        await self._writer.federation("open_keys", began, federation)

    async def _fix_model(self, federation: Versioned[FederationRecord], member: str) -> None:
        """Fixes the model of a federation as that of a member."""
        model = await self._store.members.shapes(federation.record.federation_id, member)
        if model is not None:
            await self._writer.federation(
                "fix_model", transitions.with_model(federation.record, model), federation
            )

    async def _delete(self, federation: FederationRecord) -> None:
        """Deletes everything of a federation; its record last, so that it is tried again until all is gone."""
        federation_id = federation.federation_id
        kept = federation.results_in_use | ({federation.ticket.sequence} if federation.ticket else set())
        rounds = {federation.round_id(sequence) for sequence in kept}
        for round_id in sorted(rounds | {item.round_id for item in federation.garbage}):
            await self._aggregation.close_round(round_id, results=True)
        if federation.strategy.needs_keys:
            await self._authority.retire_epochs(federation_id, federation.epoch + 1)
        await self._store.disposal.delete(federation)
        await self._store.disposal.rewrite_log()
        _log.info("federation_deleted", federation_id=federation_id)

    async def _opened_from(self, record: FederationRecord, epoch: int) -> tuple[int, bytes]:
        """The first epoch from this one on that is not retired, as those of an expired namesake may be; and its key."""
        # A committee opens sums: there is no key that decrypts them.
        parameters = "" if record.strategy.needs_committee else record.spec.protection.parameters
        while True:
            try:
                return epoch, await self._authority.open_epoch(record.federation_id, epoch, parameters)
            except DomainError as error:
                if error.reason is not Reason.EPOCH_RETIRED:
                    raise
                epoch += 1

    async def _close_round(self, federation: FederationRecord, garbage: Garbage) -> None:
        """Has everything of an ended round deleted, wherever it lies."""
        sequence = federation.sequence_of(garbage.round_id)
        if sequence is not None:
            await votes_of(federation).drop(self._store, federation, sequence)
        if sequence is not None and federation.strategy.needs_committee:
            await self._store.committees.drop(federation, sequence)
        await self._aggregation.close_round(garbage.round_id, results=garbage.results)
