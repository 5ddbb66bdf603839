"""The shard store: updates as they arrive, checked updates, results. In Redis, where every key expires.

The server uses `RedisShardStore`, asynchronous; a worker process uses `WorkerStore`, which reads checked updates and
publishes results. Both answer STORE_UNAVAILABLE when Redis does not answer or has no room.
"""

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, Protocol

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.aggregation import scripts
from services.aggregation.keys import REPLICAS, RoundKeys, SharedKeys
from services.aggregation.records import (
    AggregationRequest,
    ShardProgress,
    ShardSlot,
    StoredPart,
    StoredResult,
    Upload,
)
from services.aggregation.scripts import Answer
from services.aggregation.watermark import store_full
from services.common import redis_client
from services.common.redis_client import Failures, RedisClient
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.transport.pieces import Digest
from shelora.v1 import common_pb2 as pb

FORMAT: Final = b"1"
"""Version of the records in Redis."""

READ_BYTES: Final = 4 * 2**20
"""Bytes read in one command: Redis and the event loop serve others in between."""

RESULT_RUN_BYTES: Final = 2**20
"""Bytes of a result read in one command."""

SOCKET_READ_BYTES: Final = 2**18
"""Bytes asked of a connection at once: four times the client's default, for half the time a shard takes to read."""

CACHED_LAYOUTS: Final = 32
"""Layouts kept parsed, by digest. One is a few hundred KiB for the largest models."""

MAX_RESULT_BYTES: Final = 512 * 2**20
"""What one string of Redis holds (proto-max-bulk-len)."""

CLOSED_LIFE_S: Final = 600
"""Seconds during which a closed round cannot be opened: no call is on its way for longer."""

STAGED_LIFE_S: Final = 600
"""Seconds that the bytes of a result have to be published, and a part of it to become one."""

DELETED_KEYS: Final = 256
"""Keys deleted in one command."""

_CPU: Final = struct.Struct("<d")
"""What a stored part begins with: CPU seconds."""

_FAILURES: Final = Failures("the shard store", store_full)


