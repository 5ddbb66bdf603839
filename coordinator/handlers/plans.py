"""Use cases of plans: the leader publishes one, members read it, some reject it."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from coordinator import checks, transitions
from coordinator.handlers.lookup import Lookup
from coordinator.records import Dropped, FederationRecord, StoredDigest
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import Digest, collect
from shelora.v1 import common_pb2

MAX_PLAN_BYTES: Final = 64 * 2**20
"""Largest sealed plan: four bytes a column, so sixteen million columns."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PlanHandlers:
    """Plans by number. Attributes: lookup: Records."""

    lookup: Lookup

    async def publish(
        self,
        federation_id: str,
        client_id: str,
        number: int,
        digest: Digest,
        matrices: Sequence[common_pb2.Matrix],
        pieces: AsyncIterator[bytes],
    ) -> None:
        """Takes the leader's sealed plan. Raises NOT_LEADER, INVALID_ARGUMENT, DIGEST_MISMATCH, TRANSFER_*."""
        stored = StoredDigest(sha256=digest.sha256.hex(), total_bytes=digest.total_bytes)
        before = await self.lookup.federation(federation_id)
        counted = checks.plan(before, client_id, number, matrices)

        def published(record: FederationRecord) -> FederationRecord:
            return transitions.with_plan(record, client_id, number, stored, counted)

        if published(before) == before:  # refuses before a byte is read
            return
        sealed = await collect(pieces, digest, MAX_PLAN_BYTES)
        await self.lookup.store.plans.put(federation_id, stored.sha256, sealed)
        await self.lookup.store.federations.transact("publish_plan", federation_id, published)
        _log.info("plan_published", federation_id=federation_id, client_id=client_id, plan_number=number)

    async def read(self, federation_id: str, number: int) -> bytes:
        """A sealed plan that is in use. Raises PLAN_UNKNOWN."""
        federation = await self.lookup.federation(federation_id)
        plan = next((plan for plan in federation.plans if plan.number == number), None)
        if plan is None:
            raise DomainError(Reason.PLAN_UNKNOWN, f"plan {number} is not in use")
        return await self.lookup.store.plans.read(federation_id, plan.digest.sha256)

    async def reject(self, federation_id: str, client_id: str, number: int, sha256: str, why: str) -> None:
        """Notes that a member refuses a plan; the driver discards it if too many do.

        Raises: CLIENT_UNKNOWN, PLAN_UNKNOWN.
        """
        await self.lookup.member(federation_id, client_id)
        federation = await self.lookup.federation(federation_id)
        if transitions.require_in_force(federation, number, sha256):
            objection = Dropped(client_id=client_id, reason=Reason.PLAN_REFUSED, why=why, gave_up=True)
            await self.lookup.store.plans.put_objection(federation, number, objection)
        _log.warning(
            "plan_rejected", federation_id=federation_id, client_id=client_id, plan_number=number, why=why
        )
