"""How full Redis is: asked now and then."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import structlog
from redis.exceptions import RedisError

TIMEOUT_S: Final = 5.0

Tell = Callable[[int, int], object]
"""Takes the bytes used and the bytes allowed, 0 for any number; both 0 if they are not known."""

_log = structlog.get_logger(__name__)


class RedisClient(Protocol):
    """What is asked of a client."""

    def info(self, section: str) -> Awaitable[Any]:
        """The named section of INFO."""


async def watch_fullness(redis: RedisClient, tell: Tell, poll_s: float) -> None:
    """Asks every `poll_s` seconds. Never returns.

    A Redis that does not answer, or does not let this user ask (`INFO`), counts as not known, which is logged once.
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
        tell(used, limit)
        await asyncio.sleep(poll_s)


async def _asked(redis: RedisClient) -> tuple[int, int]:
    """Bytes used, bytes allowed. Raises RedisError, OSError (a TimeoutError is one)."""
    async with asyncio.timeout(TIMEOUT_S):
        memory = await redis.info("memory")
    return memory["used_memory"], memory.get("maxmemory", 0)
