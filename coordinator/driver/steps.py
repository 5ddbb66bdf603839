"""Takes the steps that `coordinator.decisions` names."""

from coordinator.decisions import (
    Aggregate,
    CreateRound,
    Decision,
    Done,
    OpenRound,
    PublishOpened,
    Rest,
    WriteFederation,
    WriteRound,
)
from coordinator.driver.federations import FederationSteps
from coordinator.driver.rounds import RoundSteps
from coordinator.driver.writing import Writer
from coordinator.records import FederationRecord, LayoutRecord, RoundRecord
from coordinator.store import Store, Versioned


class Steps:
    """Does what was decided.

    Args:
        store: State.
        writer: Of records.
        federations: Steps of a federation.
        rounds: Steps of a round.
    """

    def __init__(
        self, store: Store, writer: Writer, federations: FederationSteps, rounds: RoundSteps
    ) -> None:
        self.federations = federations
        self.rounds = rounds
        self._store = store
        self._writer = writer

    async def take(
        self,
        decision: Decision,
        federation: Versioned[FederationRecord],
        round_: Versioned[RoundRecord] | None,
    ) -> None:
        """Does what was decided, on the revisions it was decided on."""
        match decision:
            case Rest() | Done():
                return
            case WriteFederation(name, record):
                await self._writer.federation(name, record, federation)
            case CreateRound(record, layout):
                layout_record, digest = LayoutRecord.of(layout), record.layout_digest
                await self._store.rounds.put_layout(federation.record.federation_id, layout_record, digest)
                if record.sequence == 1:
                    await self._store.members.drop_shapes(federation.record.federation_id)
                await self._writer.round("create_round", federation.record, record, 0)
            case OpenRound() | WriteRound() | Aggregate() | PublishOpened():
                await self.rounds.take(decision, federation.record, round_)
            case _:
                await self.federations.take(decision, federation)
