"""The use cases of a round's committee: who may state what, in which step; what is handed on to whom.

What clients sign is verified here too, although agents check it themselves: what a member signed wrongly would
otherwise be counted, and found out only when it is too late for another round.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from coordinator import checks
from coordinator.changes import Changes
from coordinator.committees import context_of, rule_of
from coordinator.openings import Openings
from coordinator.records import Dealt, FederationRecord, RoundRecord, Statement
from coordinator.statements import Statements, key_of, over
from coordinator.store import StateOutcome, Store, order_digest
from services.common.single_flight import SingleFlight
from shelora.committee.dealing import check_dealt, shown, update_digest
from shelora.committee.rules import SHARES_AT_ONCE
from shelora.committee.statements import StatementKind, parsed
from shelora.committee.verdict import Checked
from shelora.errors import DomainError, Reason
from shelora.rounds import RoundState
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb

KEYS_WAIT_S: Final = 10.0
"""Seconds that a client's call for the committee's keys waits for them."""
SHOWN_KEPT: Final = 64
"""Batches of dealings kept, 50 KB each: members are shown the same ones at about the same time."""
SEATED_KEPT: Final = 16
"""Committees whose keys are kept: those of the rounds in progress, 45 KB each at most."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Convening:
    """The coordinator's use cases for committees.

    Attributes:
        store: State.
        changes: Wake-ups.
        statements: What clients state.
        openings: What opens results.
        seated: Keys of the newest seated committees, by round: read once for all clients of a cohort.
        shown: Dealings, by round, number of dropped updates and first of a batch: read once for all members.
    """

    store: Store
    changes: Changes
    statements: Statements
    openings: Openings
    seated: SingleFlight[str, list[committee_pb2.Signed]] = field(
        default_factory=lambda: SingleFlight(SEATED_KEPT)
    )
    shown: SingleFlight[tuple[str, int, int], dict[str, bytes]] = field(
        default_factory=lambda: SingleFlight(SHOWN_KEPT)
    )

    async def post_key(
        self,
        federation_id: str,
        round_id: str,
        client_id: str,
        order: tuple[str, ...],
        key: committee_pb2.Signed | None,
    ) -> None:
        """Counts which committee a client works out, and keeps its key.

        More than half seat a committee: what another client that is not a member says later is not needed.

        Raises: ROUND_UNKNOWN, NOT_IN_COHORT, INVALID_ARGUMENT, SIGNATURE_REFUSED, STATEMENT_REWRITTEN, STEP_OVER.
        """
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        cohort = set(record.round.cohort)
        checks.require(
            len(order) == len(set(order)) == rule_of(record).size and cohort.issuperset(order),
            f"order must name {rule_of(record).size} clients of the round's cohort",
        )
        member = client_id in order
        checks.require(member == (key is not None), "key must be set for a member, and only then")
        if key is not None:
            context = context_of(federation, record)
            self.statements.trust(federation_id).verify(key, StatementKind.COMMITTEE_KEY, context, client_id)
            content = parsed(committee_pb2.CommitteeKey, key.content)
            checks.require(
                content.position == order.index(client_id) + 1, "key: position must be that in the order"
            )
        statement = order_digest(order).encode() + (key.SerializeToString(deterministic=True) if key else b"")
        try:
            await self.statements.keep(Statement.VIEW, federation, record, client_id, statement, order)
        except DomainError as error:
            if (
                error.reason is not Reason.STEP_OVER
                or member
                or not await self._is_seated(federation, record)
            ):
                raise

    async def keys(self, federation_id: str, round_id: str, client_id: str) -> list[committee_pb2.Signed]:
        """The keys of a seated committee, in its order; waits for it a while.

        Raises: ROUND_UNKNOWN, NOT_IN_COHORT, COMMITTEE_INCOMPLETE: not yet, STEP_OVER: never.
        """
        ends_ms = self.statements.clock_ms() + 1000 * KEYS_WAIT_S
        with self.changes.subscribed(federation_id, client_id) as signal:
            while True:
                federation, record = await self.statements.round(federation_id, round_id, client_id)
                if record.order:
                    return await self.seated.get(
                        record.round.round_id, partial(self._keys, federation, record)
                    )
                if record.round.ended:
                    raise over()
                left_ms = ends_ms - self.statements.clock_ms()
                if left_ms <= 0 or self.changes.closed:
                    raise DomainError(
                        Reason.COMMITTEE_INCOMPLETE, "members of the committee have not given their keys yet"
                    )
                await signal.wait(left_ms / 1000)

    async def _keys(self, federation: FederationRecord, record: RoundRecord) -> list[committee_pb2.Signed]:
        found = await self.store.committees.statements(
            Statement.VIEW, federation, record.sequence, record.order
        )
        keys = [key_of(found[name]) for name in record.order if name in found]
        if len(keys) != len(record.order):
            raise over()  # the round is over, and what was stated is deleted
        return [key for key in keys if key is not None]

    async def leave(self, federation_id: str, round_id: str, client_id: str) -> None:
        """Notes that a member lost its key. Raises: ROUND_UNKNOWN, NOT_IN_COHORT."""
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        outcome = await self.store.committees.state(
            Statement.DEPARTURE, federation, record.sequence, client_id, b"left"
        )
        if outcome is StateOutcome.STATED:
            _log.info("member_left_committee", round_id=round_id, client_id=client_id)

    async def shares(
        self, federation_id: str, round_id: str, client_id: str
    ) -> AsyncGenerator[committee_pb2.DealtShare, None]:
        """What a member is shown of every dealer, by name.

        Raises: ROUND_UNKNOWN, NOT_IN_COHORT, STEP_OVER.
        """
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        if client_id not in record.order or not record.round.closed or record.round.ended:
            raise over()
        place, sequence = record.order.index(client_id), record.sequence
        dealers = sorted(await self.store.committees.dealers(federation, sequence) - record.dropped_ids)
        for first in range(0, len(dealers), SHARES_AT_ONCE):
            batch = dealers[first : first + SHARES_AT_ONCE]
            dealings = await self.shown.get(
                (round_id, len(record.dropped), first),
                partial(self.store.committees.dealings, federation, sequence, batch),
            )
            shares = await self.store.committees.shares(federation, sequence, place, batch)
            for name in batch:
                if name in shares and name in dealings:
                    part = committee_pb2.DealtShare.FromString(shares[name])
                    part.dealing.MergeFromString(dealings[name])
                    yield part

    async def check(
        self, federation_id: str, round_id: str, client_id: str, check: committee_pb2.Signed
    ) -> None:
        """Keeps what a member found. Raises: as `sign`."""
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        found = Checked.read(context_of(federation, record), check.content)
        own = client_id in record.order and record.order.index(client_id) + 1 == found.position
        checks.require(own, "check: position must be the member's")
        await self.statements.keep_of_member(
            Statement.CHECK, StatementKind.CHECK, federation, record, client_id, check
        )

    async def sign(
        self, federation_id: str, round_id: str, client_id: str, signature: committee_pb2.SetSignature
    ) -> None:
        """Keeps a member's signature of the proposed set. One that comes when a quorum has signed is not needed.

        Raises: ROUND_UNKNOWN, NOT_IN_COHORT, SET_REFUSED, SIGNATURE_REFUSED, STATEMENT_REWRITTEN, STEP_OVER.
        """
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        if not record.proposed:
            raise over()
        signed = committee_pb2.Signed(
            content=bytes.fromhex(record.proposed),
            signature=signature.signature,
            certificate=signature.certificate,
        )
        try:
            await self.statements.keep_of_member(
                Statement.SIGNATURE, StatementKind.SET, federation, record, client_id, signed
            )
        except DomainError as error:
            if error.reason is not Reason.STEP_OVER or not await self._is_certified(federation, record):
                raise

    async def _is_seated(self, federation: FederationRecord, record: RoundRecord) -> bool:
        """Whether the round has its committee, by now."""
        found = await self.store.rounds.read(federation, record.sequence)
        return found is not None and bool(found.record.order) and not found.record.round.ended

    async def _is_certified(self, federation: FederationRecord, record: RoundRecord) -> bool:
        """Whether a quorum has signed the set, by now."""
        found = await self.store.rounds.read(federation, record.sequence)
        return found is not None and found.record.round.state in {
            RoundState.AGGREGATING,
            RoundState.PUBLISHED,
        }

    async def answer(
        self, federation_id: str, round_id: str, client_id: str, answer: committee_pb2.Signed
    ) -> None:
        """Keeps the sum of a member's shares. Raises: as `sign`."""
        federation, record = await self.statements.round(federation_id, round_id, client_id)
        await self.statements.keep_of_member(
            Statement.ANSWER, StatementKind.ANSWER, federation, record, client_id, answer
        )

    async def opening(
        self, federation_id: str, round_id: str, *, has_keys: bool = False
    ) -> pb.GetOpeningResponse:
        """What opens a round's sum, without certificates if the caller has the committee's keys.

        Raises: RESULT_UNKNOWN.
        """
        return await self.openings.of(federation_id, round_id, has_keys=has_keys)

    def dealt(
        self,
        federation: FederationRecord,
        record: RoundRecord,
        client_id: str,
        shards: list[bytes],
        dealt: committee_pb2.DealtShares,
    ) -> Dealt:
        """The dealing of an update as it is kept.

        Args: shards: SHA-256 of each shard of the update.
        Raises: DEALING_REFUSED, SIGNATURE_REFUSED.
        """
        context = context_of(federation, record)
        dealing = check_dealt(context, dealt)
        self.statements.trust(federation.federation_id).verify(
            dealt.dealing, StatementKind.DEALING, context, client_id
        )
        if dealing.update_digest != update_digest(shards):
            raise DomainError(Reason.DEALING_REFUSED, "the dealing is of another update than the commit")
        parts = shown(context, dealt)
        shares = tuple(
            parts[position].SerializeToString(deterministic=True) if position in parts else b""
            for position in range(1, context.rule.size + 1)
        )
        return Dealt(dealt.dealing.SerializeToString(deterministic=True), shares)
