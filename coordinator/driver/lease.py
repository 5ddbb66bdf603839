"""A driver's right to drive a federation, for as long as it renews it."""

import asyncio

import structlog

from coordinator.driver.tolerance import tolerant
from coordinator.store.leases import LeaseStore
from services.common.parting import parting

_log = structlog.get_logger(__name__)


class Lease:
    """The lease of one federation under one token. Args: lease_s: seconds until another driver takes over."""

    def __init__(self, store: LeaseStore, federation_id: str, token: str, lease_s: float) -> None:
        self._store = store
        self._federation_id = federation_id
        self._token = token
        self._lease_s = lease_s

    async def acquire(self) -> bool:
        """Takes the lease. False: another driver holds it, or the store fails."""
        acquired = self._store.acquire(self._federation_id, self._token, self._lease_s)
        return await tolerant(acquired, "lease_failed") or False

    async def keep(self) -> None:
        """Renews the lease; returns when it is lost or cannot be renewed."""
        renewed = True
        while renewed:
            await asyncio.sleep(self._lease_s / 3)
            renewal = self._store.renew(self._federation_id, self._token, self._lease_s)
            renewed = await tolerant(renewal, "lease_failed") or False
        _log.warning("lease_lost", federation_id=self._federation_id)

    async def release(self) -> None:
        """Gives the lease back, so that another goes on at once; one that is not given back expires."""
        async with parting():
            await tolerant(self._store.release(self._federation_id, self._token), "release_failed")
