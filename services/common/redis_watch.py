"""Whether Redis lets this server work: asked at start and ever after, told in Redis' own words, once."""

import asyncio
from typing import Final

import structlog
from redis.exceptions import RedisError

from services.common.readiness import Readiness
from services.common.redis_client import RedisClient, passes, refusal
from services.common.redis_dialect import misdialled
from shelora.errors import DomainError, Reason

TIMEOUT_S: Final = 5.0
POLL_S: Final = 5.0
SOON_S: Final = 1.0
"""Seconds without a reply at start after which we look whether the server speaks TLS as we do."""
_SCRIPT: Final = "return redis.call('EXISTS', KEYS[1], KEYS[2])"

_log = structlog.get_logger(__name__)


async def require_accepted(redis: RedisClient, prefix: str) -> None:
    """Returns once Redis has accepted what this server does, or is silent or busy, which may pass.

    Args:
        redis: A client.
        prefix: Of the server's keys.

    Raises: DomainError CONFIGURATION_INVALID, in Redis' words, if it refuses for a reason that does not pass, or if
    what is there speaks TLS where none is asked for, none where it is, or is not Redis.
    """
    attempt = asyncio.create_task(_tried(redis, prefix))
    try:
        done, _ = await asyncio.wait({attempt}, timeout=SOON_S)
        if not done:
            await _require_understood(redis)
        await attempt
    except (RedisError, OSError) as error:
        said = refusal(error)
        if said is None:
            await _require_understood(redis, error)
        elif not passes(error):
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"redis_url: Redis refuses this server: {said}"
            ) from None
    finally:
        attempt.cancel()


async def _require_understood(redis: RedisClient, error: BaseException | None = None) -> None:
    """Raises CONFIGURATION_INVALID if what is there does not speak as redis_url says."""
    if why := await misdialled(redis, error):
        raise DomainError(Reason.CONFIGURATION_INVALID, f"redis_url: {why}") from None


async def watch_redis(redis: RedisClient, prefix: str, readiness: Readiness, poll_s: float = POLL_S) -> None:
    """Asks every `poll_s` seconds, logs every change once, and tells readiness of refusals. Never returns.

    A Redis that is silent, or refuses for a reason that passes, leaves a server ready: clients try again, and where
    only room is missing, results can still be fetched.
    """
    told = ""
    while True:
        event, why, ready = await _state(redis, prefix)
        if f"{event} {why}" != told and (told or why):
            if why:
                _log.warning(event, why=why)
            else:
                _log.info(event)
        told = f"{event} {why}"
        await readiness.tell(ready)
        await asyncio.sleep(poll_s)


async def _state(redis: RedisClient, prefix: str) -> tuple[str, str, bool]:
    """Event, cause, and whether the server is ready."""
    try:
        await _tried(redis, prefix)
    except (RedisError, OSError) as error:
        said = refusal(error)
        if said is None:
            return "redis_silent", _first_line(error), True
        return "redis_refuses", said, passes(error)
    return "redis_accepts", "", True


async def _tried(redis: RedisClient, prefix: str) -> None:
    """A write, and a script with two keys, which no node of a cluster accepts."""
    keys = [f"{prefix}:watch:{name}" for name in ("a", "b")]
    async with asyncio.timeout(TIMEOUT_S):
        await redis.set(keys[0], "1", px=1000)
        await redis.eval(_SCRIPT, len(keys), *keys)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or f"no answer within {TIMEOUT_S:g} s"
