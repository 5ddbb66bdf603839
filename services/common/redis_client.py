"""How servers reach Redis: over a bounded number of connections, each operation within its time, failures by name."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from services.common.redis_url import parts_of, unusable
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

    Raises: DomainError CONFIGURATION_INVALID if the URL cannot be used; it is not shown, as it may hold a password.
    """
    parts_of(url)
    try:
        pool: Any = BlockingConnectionPool.from_url(
            url.strip(),
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
            **options,
        )
        pool.make_connection()  # which alone looks at the options of the URL
    except (ValueError, TypeError, RedisError) as error:
        raise unusable(f"cannot be read: {error}") from None
    client: Any = (
        Redis  # `from_pool`, which makes the client own the pool, is missing in some stubs of redis-py
    )
    return client.from_pool(pool)


def refusal(error: BaseException) -> str | None:
    """What Redis said when it refused, in its own first line, with the remedy where we know one.

    None for an error that is not a refusal: no connection, no answer.
    """
    if isinstance(error, RedisConnectionError) and str(error) == _TOO_MANY:
        return f"ERR {_TOO_MANY} (raise Redis' maxclients, or lower redis_connections)"
    if not isinstance(error, ResponseError | AuthenticationError | BusyLoadingError):
        return None
    code = str(getattr(error, "status_code", None) or "")
    said = (str(error).splitlines() or [""])[0]
    line = said if said.startswith(code) else f"{code} {said}"
    remedy = _REMEDIES.get(line.partition(" ")[0])
    return f"{line} ({remedy})" if remedy else line


def passes(error: BaseException) -> bool:
    """Whether a refusal may pass without a change of this server's settings."""
    line = refusal(error) or ""
    return _TOO_MANY in line or line.partition(" ")[0] in _PASSING


_TOO_MANY: Final = "max number of clients reached"
"""What Redis says before it closes a connection that is one too many; redis-py takes it for a broken connection."""
_NO_CLUSTER: Final = "a Redis Cluster is not supported: give the address of one Redis or Valkey server"
_REMEDIES: Final = {
    **dict.fromkeys(("MOVED", "ASK", "CLUSTERDOWN", "CROSSSLOT"), _NO_CLUSTER),
    "WRONGPASS": "check user and password of redis_url, or redis_password_file",
    "NOAUTH": "give a password: redis_password_file",
    "NOPERM": "give this user the rights that docs/operations.md names",
    "READONLY": "this is a replica: give the address of the primary",
    "OOM": "raise Redis' maxmemory",
}
_PASSING: Final = frozenset(
    {"OOM", "LOADING", "MASTERDOWN", "TRYAGAIN", "BUSY", "MISCONF", "NOREPLICAS", "UNKILLABLE", "BUSYKEY"}
)


@dataclass(frozen=True)
class Failures:
    """What failures of Redis are called. Callers retry all of them."""

    store: str
    """What Redis is to callers: "the shard store"."""
    full: Callable[[], RetryLaterError]
    """STORE_FULL, with the time to wait."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Raises: STORE_FULL if Redis has no room, STORE_UNAVAILABLE if it does not answer, or refuses.

        Callers do not learn what Redis said, which names users and addresses: the log does (`watch_redis`).
        """
        try:
            yield
        except OutOfMemoryError as error:
            raise self.full() from error
        except (RedisError, OSError) as error:
            what = (
                "does not answer"
                if refusal(error) is None
                else "is refused by Redis, why is in the server's log"
            )
            raise DomainError(Reason.STORE_UNAVAILABLE, f"{self.store} {what}; try again") from error

    @asynccontextmanager
    async def within(self, timeout_s: float) -> AsyncIterator[None]:
        """The same, and STORE_UNAVAILABLE for an operation that takes longer."""
        with self.named():
            async with asyncio.timeout(timeout_s):
                yield
