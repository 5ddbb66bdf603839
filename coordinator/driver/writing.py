"""Writes what was decided, on the revision it was decided on; says and counts what was written."""

import structlog

from coordinator.metrics import REFUSALS_TOTAL, ROUNDS_TOTAL, STAGE_SECONDS
from coordinator.records import FederationRecord, RoundRecord
from coordinator.store import Store, Versioned
from shelora.rounds import RoundState

_log = structlog.get_logger(__name__)


class Writer:
    """Records of federations and rounds. An overtaken write is not an error: the driver decides anew."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def federation(
        self, name: str, record: FederationRecord, before: Versioned[FederationRecord]
    ) -> None:
        """Writes a federation."""
        if await self._store.federations.write(name, record, before):
            seen = record.early_stopping.model_dump(exclude={"format"}) if record.early_stopping else {}
            _log.info(
                name,
                federation_id=record.federation_id,
                phase=record.phase,
                failure=record.failure,
                **{f"stop_{field}": value for field, value in seen.items()},
            )

    async def round(
        self, name: str, federation: FederationRecord, record: RoundRecord, revision: int
    ) -> None:
        """Writes a round; revision 0 creates."""
        if await self._store.rounds.write(name, federation, record, revision):
            _log.info(
                name, round_id=record.round.round_id, state=record.round.state, reason=record.round.reason
            )
            _measure(record)


def _measure(record: RoundRecord) -> None:
    """Counts what a written round has just gone through."""
    round_ = record.round
    if round_.ended:
        ROUNDS_TOTAL.labels(round_.kind, round_.state, round_.reason or "").inc()
        for drop in record.dropped:
            REFUSALS_TOTAL.labels(drop.reason).inc()
    if round_.state is RoundState.AGGREGATING and not record.dropped:
        STAGE_SECONDS.labels(round_.kind, "collecting").observe((record.closed_ms - round_.opened_ms) / 1000)
    if round_.state is RoundState.PUBLISHED:
        STAGE_SECONDS.labels(round_.kind, "aggregating").observe(record.aggregate_wall_s)
