"""Who drives a federation: a lease for some seconds."""

from coordinator.scripts import RELEASE, RENEW
from coordinator.store.database import Database, available


class LeaseStore:
    """Leases by federation, each held under a token that nobody else knows."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._renew = db.redis.register_script(RENEW)
        self._release = db.redis.register_script(RELEASE)

    @available
    async def acquire(self, federation_id: str, token: str, lease_s: float) -> bool:
        """Takes the lease of a federation if nobody holds it."""
        key = self.db.keys.lease(federation_id)
        return bool(await self.db.redis.set(key, token, nx=True, px=int(1000 * lease_s)))

    @available
    async def renew(self, federation_id: str, token: str, lease_s: float) -> bool:
        """Prolongs a lease. False: it is lost."""
        key = self.db.keys.lease(federation_id)
        return bool(await self._renew(keys=[key], args=[token, int(1000 * lease_s)]))

    @available
    async def release(self, federation_id: str, token: str) -> None:
        """Gives a lease back, if it is still held."""
        await self._release(keys=[self.db.keys.lease(federation_id)], args=[token])
