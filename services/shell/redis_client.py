"""How servers reach Redis: over a bounded number of connections, each operation within its time, failures by name."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError

from shelora.errors import DomainError, Reason, RetryLaterError

RedisClient: TypeAlias = Any
"""`redis.asyncio.Redis` that returns bytes. Its own types call every reply perhaps not awaitable."""


def connect(
    url: str,
    connections: int = 64,
    timeout_s: float = 30.0,
    **options: Any,  # noqa: ANN401 - of redis-py
) -> RedisClient:
    """A client over at most `connections` connections; a broken one is replaced once, as every command may be repeated.

    There is no socket timeout on purpose: redis-py sends under `asyncio.wait_for` then, which on Python 3.11 loses a
    cancellation that arrives together with its result (python/cpython#86296), and a cancelled task would go on.
    `Failures.within` limits the time of operations instead.

    Args:
        url: Of the server, with its password.
        connections: Most connections at once.
        timeout_s: Seconds that connecting, and the wait for a free connection, may take.
        options: Of redis-py's connections.
    """
    pool: Any = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=None,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1),
        **options,
    )
    client: Any = (
        Redis  # `from_pool`, which makes the client own the pool, is missing in some stubs of redis-py
    )
    return client.from_pool(pool)


@dataclass(frozen=True)
class Failures:
    """What failures of Redis are called. Callers retry all of them."""

    store: str
    """What Redis is to callers: "the shard store"."""
    full: Callable[[], RetryLaterError]
    """STORE_FULL, with the time to wait."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Raises: STORE_FULL if Redis has no room, STORE_UNAVAILABLE if it does not answer."""
        try:
            yield
        except OutOfMemoryError as error:
            raise self.full() from error
        except (RedisError, OSError) as error:
            raise DomainError(Reason.STORE_UNAVAILABLE, f"{self.store} does not answer; try again") from error

    @asynccontextmanager
    async def within(self, timeout_s: float) -> AsyncIterator[None]:
        """The same, and STORE_UNAVAILABLE for an operation that takes longer."""
        with self.named():
            async with asyncio.timeout(timeout_s):
                yield
