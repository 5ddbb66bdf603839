"""The rules of the key authority: who is given what, and what is written down about it."""

import asyncio
import re
from typing import Final

import structlog

from services.key_authority.epochs import EpochId, EpochSecrets
from services.key_authority.vault import Vault
from shelora.ckks.parameters import CkksParameters, profile
from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import counter

KEY_RELEASES: Final = counter("key_releases_total", "Times the secrets of an epoch were given to an agent.")

_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = structlog.get_logger(__name__)


class Authority:
    """Opens epochs and releases their secrets.

    Args:
        vault: Where keys are kept.
        allow_insecure: Accept CKKS profiles below 128-bit security, for tests.
    """

    def __init__(self, vault: Vault, *, allow_insecure: bool = False) -> None:
        self._vault = vault
        self._allow_insecure = allow_insecure

    async def open_epoch(self, epoch_id: EpochId, parameters: str) -> bytes:
        """Makes the keys of an epoch or finds them made. Returns the public key id, 16 bytes.

        Raises: DomainError INVALID_ARGUMENT if the profile is unknown, insecure, or not that of the first call;
        SECRET_UNAVAILABLE, STORE_UNAVAILABLE as `Vault.open_epoch`.
        """
        opened = await asyncio.to_thread(self._vault.open_epoch, epoch_id, self._accepted(parameters))
        _log.info("epoch_opened", **_fields(epoch_id, opened))
        return opened.key_id

    async def release(self, epoch_id: EpochId, client_id: str) -> EpochSecrets:
        """The secrets of an epoch, for a client of its federation. Every release is counted and logged.

        Args:
            epoch_id: The epoch.
            client_id: The agent, 1 to 64 characters of [A-Za-z0-9._-], for the log. That its certificate names it and
                the federation is checked before (`services.shell.guard`).

        Raises: DomainError INVALID_ARGUMENT, FEDERATION_UNKNOWN if the epoch was not opened;
        SECRET_UNAVAILABLE, STORE_UNAVAILABLE as `Vault.read`.
        """
        if not _CLIENT_ID.fullmatch(client_id):
            raise DomainError(
                Reason.INVALID_ARGUMENT, "client_id must be 1 to 64 characters of [A-Za-z0-9._-]"
            )
        secrets = await asyncio.to_thread(self._vault.read, epoch_id)
        KEY_RELEASES.inc()
        _log.info("key_released", client_id=client_id, **_fields(epoch_id, secrets))
        return secrets

    def _accepted(self, name: str) -> CkksParameters:
        parameters = profile(name)
        if not parameters.secure and not self._allow_insecure:
            raise DomainError(Reason.INVALID_ARGUMENT, f"the CKKS profile {parameters.name} is insecure")
        return parameters


def _fields(epoch_id: EpochId, secrets: EpochSecrets) -> dict[str, str | int]:
    """What a log may say of an epoch."""
    return {
        "federation_id": epoch_id.federation_id,
        "epoch": epoch_id.epoch,
        "parameters": secrets.parameters,
        "key_id": secrets.key_id.hex(),
    }
