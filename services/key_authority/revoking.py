"""Revoking clients and roles: in the register, in the audit log, and in force at once."""

import asyncio
from collections.abc import Callable

import structlog

from services.common.detached import detached
from services.common.revocations import Revocations
from services.key_authority.audit import AuditLog
from services.key_authority.register import Register, Revoked
from shelora.transport.identity import Identity
from shelora.transport.revocations import Revocation

_log = structlog.get_logger(__name__)


class Revoker:
    """Revokes clients and roles.

    Args:
        register: Keeps revocations. Those that only the audit log knows are entered: the register may be older.
        audit: Where they are written down before they are answered.
        known: What this server's guard goes by.
        clock_ms: Unix milliseconds.
    """

    def __init__(
        self, register: Register, audit: AuditLog, known: Revocations, clock_ms: Callable[[], int]
    ) -> None:
        self._register = register
        self._audit = audit
        self._known = known
        self._clock_ms = clock_ms

    async def load(self) -> None:
        """Takes up what was revoked before this start. Raises: DomainError STORE_UNAVAILABLE."""
        await asyncio.to_thread(self._register.restore, self._audit.revocations)
        while found := await self.listed(self._known.newest_ms):
            self._known.learn(entry.revocation for entry in found)

    async def revoke(self, identity: Identity) -> Revocation:
        """Ends the certificates of a client or a role. In force when this returns, even if it cannot be written down.

        Once begun it is done wholly: a caller that is cancelled leaves no revocation that this server does not enforce.

        Raises: DomainError CLIENT_UNKNOWN, STORE_UNAVAILABLE.
        """
        revoking = detached(self._revoked(identity))
        try:
            return await asyncio.shield(revoking)
        finally:
            if revoking.done():
                self._known.end_calls()  # last: this may be one of them, and nothing may come between it and its answer
            else:
                revoking.add_done_callback(lambda _: self._known.end_calls())

    async def _revoked(self, identity: Identity) -> Revocation:
        revocation = await asyncio.to_thread(self._register.revoke, identity, self._clock_ms)
        self._known.refuse([revocation])
        await asyncio.to_thread(self._audit.revoked, revocation)
        _log.warning(
            "revoked", identity=identity.uri, at_unix_ms=revocation.at_ms, audit_head=self._audit.head
        )
        return revocation

    async def listed(self, after_ms: int) -> list[Revoked]:
        """The oldest revocations later than `after_ms`, Unix milliseconds. Raises: DomainError STORE_UNAVAILABLE."""
        return await asyncio.to_thread(self._register.revocations, after_ms)
