"""The rules of the key authority: who is given what, and what is written down about it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog

from services.common.detached import detached
from services.common.guard import Denial
from services.common.revocations import Revocations
from services.key_authority.audit import AuditLog
from services.key_authority.epochs import EpochId, EpochKeys
from services.key_authority.vault import Vault
from shelora.ckks.parameters import CkksParameters, profile
from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import counter
from shelora.transport.certificates import Certificate

KEY_RELEASES: Final = counter("key_releases_total", "Times the secrets of an epoch were given to an agent.")
KEY_REFUSALS: Final = counter("key_refusals_total", "Times an agent was refused the secrets of an epoch.")

REPEATS_POLL_S: Final = 60.0

_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = structlog.get_logger(__name__)


class Authority:
    """Opens epochs and releases their secrets.

    Args:
        vault: Where keys are kept.
        audit: Where openings, releases and refusals are written down before they are answered.
        revocations: Whose certificates are revoked.
        allow_insecure: Accept CKKS profiles below 128-bit security, for tests.
    """

    def __init__(
        self, vault: Vault, audit: AuditLog, revocations: Revocations, *, allow_insecure: bool = False
    ) -> None:
        self._vault = vault
        self._audit = audit
        self._revocations = revocations
        self._allow_insecure = allow_insecure

    async def open_epoch(self, epoch_id: EpochId, parameters: str) -> bytes:
        """Makes the keys of an epoch or finds them made. Returns the public key id, 16 bytes.

        Raises: DomainError INVALID_ARGUMENT if the profile is unknown, insecure, or not that of the first call;
        SECRET_UNAVAILABLE, STORE_UNAVAILABLE as `Vault.open_epoch`; STORE_UNAVAILABLE if it cannot be written down.
        """
        opened = await asyncio.to_thread(self._vault.open_epoch, epoch_id, self._accepted(parameters))
        await asyncio.to_thread(self._audit.epoch_opened, epoch_id, opened.key_id)
        _log.info("epoch_opened", audit_head=self._audit.head, **_fields(epoch_id, opened))
        return opened.key_id

    async def release(
        self, epoch_id: EpochId, client_id: str, holder: Certificate | None = None
    ) -> EpochKeys:
        """The secrets of an epoch, for a client of its federation. Every release is written down first.

        Args:
            epoch_id: The epoch.
            client_id: The agent, 1 to 64 characters of [A-Za-z0-9._-], for logs and audit. That its certificate
                names it and the federation is checked before (`services.common.guard`).
            holder: Its certificate. That it is not revoked is checked again after the keys were read: an epoch that
                was opened because of its revocation is never released to it, however the two calls raced.

        Raises: DomainError INVALID_ARGUMENT, FEDERATION_UNKNOWN if the epoch was not opened, EPOCH_RETIRED,
        CERTIFICATE_REVOKED; SECRET_UNAVAILABLE, STORE_UNAVAILABLE as `Vault.read`; STORE_UNAVAILABLE if it cannot be
        written down.
        """
        async with self._refusals_written_down(epoch_id, client_id):
            if not _CLIENT_ID.fullmatch(client_id):
                raise DomainError(
                    Reason.INVALID_ARGUMENT, "client_id must be 1 to 64 characters of [A-Za-z0-9._-]"
                )
            secrets = await asyncio.to_thread(self._vault.read, epoch_id)
            if holder is not None:
                self._revocations.check(holder)
        await asyncio.to_thread(self._audit.secrets_released, epoch_id, client_id, secrets.key_id)
        KEY_RELEASES.inc()
        _log.info(
            "key_released", client_id=client_id, audit_head=self._audit.head, **_fields(epoch_id, secrets)
        )
        return secrets

    async def retire(self, before: EpochId) -> None:
        """Destroys the keys of all epochs of a federation before one, for good. Once begun it is written down as well.

        Raises: DomainError STORE_UNAVAILABLE if the disk fails or it cannot be written down.
        """
        await asyncio.shield(detached(self._retired(before)))

    async def _retired(self, before: EpochId) -> None:
        retired = await asyncio.to_thread(self._vault.retire, before)
        await asyncio.to_thread(self._audit.epochs_retired, retired)
        _log.info(
            "epochs_retired",
            federation_id=before.federation_id,
            before_epoch=before.epoch,
            audit_head=self._audit.head,
        )

    async def list_repeats(self) -> None:
        """Has the audit log list how often things were repeated, once a minute. Never returns."""
        while True:
            await asyncio.sleep(REPEATS_POLL_S)
            await self._write_down(self._audit.list_repeats)

    async def denied(self, denial: Denial) -> None:
        """Writes down a call that the guard refused to the holder of a certificate.

        Strangers, who have none, are logged and counted by the guard alone: they could fill the disk. Never raises.
        """
        if denial.caller is not None:
            await self._write_down(self._audit.call_denied, denial.method, denial.caller, denial.reason)

    @asynccontextmanager
    async def _refusals_written_down(self, epoch_id: EpochId, client_id: str) -> AsyncIterator[None]:
        try:
            yield
        except DomainError as refusal:
            KEY_REFUSALS.inc()
            name = client_id if _CLIENT_ID.fullmatch(client_id) else None
            await self._write_down(self._audit.release_refused, epoch_id, name, refusal.reason)
            raise

    async def _write_down(self, write: Callable[..., None], *arguments: object) -> None:
        """A refusal stays one, with its own reason, even if it cannot be written down."""
        try:
            await asyncio.to_thread(write, *arguments)
        except DomainError as failure:
            _log.error("refusal_not_written_down", cause=failure.message)

    def _accepted(self, name: str) -> CkksParameters | None:
        if not name:
            return None
        parameters = profile(name)
        if not parameters.secure and not self._allow_insecure:
            raise DomainError(Reason.INVALID_ARGUMENT, f"the CKKS profile {parameters.name} is insecure")
        return parameters


def _fields(epoch_id: EpochId, secrets: EpochKeys) -> dict[str, str | int]:
    """What a log may say of an epoch."""
    return {
        "federation_id": epoch_id.federation_id,
        "epoch": epoch_id.epoch,
        "parameters": secrets.parameters,
        "key_id": secrets.key_id.hex(),
    }
