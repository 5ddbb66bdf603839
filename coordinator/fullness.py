"""How full Redis is: asked now and then, for two gauges. Nothing depends on the answer."""

import asyncio
from typing import Final

import structlog
from redis.exceptions import RedisError

from coordinator.metrics import REDIS_LIMIT, REDIS_USED
from coordinator.store import RedisClient

POLL_S: Final = 15.0
"""Seconds between two questions: as often as Prometheus usually asks."""

TIMEOUT_S: Final = 5.0

_log = structlog.get_logger(__name__)


async def watch_fullness(redis: RedisClient, poll_s: float = POLL_S) -> None:
    """Sets the gauges again and again. Never returns.

    A Redis that does not answer, or does not let this user ask (`INFO`), leaves both at 0, which is logged once.
    """
    told = False
    while True:
        try:
            used, limit = await _asked(redis)
            told = False
        except (RedisError, OSError) as error:
            used = limit = 0
            if not told:
                _log.warning("redis_fullness_unknown", why=str(error))
            told = True
        REDIS_USED.set(used)
        REDIS_LIMIT.set(limit)
        await asyncio.sleep(poll_s)


async def _asked(redis: RedisClient) -> tuple[int, int]:
    """Bytes used, bytes allowed. Raises RedisError, OSError (a TimeoutError is one)."""
    async with asyncio.timeout(TIMEOUT_S):
        memory = await redis.info("memory")
    return memory["used_memory"], memory.get("maxmemory", 0)
