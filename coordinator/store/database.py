"""What every part of the store asks of Redis: records by compare-and-set, fields of hashes, each within its time."""

import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar, cast

from coordinator.keys import Keys
from coordinator.metrics import TRANSACTION_TOTAL
from coordinator.records import StoredRecord
from coordinator.scripts import COMPARE_AND_SET, PUT_FIELD, PUT_VALUE
from services.common.redis_client import Failures, RedisClient
from shelora.errors import DomainError, Reason, RetryLaterError

DELETING: Final = "DELETING"
"""In place of the phase of a federation that is being deleted: scripts write nothing for it."""
PASSING_MS: Final = 600_000
"""Life of a value that no record names, yet or any more, in ms: who reads it now may finish."""
FULL_RETRY_S: Final = 5.0
"""Seconds after which a write that found no room may be tried again."""

_R = TypeVar("_R", bound=StoredRecord)


@dataclass(frozen=True)
class Versioned(Generic[_R]):
    """A record as it was read, and the revision that a write must still find."""

    record: _R
    revision: int


class Database:
    """The coordinator's keys in one Redis.

    Args:
        redis: Client that returns bytes.
        clock_ms: Unix milliseconds.
        retention_ms: Life of everything after the last change of its federation.
        timeout_s: Seconds after which an operation fails.
        keys: Names of the keys.
    """

    def __init__(
        self,
        redis: RedisClient,
        *,
        clock_ms: Callable[[], int],
        retention_ms: int,
        timeout_s: float,
        keys: Keys,
    ) -> None:
        self.redis = redis
        self.clock_ms = clock_ms
        self.retention_ms = retention_ms
        self.timeout_s = timeout_s
        self.keys = keys
        self._compare_and_set = redis.register_script(COMPARE_AND_SET)
        self._put = redis.register_script(PUT_FIELD)
        self._put_value = redis.register_script(PUT_VALUE)

    async def read(self, key: str, model: type[_R]) -> Versioned[_R] | None:
        """A record and its revision; None if it is not there."""
        revision, data = await self.redis.hmget(key, ["revision", "data"])
        if revision is None or data is None:
            return None
        return Versioned(model.read(data), int(revision))

    async def write(
        self,
        name: str,
        federation_id: str,
        keys: Sequence[str],
        record: StoredRecord,
        state: str,
        revision: int,
        unused: Sequence[str] = (),
    ) -> bool:
        """Writes a record if the revision is still the newest; 0 creates.

        False: another writer was first, or the federation is deleted.

        Args:
            name: What is counted.
            federation_id: Whose change is announced.
            keys: The record's, then those that live as long as it.
            record: To write.
            state: Kept beside it, for scripts.
            revision: That a write must find.
            unused: Keys that expire soon.
        """
        written = await self._compare_and_set(
            keys=[self.keys.federation(federation_id), *keys, *unused],
            args=[
                revision,
                record.model_dump_json(),
                state,
                self.retention_ms,
                self.keys.changes(federation_id),
                len(keys),
                PASSING_MS,
            ],
        )
        TRANSACTION_TOTAL.labels(name, "written" if written else "conflict").inc()
        return bool(written)

    async def put_field(
        self,
        federation_id: str,
        key: str,
        field: str,
        data: bytes | str,
        life_ms: int = 0,
        collecting: str = "",
    ) -> None:
        """Sets a field of a hash of a federation and renews its expiry, in one step.

        With `collecting`, the key of a round, nothing is set unless it collects. Lives `life_ms`, 0: as the federation.

        Raises: FEDERATION_UNKNOWN, and leaves nothing behind, if the federation was deleted meanwhile.
        """
        keys = [self.keys.federation(federation_id), key, *([collecting] if collecting else [])]
        if not await self._put(keys, [field, data, life_ms or self.retention_ms]):
            raise unknown(federation_id)

    async def put_value(self, federation_id: str, key: str, data: bytes | str) -> None:
        """Sets a value that its key names by its digest, for some minutes, or as long as it is kept already.

        Raises: FEDERATION_UNKNOWN: the federation is deleted, or going.
        """
        if not await self._put_value([self.keys.federation(federation_id), key], [data, PASSING_MS]):
            raise unknown(federation_id)

    async def announce(self, federation_id: str, client_id: str = "") -> None:
        """Wakes those that wait for changes of a federation: of one client, or of all."""
        await self.redis.publish(self.keys.changes(federation_id), client_id)

    async def field(self, key: str, field: str) -> bytes | None:
        """A field of a hash."""
        found = await self.redis.hget(key, field)
        return None if found is None else bytes(found)

    async def fields(self, key: str, names: Sequence[str] | None = None) -> dict[str, bytes]:
        """Fields of a hash, sorted. Args: names: only these, as far as they are there."""
        if names is None:
            return {name.decode(): bytes(value) for name, value in sorted((await self._hash(key)).items())}
        wanted = sorted(names)
        values = await self.redis.hmget(key, wanted) if wanted else []
        return {name: bytes(value) for name, value in zip(wanted, values, strict=True) if value is not None}

    async def names(self, key: str) -> frozenset[str]:
        """Names of the fields of a hash."""
        return frozenset(name.decode() for name in await self.redis.hkeys(key))

    async def _hash(self, key: str) -> Mapping[bytes, bytes]:
        return cast("Mapping[bytes, bytes]", await self.redis.hgetall(key))  # the client decodes nothing


class _Part(Protocol):
    db: Database


_Self = TypeVar("_Self", bound=_Part)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def available(
    method: Callable[Concatenate[_Self, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_Self, _P], Coroutine[Any, Any, _T]]:
    """Limits the time of an operation, and names failures of Redis."""

    @functools.wraps(method)
    async def wrapped(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        async with _FAILURES.within(self.db.timeout_s):
            return await method(self, *args, **kwargs)

    return wrapped


def unknown(federation_id: str) -> DomainError:
    """There is no such federation (any more)."""
    return DomainError(Reason.FEDERATION_UNKNOWN, f"there is no federation {federation_id!r}")


def _full() -> RetryLaterError:
    why = "the coordinator's store is full; the operator can raise Redis' maxmemory"
    return RetryLaterError(Reason.STORE_FULL, why, FULL_RETRY_S)


_FAILURES: Final = Failures("the coordinator's store", _full)