class ShardStore(Protocol):
    """What the service needs of a store. Every method may raise STORE_UNAVAILABLE."""

    async def open_round(
        self, round_id: str, layout: Layout, ttl_s: int, ranks: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Makes a round known for `ttl_s` seconds, to the clients in `ranks` alone if there are any.

        Raises: LAYOUT_MISMATCH if it is known with another layout, ROUND_UNKNOWN if it was closed before.
        """

    async def layout(self, round_id: str) -> Layout:
        """The layout of a round. Raises ROUND_UNKNOWN."""

    async def largest_rank(self, round_id: str, client_id: str) -> int | None:
        """Largest rank of a client's update; None for the layout's. Raises NOT_IN_COHORT."""

    async def begin(self, slot: ShardSlot, digest: Digest, token: str) -> Upload | None:
        """Begins or resumes an upload; other content at the slot's partial bytes is dropped.

        Args: token: 32 hex digits, used if the upload is new.
        Returns: the upload, or None if this content is complete.
        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN if the update is sealed with other content.
        """

    async def append(self, upload: Upload, offset: int, data: bytes) -> bool:
        """Stores the bytes from `offset` on, skipping those that are stored.

        Returns: False if the content is complete through another call.
        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN (sealed), SHARD_REWRITTEN (superseded), TRANSFER_OFFSET (a gap).
        """

    async def read(self, upload: Upload) -> bytes:
        """The bytes of an upload; fewer than announced if it was superseded or promoted in the meantime."""

    async def is_complete(self, upload: Upload) -> bool:
        """Whether the content is complete, through whatever call."""

    async def promote(self, upload: Upload, squared_norm: float = 0.0) -> bool:
        """Makes fully received and checked content complete, and keeps its squared norm.

        Returns: False if it is complete through another call.
        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN (sealed), SHARD_REWRITTEN (superseded).
        """

    async def seal(self, round_id: str, client_id: str, shards: Sequence[Digest]) -> None:
        """Fixes a client's update: complete content is replaced no more, what has arrived of other content is dropped.

        Raises: ROUND_UNKNOWN; SHARD_MISSING unless every shard is complete with its digest.
        """

    async def forget(self, upload: Upload) -> None:
        """Deletes the bytes of an upload, unless it was superseded."""

    async def progress(self, round_id: str, client_id: str) -> list[ShardProgress]:
        """What has arrived of a client's update, by shard; of two contents the newer. Raises ROUND_UNKNOWN."""

    async def missing(self, request: AggregationRequest) -> str | None:
        """The first client whose contribution is not complete with the digest of the request."""

    async def result(self, request: AggregationRequest) -> StoredResult | None:
        """The result of this very request, if it is stored."""

    async def claim(self, request: AggregationRequest) -> StoredResult | None:
        """Lets this request, and none before, publish; answers the result if it is stored.

        Raises: ROUND_UNKNOWN; SHARD_REWRITTEN if a request with fewer contributions, so a newer one, came before.
        """

    async def result_digest(self, round_id: str, shard: int) -> Digest:
        """Digest of the stored result of a shard. Raises RESULT_UNKNOWN."""

    async def result_run(self, round_id: str, shard: int, digest: Digest, offset: int) -> bytes:
        """At most RESULT_RUN_BYTES of a result, from `offset` on. Raises RESULT_UNKNOWN if it is deleted."""

    async def close_round(self, round_id: str, *, results: bool) -> None:
        """Deletes the updates of a round, and its results if asked. Later writes find the round unknown."""

    async def announce(self, address: str, life_ms: int) -> None:
        """Names a replica to callers for `life_ms` milliseconds."""

    async def withdraw(self, address: str) -> None:
        """Takes an announcement back."""

    async def replicas(self) -> list[str]:
        """Addresses of the replicas that are announced, sorted."""


class RedisShardStore:
    """A `ShardStore` in Redis. See `keys` for the records and `scripts` for the atomic steps."""

    def __init__(self, client: RedisClient, timeout_s: float = 30.0) -> None:
        """Takes a client that answers bytes, and the seconds that a command may take."""
        self._client = client
        self._timeout_s = timeout_s
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._open_round = client.register_script(scripts.OPEN_ROUND)
        self._close_round = client.register_script(scripts.CLOSE_ROUND)
        self._begin = client.register_script(scripts.BEGIN)
        self._append = client.register_script(scripts.APPEND)
        self._promote = client.register_script(scripts.PROMOTE)
        self._forget = client.register_script(scripts.FORGET)
        self._seal = client.register_script(scripts.SEAL)
        self._claim = client.register_script(scripts.CLAIM)
        self._announce = client.register_script(scripts.ANNOUNCE)
        self._announced = client.register_script(scripts.ANNOUNCED)

    @property
    def redis(self) -> RedisClient:
        """The client, for questions about Redis itself."""
        return self._client

    async def info(self, section: str) -> Any:  # noqa: ANN401 - a mapping of Redis' own names
        """A section of Redis' INFO. Raises what the client raises."""
        return await self._client.info(section)

    async def open_round(
        self, round_id: str, layout: Layout, ttl_s: int, ranks: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        content = layout_to_proto(layout).SerializeToString(deterministic=True)
        answer = await self._scripted(
            self._open_round,
            [RoundKeys(round_id).round, RoundKeys(round_id).closed],
            [layout.digest, content, FORMAT, ttl_s * 1000, *chain.from_iterable(ranks.items())],
        )
        _accepted(answer)

    async def layout(self, round_id: str) -> Layout:
        key = RoundKeys(round_id).round
        digest, version = await self._command("HMGET", key, "layout_digest", "format")
        _check_format(digest, version)
        if digest not in self._layouts:
            return self._remembered(digest, await self._command("HGET", key, "layout"))
        self._layouts.move_to_end(digest)
        return self._layouts[digest]

    async def largest_rank(self, round_id: str, client_id: str) -> int | None:
        key = RoundKeys(round_id).round
        restricted, rank = await self._command("HMGET", key, "restricted", f"rank:{client_id}")
        if restricted is None:
            return None
        if rank is None:
            raise DomainError(Reason.NOT_IN_COHORT, "this client was not asked for an update in this round")
        return int(rank)

    async def begin(self, slot: ShardSlot, digest: Digest, token: str) -> Upload | None:
        keys = RoundKeys(slot.round_id)
        partial = keys.partial(slot.client_id, slot.shard)
        answer = await self._scripted(
            self._begin,
            [keys.round, keys.client(slot.client_id), partial, keys.updates],
            [slot.shard, _announced(digest), token],
        )
        if _accepted(answer) is Answer.COMPLETE:
            return None
        return Upload(slot=slot, digest=digest, token=answer[1].decode(), received_bytes=answer[2])

    async def append(self, upload: Upload, offset: int, data: bytes) -> bool:
        slot, keys = upload.slot, RoundKeys(upload.slot.round_id)
        answer = await self._scripted(
            self._append,
            [keys.round, keys.client(slot.client_id), keys.partial(slot.client_id, slot.shard)],
            [*_step(upload), offset, data],
        )
        return _accepted(answer) is Answer.OK

    async def read(self, upload: Upload) -> bytes:
        key = RoundKeys(upload.slot.round_id).partial(upload.slot.client_id, upload.slot.shard)
        runs = [run async for run in self._runs(key, 0, upload.digest.total_bytes)]
        return b"".join(runs)

    async def is_complete(self, upload: Upload) -> bool:
        slot = upload.slot
        found = await self._command(
            "HGET", RoundKeys(slot.round_id).client(slot.client_id), f"complete:{slot.shard}"
        )
        return bool(found == _announced(upload.digest).encode())

    async def promote(self, upload: Upload, squared_norm: float = 0.0) -> bool:
        slot, keys = upload.slot, RoundKeys(upload.slot.round_id)
        answer = await self._scripted(
            self._promote,
            [
                keys.round,
                keys.client(slot.client_id),
                keys.partial(slot.client_id, slot.shard),
                keys.update(slot.client_id, slot.shard, upload.digest.sha256),
                keys.updates,
            ],
            [*_step(upload), keys.update_prefix(slot.client_id, slot.shard), repr(squared_norm)],
        )
        return _accepted(answer) is Answer.OK

    async def seal(self, round_id: str, client_id: str, shards: Sequence[Digest]) -> None:
        keys = RoundKeys(round_id)
        answer = await self._scripted(
            self._seal,
            [keys.round, keys.client(client_id), keys.updates],
            [keys.partial_prefix(client_id), *map(_announced, shards)],
        )
        _accepted(answer)

    async def forget(self, upload: Upload) -> None:
        slot, keys = upload.slot, RoundKeys(upload.slot.round_id)
        await self._scripted(
            self._forget,
            [keys.client(slot.client_id), keys.partial(slot.client_id, slot.shard), keys.updates],
            _step(upload),
        )

    async def progress(self, round_id: str, client_id: str) -> list[ShardProgress]:
        keys = RoundKeys(round_id)
        if not await self._command("EXISTS", keys.round):
            raise _refusal(Answer.ROUND_UNKNOWN)
        fields: dict[bytes, bytes] = await self._command("HGETALL", keys.client(client_id))
        found = dict(_complete(fields))
        for shard, digest in _partial(fields):
            received = await self._command("STRLEN", keys.partial(client_id, shard))
            if received:
                found[shard] = ShardProgress(
                    shard=shard, digest=digest, received_bytes=received, complete=False
                )
        return [found[shard] for shard in sorted(found)]

    async def missing(self, request: AggregationRequest) -> str | None:
        keys, field = RoundKeys(request.round_id), f"complete:{request.shard}"
        pipeline = self._client.pipeline(transaction=False)
        for part in request.contributions:
            pipeline.hget(keys.client(part.client_id), field)
        async with self._answer():
            records: list[bytes | None] = await pipeline.execute()
        for part, record in zip(request.contributions, records, strict=True):
            if record is None or _digest(record).sha256 != part.sha256:
                return part.client_id
        return None

    async def result(self, request: AggregationRequest) -> StoredResult | None:
        found, *record = await self._command(
            "HMGET",
            RoundKeys(request.round_id).result(request.shard),
            *("request", "sha256", "total_bytes", "cpu_s"),
        )
        return _result(record) if found == request.digest else None

    async def claim(self, request: AggregationRequest) -> StoredResult | None:
        keys = RoundKeys(request.round_id)
        answer = await self._scripted(
            self._claim,
            [keys.round, keys.result(request.shard), keys.results],
            [request.digest, len(request.contributions)],
        )
        return _result(answer[1:]) if _accepted(answer) is Answer.STORED else None

    async def result_digest(self, round_id: str, shard: int) -> Digest:
        record = await self._command("HMGET", RoundKeys(round_id).result(shard), "sha256", "total_bytes")
        if record[0] is None:
            raise _result_unknown()
        return Digest(bytes.fromhex(record[0].decode()), int(record[1]))

    async def result_run(self, round_id: str, shard: int, digest: Digest, offset: int) -> bytes:
        key = RoundKeys(round_id).result_bytes(shard, digest.sha256)
        end = min(offset + RESULT_RUN_BYTES, digest.total_bytes)
        run = bytes(await self._command("GETRANGE", key, offset, end - 1))
        if len(run) < end - offset:
            raise _result_unknown()
        return run

    async def close_round(self, round_id: str, *, results: bool) -> None:
        keys = RoundKeys(round_id)
        # First: from here on every script finds the round unknown, and the sets below only shrink.
        await self._scripted(self._close_round, [keys.round, keys.closed], [1000 * CLOSED_LIFE_S])
        await self._drain(keys.updates)
        if results:
            await self._drain(keys.results)

    async def announce(self, address: str, life_ms: int) -> None:
        await self._scripted(self._announce, [REPLICAS], [address, life_ms])

    async def withdraw(self, address: str) -> None:
        await self._command("ZREM", REPLICAS, address)

    async def replicas(self) -> list[str]:
        _, *addresses = await self._scripted(self._announced, [REPLICAS])
        return sorted(address.decode() for address in addresses)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _runs(self, key: str, offset: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a string from `offset` to `end`, or to where it ends before."""
        while offset < end:
            run = await self._command("GETRANGE", key, offset, min(offset + READ_BYTES, end) - 1)
            if not run:
                return
            yield run
            offset += len(run)

    async def _drain(self, index: str) -> None:
        """Deletes the keys of an index. A key leaves the index after it is gone: a broken call can be repeated."""
        while members := await self._command("SRANDMEMBER", index, DELETED_KEYS):
            await self._command("UNLINK", *members)
            await self._command("SREM", index, *members)

    async def _command(self, *parts: Any) -> Any:  # noqa: ANN401 - the answer's type depends on the command
        async with self._answer():
            return await self._client.execute_command(*parts)

    async def _scripted(self, script: Any, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:  # noqa: ANN401 - as above
        async with self._answer():
            return await script(keys, args)

    def _answer(self) -> AbstractAsyncContextManager[None]:
        """Around one command: limits its time, and names its failures."""
        return _FAILURES.within(self._timeout_s)

    def _remembered(self, digest: bytes, content: bytes | None) -> Layout:
        """Parses a layout once for all calls that need it. Raises ROUND_UNKNOWN if there is no content (any more)."""
        if content is None:
            raise _refusal(Answer.ROUND_UNKNOWN)
        self._layouts[digest] = layout = _parsed(content)
        while len(self._layouts) > CACHED_LAYOUTS:
            self._layouts.popitem(last=False)
        return layout


class WorkerStore:
    """What a worker process needs of the store, synchronous."""

    def __init__(self, client: RedisClient) -> None:
        """Takes a client that answers bytes (`decode_responses=False`)."""
        self._client = client
        self._publish = client.register_script(scripts.PUBLISH)

    def layout(self, round_id: str) -> Layout:
        """The layout of a round. Raises ROUND_UNKNOWN."""
        with _FAILURES.named():
            content, version = self._client.execute_command(
                "HMGET", RoundKeys(round_id).round, "layout", "format"
            )
        _check_format(content, version)
        return _parsed(content)

    def update(self, slot: ShardSlot, sha256: bytes) -> bytes:
        """A checked UpdateShard. Raises SHARD_MISSING if it is not (any more) what was committed.

        The digest is checked again: native code reads what was validated, even if Redis was written to since.
        """
        key = RoundKeys(slot.round_id).update(slot.client_id, slot.shard, sha256)
        with _FAILURES.named():
            data: bytes | None = self._client.execute_command("GET", key)
        if data is None or hashlib.sha256(data).digest() != sha256:
            raise shard_missing(slot.client_id)
        return data

    def publish(self, request: AggregationRequest, data: bytes, cpu_s: float) -> StoredResult:
        """Stores a result. Returns the one stored first for this request.

        Raises: ROUND_UNKNOWN if it was closed, SHARD_REWRITTEN if a newer request took this one's place,
        TRANSFER_TOO_LARGE if it is larger than what can be stored.
        """
        if len(data) > MAX_RESULT_BYTES:
            message = f"the result has {len(data)} bytes, more than can be stored; lower max_directions"
            raise DomainError(Reason.TRANSFER_TOO_LARGE, message)
        keys, digest = RoundKeys(request.round_id), Digest.of(data)
        bytes_key = keys.result_bytes(request.shard, digest.sha256)
        with _FAILURES.named():
            if not self._client.execute_command("EXISTS", keys.round):
                raise _refusal(Answer.ROUND_UNKNOWN)
            self._put(bytes_key, data)
            answer = self._publish(
                [keys.round, keys.result(request.shard), bytes_key, keys.results],
                [
                    request.digest,
                    digest.sha256.hex(),
                    digest.total_bytes,
                    json.dumps(cpu_s),
                    keys.result_prefix(request.shard),
                ],
            )
        _accepted(answer)
        return _result(answer[1:])

    def is_wanted(self, request: AggregationRequest) -> bool:
        """Whether the request's result is missing, and no newer request has taken its place."""
        with _FAILURES.named():
            found, wanted = self._client.execute_command(
                "HMGET", RoundKeys(request.round_id).result(request.shard), "request", "wanted"
            )
        return found != request.digest and wanted in {None, request.digest}

    def take(self, request: AggregationRequest, part: int) -> bool:
        """Marks a part as taken. Returns False if it was."""
        return self._staged(_shared(request).taken(part), b"")

    def common(self, request: AggregationRequest) -> bytes | None:
        """What all parts share, if a worker has stored it."""
        return self._got(_shared(request).common)

    def keep_common(self, request: AggregationRequest, data: bytes) -> bytes:
        """Stores what all parts share. Returns what was stored first."""
        if not self._staged(_shared(request).common, data):
            found = self.common(request)
            return data if found is None else found
        return data

    def partial(self, request: AggregationRequest, part: int) -> StoredPart | None:
        """A part's sum, if it is stored."""
        found = self._got(_shared(request).partial(part))
        if found is None or len(found) < _CPU.size:
            return None
        return StoredPart(found[_CPU.size :], *_CPU.unpack_from(found))

    def put_partial(self, request: AggregationRequest, part: int, data: bytes, cpu_s: float) -> None:
        """Stores a part's sum."""
        self._staged(_shared(request).partial(part), _CPU.pack(cpu_s) + data)

    def forget_parts(self, request: AggregationRequest, parts: int) -> None:
        """Deletes what workers that shared a shard stored."""
        with _FAILURES.named():
            self._client.execute_command("UNLINK", *_shared(request).all(parts))

    def _got(self, key: str) -> bytes | None:
        with _FAILURES.named():
            found: bytes | None = self._client.execute_command("GET", key)
        return found

    def _staged(self, key: str, data: bytes) -> bool:
        """Stores bytes for minutes. Returns False if there are some."""
        with _FAILURES.named():
            return self._put(key, data)

    def _put(self, key: str, data: bytes) -> bool:
        """Stores bytes for minutes, should this process die now; PUBLISH makes them last, or takes them back.

        Bytes that are there are these, and may be a published result, whose life must not be cut short.
        """
        return bool(self._client.execute_command("SET", key, data, "PX", 1000 * STAGED_LIFE_S, "NX"))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()
        self._client.connection_pool.disconnect()


def connect(redis_url: str, *, connections: int, timeout_s: float) -> RedisShardStore:
    """A store over at most `connections` connections; a command fails after `timeout_s` seconds.

    A broken connection is replaced once: every command here can be repeated.
    """
    client = redis_client.connect(redis_url, connections, timeout_s, socket_read_size=SOCKET_READ_BYTES)
    return RedisShardStore(client, timeout_s)


def connect_worker(redis_url: str, *, timeout_s: float) -> WorkerStore:
    """A worker's store; a command fails after `timeout_s` seconds."""
    pool: Any = redis.ConnectionPool.from_url(
        redis_url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_read_size=SOCKET_READ_BYTES,
        retry=Retry(NoBackoff(), 1),
    )
    return WorkerStore(redis.Redis(connection_pool=pool))


def shard_missing(client_id: str) -> DomainError:
    """SHARD_MISSING, for the coordinator: it names the client."""
    return DomainError(Reason.SHARD_MISSING, f"the committed shard of client {client_id!r} is not stored")


def _accepted(answer: Sequence[Any]) -> Answer:
    """The first entry of a script's answer. Raises the refusal it names."""
    word = Answer(answer[0].decode())
    if word in _REFUSALS:
        raise _refusal(word)
    return word


_REFUSALS: Final = {
    Answer.ROUND_UNKNOWN: (
        Reason.ROUND_UNKNOWN,
        "the round is not known here: not opened, closed or expired",
    ),
    Answer.LAYOUT_MISMATCH: (Reason.LAYOUT_MISMATCH, "the round is open with another layout"),
    Answer.SUPERSEDED: (Reason.SHARD_REWRITTEN, "a later call with other content took this one's place"),
    Answer.SEALED: (Reason.UPDATE_REWRITTEN, "this client has committed another update to this round"),
    Answer.MISSING: (Reason.SHARD_MISSING, "not all shards of the update are stored: send them first"),
    Answer.LOST: (Reason.STORE_UNAVAILABLE, "the result expired before it was published; try again"),
    Answer.GAP: (Reason.TRANSFER_OFFSET, "the bytes do not follow those stored; ask QueryShards and resume"),
}


def _check_format(content: bytes | None, version: bytes | None) -> None:
    """Raises: ROUND_UNKNOWN if there is no record of a round, RECORD_UNREADABLE if it is of another version."""
    if content is None:
        raise _refusal(Answer.ROUND_UNKNOWN)
    if version != FORMAT:
        raise DomainError(
            Reason.RECORD_UNREADABLE,
            f"the round has format {(version or b'none').decode()}, and only {FORMAT.decode()} is read here: run the "
            "version of aggregation that wrote it, or a newer one; it is left as it is",
        )


def _shared(request: AggregationRequest) -> SharedKeys:
    return RoundKeys(request.round_id).shared(request.shard, request.digest)


def _refusal(answer: Answer) -> DomainError:
    return DomainError(*_REFUSALS[answer])


def _result_unknown() -> DomainError:
    return DomainError(Reason.RESULT_UNKNOWN, "the result is not stored (any more)")


def _step(upload: Upload) -> list[Any]:
    """The first arguments of every step of an upload."""
    return [upload.slot.shard, _announced(upload.digest), upload.token]


def _announced(digest: Digest) -> str:
    return f"{digest.sha256.hex()}:{digest.total_bytes}"


def _digest(record: bytes) -> Digest:
    sha256, total = record.decode().split(":")
    return Digest(bytes.fromhex(sha256), int(total))


def _result(record: Sequence[bytes]) -> StoredResult:
    sha256, total, cpu_s = record
    return StoredResult(Digest(bytes.fromhex(sha256.decode()), int(total)), float(cpu_s))


def _complete(fields: dict[bytes, bytes]) -> Iterator[tuple[int, ShardProgress]]:
    for name, record in fields.items():
        kind, _, shard = name.partition(b":")
        if kind == b"complete":
            digest = _digest(record)
            norm = float(fields[b"norm:" + shard])
            yield (
                int(shard),
                ShardProgress(
                    shard=int(shard),
                    digest=digest,
                    received_bytes=digest.total_bytes,
                    complete=True,
                    squared_norm=norm,
                ),
            )


def _partial(fields: dict[bytes, bytes]) -> Iterator[tuple[int, Digest]]:
    for name, record in fields.items():
        kind, _, shard = name.partition(b":")
        if kind == b"partial":
            yield int(shard), _digest(record.partition(b":")[2])


def _parsed(content: bytes) -> Layout:
    return layout_from_proto(pb.Layout.FromString(content))
