"""What clients state to a round's committee: who may state it, verified, and kept as it was said first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from coordinator import checks
from coordinator.committees import context_of
from coordinator.records import FederationRecord, RoundRecord, Statement
from coordinator.store import StateOutcome, Store
from shelora.committee.context import RoundContext
from shelora.committee.dealing import dealing_digest, read_dealing
from shelora.committee.statements import StatementKind, Trust
from shelora.committee.verdict import Checked
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2

_ORDER_HEX: Final = 64


def views_in(statements: Mapping[str, bytes]) -> dict[str, str]:
    """Digest of the committee in stored views, by client."""
    return {name: statement[:_ORDER_HEX].decode() for name, statement in statements.items()}


def key_of(statement: bytes) -> committee_pb2.Signed | None:
    """The signed key in a stored view; None if the client is not a member."""
    signed = statement[_ORDER_HEX:]
    return committee_pb2.Signed.FromString(signed) if signed else None


def dealings_in(context: RoundContext, dealings: Mapping[str, bytes]) -> dict[str, tuple[bytes, int]]:
    """Digest and weight of stored dealings, by client."""
    read = {name: committee_pb2.Signed.FromString(dealing) for name, dealing in dealings.items()}
    return {
        name: (dealing_digest(dealing), read_dealing(context, dealing.content).weight)
        for name, dealing in read.items()
    }


def checked_in(context: RoundContext, record: RoundRecord, checks: Mapping[str, bytes]) -> dict[int, Checked]:
    """Stored checks by the position of their member."""
    return {
        record.order.index(name) + 1: Checked.read(context, committee_pb2.Signed.FromString(check).content)
        for name, check in checks.items()
    }


@dataclass(frozen=True, kw_only=True)
class Statements:
    """Keeps statements.

    Attributes:
        store: State.
        clock_ms: Unix milliseconds.
        root: Certificate of the authority in DER, whose clients' statements are believed.
    """

    store: Store
    clock_ms: Callable[[], int]
    root: bytes

    def trust(self, federation_id: str) -> Trust:
        """Who is believed in a federation."""
        return Trust(self.root, federation_id, lambda: datetime.fromtimestamp(self.clock_ms() / 1000, UTC))

    async def round(
        self, federation_id: str, round_id: str, client_id: str
    ) -> tuple[FederationRecord, RoundRecord]:
        """A round that asked this client. Raises: ROUND_UNKNOWN, INVALID_ARGUMENT, NOT_IN_COHORT."""
        federation = (await self.store.federations.read(federation_id)).record
        await self.store.presence.touch(federation_id, client_id, self.clock_ms())
        sequence = federation.sequence_of(round_id)
        found = await self.store.rounds.read(federation, sequence) if sequence else None
        if found is None:
            raise DomainError(Reason.ROUND_UNKNOWN, "the federation has no such round (any more)")
        record = found.record
        checks.require(record.round.convenes, "this round has no committee")
        if client_id not in record.round.cohort:
            raise DomainError(Reason.NOT_IN_COHORT, "this client was not asked for an update in this round")
        return federation, record

    async def keep_of_member(
        self,
        statement: Statement,
        kind: StatementKind,
        federation: FederationRecord,
        record: RoundRecord,
        client_id: str,
        signed: committee_pb2.Signed,
    ) -> None:
        """Keeps what a member signed. Raises: NOT_IN_COHORT, SIGNATURE_REFUSED, STATEMENT_REWRITTEN, STEP_OVER."""
        if client_id not in record.order:
            raise DomainError(Reason.NOT_IN_COHORT, "this client is not a member of the round's committee")
        self.trust(federation.federation_id).verify(signed, kind, context_of(federation, record), client_id)
        content = signed.SerializeToString(deterministic=True)
        await self.keep(statement, federation, record, client_id, content)

    async def keep(
        self,
        kind: Statement,
        federation: FederationRecord,
        record: RoundRecord,
        client_id: str,
        content: bytes,
        order: tuple[str, ...] = (),
    ) -> None:
        """Keeps a statement that was verified. Args: order: of a view. Raises: STATEMENT_REWRITTEN, STEP_OVER."""
        outcome = await self.store.committees.state(
            kind, federation, record.sequence, client_id, content, order
        )
        if outcome is StateOutcome.REWRITTEN:
            raise DomainError(
                Reason.STATEMENT_REWRITTEN,
                "this client has stated something else to the committee of this round",
            )
        if outcome is StateOutcome.OVER:
            raise over()


def over() -> DomainError:
    """What is stated or asked for too late, or too early."""
    return DomainError(Reason.STEP_OVER, "the committee of this round is at another step")
