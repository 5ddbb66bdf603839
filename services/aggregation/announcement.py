"""Announces a replica to callers while it serves: in Redis, from where any replica names all of them."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from services.aggregation.store import ShardStore
from services.common.parting import parting
from shelora.errors import DomainError
from shelora.telemetry.outages import Outage
from shelora.transport.address import HostPort

PERIOD_S: Final = 5.0
"""Seconds between two announcements."""

LIFE_S: Final = 15.0
"""Seconds after which a replica that died is not named any more."""

_log = structlog.get_logger(__name__)


@asynccontextmanager
async def announced(
    store: ShardStore, advertise: str, serving: str, period_s: float = PERIOD_S
) -> AsyncIterator[None]:
    """Announces a replica until the context ends; then callers go elsewhere at once.

    Args:
        store: Where replicas are announced.
        advertise: Address for callers; its port 0 stands for that of `serving`.
        serving: Address on which the replica serves.
        period_s: Seconds between two announcements.

    Raises: DomainError CONFIGURATION_INVALID if `advertise` is not `host:port`.
    """
    given = HostPort.parse(advertise, listening=True)
    address = str(HostPort(given.host, given.port or HostPort.parse(serving).port))
    keeping = asyncio.create_task(_keep(store, address, period_s), name="announce")
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        async with parting():
            await _tolerated(store.withdraw(address), address, Outage(_log, "announcement_failed"))


async def _keep(store: ShardStore, address: str, period_s: float) -> None:
    outage = Outage(_log, "announcement_failed")
    while True:
        await _tolerated(store.announce(address, int(1000 * LIFE_S)), address, outage)
        await asyncio.sleep(period_s)


async def _tolerated(step: Coroutine[Any, Any, None], address: str, outage: Outage) -> None:
    """A store that does not answer costs an announcement: it is repeated, or it expires."""
    try:
        await step
    except DomainError as error:
        outage.failed(error, address=address)
    else:
        outage.ended()
