"""Where the coordinator's records live: the port, and its implementation on Redis (or Valkey).

Records that several writers share (federations, rounds) are written by compare-and-set on a revision. Everything
expires: a federation's record and what belongs to it live for `retention` after the last change, a sighting and a
lease for seconds. Every method raises STORE_UNAVAILABLE if Redis does not answer; all of them may be repeated.
"""

import asyncio
import functools
import hashlib
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar, cast

import structlog
from redis.exceptions import RedisError

from coordinator.keys import Keys
from coordinator.metrics import TRANSACTION_TOTAL
from coordinator.records import (
    Commit,
    Dealt,
    Dropped,
    Evaluation,
    FederationRecord,
    LayoutRecord,
    Member,
    Model,
    Record,
    RoundRecord,
    ShardResult,
    Sighting,
    Statement,
    Update,
)
from coordinator.scripts import COMMIT, COMPARE_AND_SET, PUT_FIELD, RELEASE, RENEW, SEE, STATE, TOUCH
from services.shell.redis_client import Failures, RedisClient
from shelora.committee.rules import MAX_MEMBERS
from shelora.errors import DomainError, Reason, RetryLaterError

_R = TypeVar("_R", bound=Record)
_P = ParamSpec("_P")
_T = TypeVar("_T")

MAX_CONFLICTS: Final = 50
"""Attempts of a transaction. Writers of one federation are its RPCs and one driver; fifty lost races are a fault."""
SHARDS_MS: Final = 3_600_000
"""Life of a round's aggregated shards, in ms, from the last one on."""
PASSING_MS: Final = 600_000
"""Life of a plan that no record names, yet or any more, in ms: who reads it now may finish."""
FULL_RETRY_S: Final = 5.0
"""Seconds after which a write that found no room may be tried again."""


@dataclass(frozen=True)
class Versioned(Generic[_R]):
    """A record as it was read, and the revision that a write must still find."""

    record: _R
    revision: int


class CommitOutcome(IntEnum):
    """What became of a commit; the numbers are the script's."""

    COMMITTED = 1
    REPEATED = 2
    REWRITTEN = 3
    NOT_COLLECTING = 4


class StateOutcome(IntEnum):
    """What became of a statement; the numbers are the script's."""

    STATED = 1
    REPEATED = 2
    REWRITTEN = 3
    OVER = 4


_log = structlog.get_logger(__name__)


class Store(Protocol):
    """The coordinator's state. `federation` is a record as read before: its instance names the keys of its rounds."""

    async def federation_ids(self) -> list[str]:
        """All federations, by name."""

    async def federation(self, federation_id: str) -> Versioned[FederationRecord]:
        """Raises FEDERATION_UNKNOWN."""

    async def write_federation(
        self, name: str, record: FederationRecord, before: Versioned[FederationRecord] | None
    ) -> bool:
        """Writes if what was read before is still the newest; None creates. Plans that are in use no more expire soon.

        False: another writer was first. `name` is counted.
        """

    async def transact(
        self, name: str, federation_id: str, change: Callable[[FederationRecord], FederationRecord]
    ) -> FederationRecord:
        """Applies a pure function, again if another writer was first. An equal record is not written.

        Raises: FEDERATION_UNKNOWN; whatever `change` raises; STORE_UNAVAILABLE after MAX_CONFLICTS conflicts.
        """

    async def round(self, federation: FederationRecord, sequence: int) -> Versioned[RoundRecord] | None:
        """A round, or None if there is no record of it (any more)."""

    async def write_round(
        self, name: str, federation: FederationRecord, record: RoundRecord, revision: int
    ) -> bool:
        """Writes if the revision is still the newest; 0 creates. False: another writer was first. `name` is counted."""

    async def commit(
        self, federation: FederationRecord, sequence: int, update: Update, dealt: Dealt | None = None
    ) -> tuple[CommitOutcome, int]:
        """Counts an update of a collecting round once. Returns the update count of the (first) receipt.

        `dealt`: kept in the same step; None without a committee.
        """

    async def commit_of(self, federation: FederationRecord, sequence: int, client_id: str) -> Commit | None:
        """The committed update of a client."""

    async def commits(self, federation: FederationRecord, sequence: int) -> list[Commit]:
        """All committed updates, in the order they came."""

    async def commit_count(self, federation: FederationRecord, sequence: int) -> int:
        """Number of committed updates."""

    async def committed(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> AbstractSet[str]:
        """Those of some clients that have committed."""

    async def committers(self, federation: FederationRecord, sequence: int) -> AbstractSet[str]:
        """Everyone who has committed."""

    async def state(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_id: str,
        content: bytes,
        order: tuple[str, ...] = (),
    ) -> StateOutcome:
        """Keeps what a client states, once, while the round is in a state of that kind. `order`: of a view."""

    async def statements(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_ids: Sequence[str] | None = None,
    ) -> dict[str, bytes]:
        """What clients have stated, by client, sorted. Args: client_ids: only theirs."""

    async def statement(
        self, kind: Statement, federation: FederationRecord, sequence: int, client_id: str
    ) -> bytes | None:
        """What a client has stated."""

    async def speakers(self, kind: Statement, federation: FederationRecord, sequence: int) -> frozenset[str]:
        """Who has stated something of that kind."""

    async def orders(self, federation: FederationRecord, sequence: int) -> dict[str, tuple[str, ...]]:
        """The committees that clients have stated, by `order_digest`."""

    async def dealers(self, federation: FederationRecord, sequence: int) -> frozenset[str]:
        """Whose updates have been committed with a Dealing."""

    async def dealings(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        """The Dealings of those clients' committed updates, without shares, by client, sorted."""

    async def shares(
        self, federation: FederationRecord, sequence: int, place: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        """The shares of those clients that are sealed to the member of a place, by client."""

    async def drop_committee(self, federation: FederationRecord, sequence: int) -> None:
        """Deletes all statements, dealings and shares of a round."""

    async def put_opening(self, federation_id: str, sha256: str, opening: bytes) -> None:
        """Keeps an opening for some minutes, and as long as its federation once a record in use names it."""

    async def opening(self, federation_id: str, sha256: str) -> bytes:
        """Raises RESULT_UNKNOWN."""

    async def put_refusal(self, federation: FederationRecord, sequence: int, refusal: Dropped) -> None:
        """Keeps why a client's update was refused, or the client gave up; another refusal replaces it."""

    async def put_objection(self, federation: FederationRecord, plan_number: int, objection: Dropped) -> None:
        """Keeps why a client rejects a plan."""

    async def objections(self, federation: FederationRecord, plan_number: int) -> dict[str, Dropped]:
        """Who rejects a plan, by client."""

    async def put_shapes(self, federation_id: str, client_id: str, model: Model) -> None:
        """Keeps the model of a client until the first round."""

    async def shapes(self, federation_id: str, client_id: str) -> Model | None:
        """The model of a client; None if it is not kept (any more)."""

    async def drop_shapes(self, federation_id: str) -> None:
        """Deletes the models of all clients."""

    async def delete(self, federation: FederationRecord) -> None:
        """Deletes everything of a federation, its record last."""

    async def rewrite_log(self) -> None:
        """Has Redis write its append-only file anew, from which deleted values are not gone before. Never raises.

        Where it may not be asked to, or is about it, nothing happens.
        """

    async def refusals(self, federation: FederationRecord, sequence: int) -> list[Dropped]:
        """Refused updates, by client."""

    async def put_ballot(
        self, federation: FederationRecord, sequence: int, client_id: str, ballot: bytes
    ) -> None:
        """Keeps a client's ballot while its vote collects; before it is committed a repeat replaces it."""

    async def ballot(self, federation: FederationRecord, sequence: int, client_id: str) -> bytes | None:
        """A client's ballot; None if there is none (any more)."""

    async def drop_ballots(self, federation: FederationRecord, sequence: int) -> None:
        """Deletes all ballots of a vote."""

    async def put_member(self, federation_id: str, member: Member) -> None:
        """Adds or replaces a member."""

    async def member_count(self, federation_id: str) -> int:
        """Number of members."""

    async def members(self, federation_id: str) -> dict[str, Member]:
        """Members by client, sorted."""

    async def member(self, federation_id: str, client_id: str) -> Member | None:
        """A client that has joined, whether it was revoked since or not; None if it has not joined."""

    async def is_member(self, federation_id: str, client_id: str) -> bool:
        """Whether a client has joined."""

    async def see(self, federation_id: str, client_id: str, sighting: Sighting, session: str = "") -> int:
        """Keeps what a member said of itself until the sighting expires.

        Returns the number of members; 0: the client is none; -1: another session of it began since.
        """

    async def begin_session(self, federation_id: str, client_id: str, session: str) -> None:
        """Makes a process the one that takes part as this client."""

    async def copies(self, federation_id: str) -> dict[str, int]:
        """When another process than the one taking part was last refused, Unix milliseconds by client."""

    async def touch(self, federation_id: str, client_id: str, at_ms: int) -> None:
        """Notes that a client called, also before it is a member; what it last said of itself stays."""

    async def sightings(self, federation_id: str, client_ids: Sequence[str]) -> dict[str, Sighting]:
        """Sightings that have not expired, by client."""

    async def put_layout(self, federation_id: str, layout: LayoutRecord, digest: str) -> None:
        """Keeps a layout under its digest; again renews its expiry."""

    async def layout(self, federation_id: str, digest: str) -> LayoutRecord:
        """Raises ROUND_UNKNOWN: the layout has expired, and with it the rounds that used it."""

    async def put_shard(
        self, federation: FederationRecord, record: RoundRecord, index: int, result: ShardResult
    ) -> None:
        """Keeps the result of a shard for the round's present set of contributors."""

    async def shards(self, federation: FederationRecord, record: RoundRecord) -> dict[int, ShardResult]:
        """Shards aggregated so far, by index."""

    async def put_evaluation(
        self, federation: FederationRecord, sequence: int, evaluation: Evaluation
    ) -> None:
        """Adds or replaces a client's evaluation of a round's result."""

    async def evaluations(self, federation: FederationRecord, sequence: int) -> list[Evaluation]:
        """Evaluations of a round's result, by client."""

    async def put_plan(self, federation_id: str, sha256: str, sealed: bytes) -> None:
        """Keeps a sealed plan for some minutes, and as long as its federation once a record names it."""

    async def plan(self, federation_id: str, sha256: str) -> bytes:
        """Raises PLAN_UNKNOWN."""

    async def acquire(self, federation_id: str, token: str, lease_s: float) -> bool:
        """Takes the lease of a federation if nobody holds it."""

    async def renew(self, federation_id: str, token: str, lease_s: float) -> bool:
        """Prolongs a lease. False: it is lost."""

    async def release(self, federation_id: str, token: str) -> None:
        """Gives a lease back, if it is still held."""


def _unknown(federation_id: str) -> DomainError:
    return DomainError(Reason.FEDERATION_UNKNOWN, f"there is no federation {federation_id!r}")


def _full() -> RetryLaterError:
    why = "the coordinator's store is full; the operator can raise Redis' maxmemory"
    return RetryLaterError(Reason.STORE_FULL, why, FULL_RETRY_S)


_FAILURES: Final = Failures("the coordinator's store", _full)


def _available(
    method: Callable[Concatenate["RedisStore", _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate["RedisStore", _P], Coroutine[Any, Any, _T]]:
    """Limits the time of an operation, and names failures of Redis."""

    @functools.wraps(method)
    async def wrapped(self: "RedisStore", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        async with _FAILURES.within(self.timeout_s):
            return await method(self, *args, **kwargs)

    return wrapped


class RedisStore:
    """The store on Redis.

    Args:
        redis: Client that returns bytes.
        clock_ms: Unix milliseconds, for the index of federations.
        retention: Life of everything after the last change of its federation.
        sighting: Life of a sighting.
        timeout_s: Seconds after which an operation fails with STORE_UNAVAILABLE.
        keys: Names of the keys.
    """

    def __init__(
        self,
        redis: RedisClient,
        clock_ms: Callable[[], int],
        retention: timedelta = timedelta(days=30),
        sighting: timedelta = timedelta(hours=1),
        timeout_s: float = 30.0,
        keys: Keys | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self._redis = redis
        self._clock_ms = clock_ms
        self._retention_ms = _ms(retention)
        self._sighting_ms = _ms(sighting)
        self._keys = keys or Keys()
        self._compare_and_set = redis.register_script(COMPARE_AND_SET)
        self._commit = redis.register_script(COMMIT)
        self._state = redis.register_script(STATE)
        self._put = redis.register_script(PUT_FIELD)
        self._see = redis.register_script(SEE)
        self._touch = redis.register_script(TOUCH)
        self._renew = redis.register_script(RENEW)
        self._release = redis.register_script(RELEASE)

    @_available
    async def federation_ids(self) -> list[str]:
        live = await self._redis.zrangebyscore(self._keys.index, self._clock_ms(), "+inf")
        return sorted(name.decode() for name in live)

    @_available
    async def federation(self, federation_id: str) -> Versioned[FederationRecord]:
        found = await self._read(self._keys.federation(federation_id), FederationRecord)
        if found is None:
            raise _unknown(federation_id)
        return found

    @_available
    async def write_federation(
        self, name: str, record: FederationRecord, before: Versioned[FederationRecord] | None
    ) -> bool:
        federation_id = record.federation_id
        await self._index(federation_id, new=before is None)
        keys = [self._keys.federation(federation_id), *self._standing(record)]
        old = {*self._plan_keys(before.record), *self._opening_keys(before.record)} if before else set()
        revision = before.revision if before else 0
        return await self._write(
            name, federation_id, keys, record, record.phase, revision, unused=sorted(old - set(keys))
        )

    async def transact(
        self, name: str, federation_id: str, change: Callable[[FederationRecord], FederationRecord]
    ) -> FederationRecord:
        for _ in range(MAX_CONFLICTS):
            found = await self.federation(federation_id)
            changed = change(found.record)
            if changed == found.record:
                TRANSACTION_TOTAL.labels(name, "unchanged").inc()
                return changed
            if await self.write_federation(name, changed, found):
                return changed
        raise DomainError(Reason.STORE_UNAVAILABLE, f"{name} was overtaken {MAX_CONFLICTS} times")

    @_available
    async def round(self, federation: FederationRecord, sequence: int) -> Versioned[RoundRecord] | None:
        return await self._read(self._round_key(federation, sequence), RoundRecord)

    @_available
    async def write_round(
        self, name: str, federation: FederationRecord, record: RoundRecord, revision: int
    ) -> bool:
        keys = [
            self._round_key(federation, record.sequence),
            self._keys.commits(federation.federation_id, federation.instance, record.sequence),
            self._keys.layout(federation.federation_id, record.layout_digest),
        ]
        if record.ranked is not None:  # in force once the round is settled
            keys.append(self._keys.plan(federation.federation_id, record.ranked.digest.sha256))
        if record.opening is not None:
            keys.append(self._keys.opening(federation.federation_id, record.opening.sha256))
        return await self._write(name, federation.federation_id, keys, record, record.round.state, revision)

    @_available
    async def commit(
        self, federation: FederationRecord, sequence: int, update: Update, dealt: Dealt | None = None
    ) -> tuple[CommitOutcome, int]:
        scope = (federation.federation_id, federation.instance, sequence)
        parts: dict[str, bytes] = {}
        if dealt is not None:
            parts = {self._keys.dealings(*scope): dealt.dealing}
            parts |= {self._keys.shares(*scope, i): share for i, share in enumerate(dealt.shares)}
        outcome, count = await self._commit(
            keys=[self._round_key(federation, sequence), self._keys.commits(*scope), *parts],
            args=[
                update.client_id,
                update.manifest_digest,
                update.model_dump_json(),
                self._retention_ms,
                self._keys.changes(federation.federation_id),
                *parts.values(),
            ],
        )
        return CommitOutcome(outcome), int(count)

    @_available
    async def state(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_id: str,
        content: bytes,
        order: tuple[str, ...] = (),
    ) -> StateOutcome:
        keys = [self._round_key(federation, sequence), self._statements_key(kind, federation, sequence)]
        kept: list[str] = []
        if order:
            keys.append(self._keys.orders(federation.federation_id, federation.instance, sequence))
            kept = [order_digest(order), json.dumps(order)]
        outcome = await self._state(
            keys=keys,
            args=[
                client_id,
                content,
                self._retention_ms,
                self._keys.changes(federation.federation_id),
                f",{','.join(sorted(kind.states))},",
                *kept,
            ],
        )
        return StateOutcome(int(outcome))

    @_available
    async def statements(
        self,
        kind: Statement,
        federation: FederationRecord,
        sequence: int,
        client_ids: Sequence[str] | None = None,
    ) -> dict[str, bytes]:
        return await self._by_client(self._statements_key(kind, federation, sequence), client_ids)

    @_available
    async def statement(
        self, kind: Statement, federation: FederationRecord, sequence: int, client_id: str
    ) -> bytes | None:
        found = await self._redis.hget(self._statements_key(kind, federation, sequence), client_id)
        return None if found is None else bytes(found)

    @_available
    async def speakers(self, kind: Statement, federation: FederationRecord, sequence: int) -> frozenset[str]:
        return await self._names(self._statements_key(kind, federation, sequence))

    @_available
    async def orders(self, federation: FederationRecord, sequence: int) -> dict[str, tuple[str, ...]]:
        key = self._keys.orders(federation.federation_id, federation.instance, sequence)
        fields = await self._hash(key)
        return {digest.decode(): tuple(json.loads(names)) for digest, names in sorted(fields.items())}

    @_available
    async def dealers(self, federation: FederationRecord, sequence: int) -> frozenset[str]:
        return await self._names(self._keys.dealings(federation.federation_id, federation.instance, sequence))

    @_available
    async def dealings(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        key = self._keys.dealings(federation.federation_id, federation.instance, sequence)
        return await self._by_client(key, client_ids)

    @_available
    async def shares(
        self, federation: FederationRecord, sequence: int, place: int, client_ids: Sequence[str]
    ) -> dict[str, bytes]:
        key = self._keys.shares(federation.federation_id, federation.instance, sequence, place)
        return await self._by_client(key, client_ids)

    @_available
    async def drop_committee(self, federation: FederationRecord, sequence: int) -> None:
        await self._redis.unlink(*self._committee_keys(federation, sequence))

    @_available
    async def put_opening(self, federation_id: str, sha256: str, opening: bytes) -> None:
        await self._redis.set(self._keys.opening(federation_id, sha256), opening, px=PASSING_MS)

    @_available
    async def opening(self, federation_id: str, sha256: str) -> bytes:
        found = await self._redis.get(self._keys.opening(federation_id, sha256))
        if found is None:
            raise DomainError(Reason.RESULT_UNKNOWN, "what opens the result has expired")
        return bytes(found)

    @_available
    async def commit_of(self, federation: FederationRecord, sequence: int, client_id: str) -> Commit | None:
        key = self._keys.commits(federation.federation_id, federation.instance, sequence)
        data = await self._redis.hget(key, client_id)
        return None if data is None else _commit_from(data)

    @_available
    async def commits(self, federation: FederationRecord, sequence: int) -> list[Commit]:
        key = self._keys.commits(federation.federation_id, federation.instance, sequence)
        return sorted(
            (_commit_from(data) for data in (await self._hash(key)).values()), key=lambda c: c.ordinal
        )

    @_available
    async def commit_count(self, federation: FederationRecord, sequence: int) -> int:
        key = self._keys.commits(federation.federation_id, federation.instance, sequence)
        return int(await self._redis.hlen(key))

    @_available
    async def committed(
        self, federation: FederationRecord, sequence: int, client_ids: Sequence[str]
    ) -> AbstractSet[str]:
        if not client_ids:
            return set()
        key = self._keys.commits(federation.federation_id, federation.instance, sequence)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for client_id in client_ids:
                pipeline.hexists(key, client_id)
            found = zip(client_ids, await pipeline.execute(), strict=True)
        return {client_id for client_id, there in found if there}

    @_available
    async def committers(self, federation: FederationRecord, sequence: int) -> AbstractSet[str]:
        key = self._keys.commits(federation.federation_id, federation.instance, sequence)
        return {name.decode() for name in await self._redis.hkeys(key)}

    @_available
    async def put_refusal(self, federation: FederationRecord, sequence: int, refusal: Dropped) -> None:
        key = self._keys.refusals(federation.federation_id, federation.instance, sequence)
        await self._put_field(federation.federation_id, key, refusal.client_id, refusal.model_dump_json())
        if refusal.gave_up:  # it concerns the driver
            await self._redis.publish(self._keys.changes(federation.federation_id), refusal.client_id)

    @_available
    async def put_objection(self, federation: FederationRecord, plan_number: int, objection: Dropped) -> None:
        key = self._keys.objections(federation.federation_id, federation.instance, plan_number)
        await self._put_field(federation.federation_id, key, objection.client_id, objection.model_dump_json())
        await self._redis.publish(self._keys.changes(federation.federation_id), objection.client_id)

    @_available
    async def objections(self, federation: FederationRecord, plan_number: int) -> dict[str, Dropped]:
        key = self._keys.objections(federation.federation_id, federation.instance, plan_number)
        return {name.decode(): Dropped.read(data) for name, data in sorted((await self._hash(key)).items())}

    @_available
    async def put_shapes(self, federation_id: str, client_id: str, model: Model) -> None:
        key = self._keys.shapes(federation_id)
        await self._put_field(federation_id, key, client_id, model.model_dump_json())

    @_available
    async def shapes(self, federation_id: str, client_id: str) -> Model | None:
        data = await self._redis.hget(self._keys.shapes(federation_id), client_id)
        return None if data is None else Model.read(data)

    @_available
    async def drop_shapes(self, federation_id: str) -> None:
        await self._redis.unlink(self._keys.shapes(federation_id))

    async def delete(self, federation: FederationRecord) -> None:
        federation_id = federation.federation_id
        for client_id in await self.members(federation_id):
            await self._unlink(self._keys.sighting(federation_id, client_id))
        for sequence in range(1, federation.sequence + 1):
            await self._unlink(*await self._round_keys(federation, sequence))
        for number in range(1, federation.plan_count + 1):
            await self._unlink(self._keys.objections(federation_id, federation.instance, number))
        await self._unlink(
            *(self._keys.layout(federation_id, digest) for digest in federation.layouts_in_use),
            *self._plan_keys(federation),
            self._keys.shapes(federation_id),
            self._keys.sessions(federation_id),
            self._keys.copies(federation_id),
            self._keys.members(federation_id),
        )
        await self._forget(federation_id)

    async def rewrite_log(self) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._redis.execute_command("BGREWRITEAOF")
        except (RedisError, OSError) as error:  # of a user that may not: a NoPermissionError
            _log.info("append_only_file_not_rewritten", why=str(error))

    async def _round_keys(self, federation: FederationRecord, sequence: int) -> list[str]:
        """All keys of a round, and that of its layout."""
        names = (federation.federation_id, federation.instance, sequence)
        found = await self.round(federation, sequence)
        keys = self._keys
        own = [keys.round(*names), keys.commits(*names), keys.refusals(*names), keys.ballots(*names)]
        own.append(keys.evaluations(*names))
        if found is None:
            return own
        generations = range(len(found.record.dropped) + 1)
        layout = keys.layout(federation.federation_id, found.record.layout_digest)
        ranked, opening = found.record.ranked, found.record.opening
        plan = [keys.plan(federation.federation_id, ranked.digest.sha256)] if ranked else []
        if opening is not None:
            plan.append(keys.opening(federation.federation_id, opening.sha256))
        if found.record.round.convenes:
            plan += self._committee_keys(federation, sequence)
        return [*own, layout, *plan, *(keys.shards(*names, generation) for generation in generations)]

    @_available
    async def _unlink(self, *keys: str) -> None:
        if keys:
            await self._redis.unlink(*keys)

    @_available
    async def _forget(self, federation_id: str) -> None:
        """Deletes the record, and tells everyone who waits for it."""
        await self._redis.unlink(self._keys.federation(federation_id))
        await self._redis.zrem(self._keys.index, federation_id)
        await self._redis.publish(self._keys.changes(federation_id), "")

    @_available
    async def refusals(self, federation: FederationRecord, sequence: int) -> list[Dropped]:
        key = self._keys.refusals(federation.federation_id, federation.instance, sequence)
        return [Dropped.read(data) for _, data in sorted((await self._hash(key)).items())]

    @_available
    async def put_ballot(
        self, federation: FederationRecord, sequence: int, client_id: str, ballot: bytes
    ) -> None:
        place = (federation.federation_id, federation.instance, sequence)
        key, round_ = self._keys.ballots(*place), self._keys.round(*place)
        await self._put_field(federation.federation_id, key, client_id, ballot, collecting=round_)

    @_available
    async def ballot(self, federation: FederationRecord, sequence: int, client_id: str) -> bytes | None:
        key = self._keys.ballots(federation.federation_id, federation.instance, sequence)
        found = await self._redis.hget(key, client_id)
        return None if found is None else bytes(found)

    @_available
    async def drop_ballots(self, federation: FederationRecord, sequence: int) -> None:
        await self._redis.unlink(self._keys.ballots(federation.federation_id, federation.instance, sequence))

    @_available
    async def put_member(self, federation_id: str, member: Member) -> None:
        key = self._keys.members(federation_id)
        await self._put_field(federation_id, key, member.client_id, member.model_dump_json())
        # It concerns the driver: what the other members should do does not change.
        await self._redis.publish(self._keys.changes(federation_id), member.client_id)

    @_available
    async def member_count(self, federation_id: str) -> int:
        return int(await self._redis.hlen(self._keys.members(federation_id)))

    @_available
    async def members(self, federation_id: str) -> dict[str, Member]:
        fields = await self._hash(self._keys.members(federation_id))
        return {name.decode(): Member.read(data) for name, data in sorted(fields.items())}

    @_available
    async def member(self, federation_id: str, client_id: str) -> Member | None:
        data = await self._redis.hget(self._keys.members(federation_id), client_id)
        return None if data is None else Member.read(data)

    @_available
    async def is_member(self, federation_id: str, client_id: str) -> bool:
        return bool(await self._redis.hexists(self._keys.members(federation_id), client_id))

    @_available
    async def see(self, federation_id: str, client_id: str, sighting: Sighting, session: str = "") -> int:
        keys = [
            self._keys.members(federation_id),
            self._keys.sighting(federation_id, client_id),
            self._keys.sessions(federation_id),
            self._keys.copies(federation_id),
        ]
        said = sighting.model_dump_json()
        return int(await self._see(keys, [client_id, said, self._sighting_ms, session, sighting.at_ms]))

    @_available
    async def begin_session(self, federation_id: str, client_id: str, session: str) -> None:
        await self._put_field(federation_id, self._keys.sessions(federation_id), client_id, session)

    @_available
    async def copies(self, federation_id: str) -> dict[str, int]:
        return {
            name.decode(): int(at_ms)
            for name, at_ms in (await self._hash(self._keys.copies(federation_id))).items()
        }

    @_available
    async def touch(self, federation_id: str, client_id: str, at_ms: int) -> None:
        first = Sighting(stage="", progress=0.0, at_ms=at_ms)
        key = self._keys.sighting(federation_id, client_id)
        await self._touch([key], [at_ms, first.model_dump_json(), self._sighting_ms])

    @_available
    async def sightings(self, federation_id: str, client_ids: Sequence[str]) -> dict[str, Sighting]:
        if not client_ids:
            return {}
        keys = [self._keys.sighting(federation_id, client_id) for client_id in client_ids]
        found = zip(client_ids, await self._redis.mget(keys), strict=True)
        return {name: Sighting.read(data) for name, data in found if data is not None}

    @_available
    async def put_layout(self, federation_id: str, layout: LayoutRecord, digest: str) -> None:
        key = self._keys.layout(federation_id, digest)
        await self._redis.set(key, layout.model_dump_json(), px=self._retention_ms)

    @_available
    async def layout(self, federation_id: str, digest: str) -> LayoutRecord:
        data = await self._redis.get(self._keys.layout(federation_id, digest))
        if data is None:
            raise DomainError(Reason.ROUND_UNKNOWN, "the layout of the round has expired")
        return LayoutRecord.read(data)

    @_available
    async def put_shard(
        self, federation: FederationRecord, record: RoundRecord, index: int, result: ShardResult
    ) -> None:
        # Aggregation knows them, too: they spare calls while a round is aggregated, and are no history.
        key = self._shards_key(federation, record)
        await self._put_field(federation.federation_id, key, str(index), result.model_dump_json(), SHARDS_MS)

    @_available
    async def shards(self, federation: FederationRecord, record: RoundRecord) -> dict[int, ShardResult]:
        fields = await self._hash(self._shards_key(federation, record))
        return {int(index): ShardResult.read(data) for index, data in fields.items()}

    @_available
    async def put_evaluation(
        self, federation: FederationRecord, sequence: int, evaluation: Evaluation
    ) -> None:
        key = self._keys.evaluations(federation.federation_id, federation.instance, sequence)
        await self._put_field(
            federation.federation_id, key, evaluation.client_id, evaluation.model_dump_json()
        )

    @_available
    async def evaluations(self, federation: FederationRecord, sequence: int) -> list[Evaluation]:
        key = self._keys.evaluations(federation.federation_id, federation.instance, sequence)
        fields = await self._hash(key)
        return [Evaluation.read(data) for _, data in sorted(fields.items())]

    @_available
    async def put_plan(self, federation_id: str, sha256: str, sealed: bytes) -> None:
        key = self._keys.plan(federation_id, sha256)
        await self._redis.set(key, sealed, px=PASSING_MS)

    @_available
    async def plan(self, federation_id: str, sha256: str) -> bytes:
        sealed = await self._redis.get(self._keys.plan(federation_id, sha256))
        if sealed is None:
            raise DomainError(Reason.PLAN_UNKNOWN, "the plan has expired")
        return bytes(sealed)

    @_available
    async def acquire(self, federation_id: str, token: str, lease_s: float) -> bool:
        key = self._keys.lease(federation_id)
        return bool(await self._redis.set(key, token, nx=True, px=int(1000 * lease_s)))

    @_available
    async def renew(self, federation_id: str, token: str, lease_s: float) -> bool:
        key = self._keys.lease(federation_id)
        return bool(await self._renew(keys=[key], args=[token, int(1000 * lease_s)]))

    @_available
    async def release(self, federation_id: str, token: str) -> None:
        await self._release(keys=[self._keys.lease(federation_id)], args=[token])

    async def _index(self, federation_id: str, *, new: bool) -> None:
        """Lists a federation until its record expires. Written first: an entry without a record is harmless.

        One that is not new is not listed again: it may have been deleted since it was read.
        """
        now_ms = self._clock_ms()
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.zremrangebyscore(self._keys.index, "-inf", now_ms)
            pipeline.zadd(self._keys.index, {federation_id: now_ms + self._retention_ms}, xx=not new)
            pipeline.pexpire(self._keys.index, self._retention_ms)
            await pipeline.execute()

    async def _read(self, key: str, model: type[_R]) -> Versioned[_R] | None:
        revision, data = await self._redis.hmget(key, ["revision", "data"])
        if revision is None or data is None:
            return None
        return Versioned(model.read(data), int(revision))

    async def _write(
        self,
        name: str,
        federation_id: str,
        keys: Sequence[str],
        record: Record,
        state: str,
        revision: int,
        unused: Sequence[str] = (),
    ) -> bool:
        written = await self._compare_and_set(
            keys=[*keys, *unused],
            args=[
                revision,
                record.model_dump_json(),
                state,
                self._retention_ms,
                self._keys.changes(federation_id),
                len(keys),
                PASSING_MS,
            ],
        )
        TRANSACTION_TOTAL.labels(name, "written" if written else "conflict").inc()
        return bool(written)

    async def _put_field(
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
        keys = [self._keys.federation(federation_id), key, *([collecting] if collecting else [])]
        if not await self._put(keys, [field, data, life_ms or self._retention_ms]):
            raise _unknown(federation_id)

    async def _by_client(self, key: str, client_ids: Sequence[str] | None = None) -> dict[str, bytes]:
        """Fields of a hash, sorted. Args: client_ids: only these, as far as they are there."""
        if client_ids is None:
            return {name.decode(): bytes(value) for name, value in sorted((await self._hash(key)).items())}
        names = sorted(client_ids)
        values = await self._redis.hmget(key, names) if names else []
        return {name: bytes(value) for name, value in zip(names, values, strict=True) if value is not None}

    async def _names(self, key: str) -> frozenset[str]:
        return frozenset(name.decode() for name in await self._redis.hkeys(key))

    async def _hash(self, key: str) -> Mapping[bytes, bytes]:
        return cast("Mapping[bytes, bytes]", await self._redis.hgetall(key))  # the client decodes nothing

    def _standing(self, record: FederationRecord) -> list[str]:
        """Keys that must live as long as the federation, whatever happens to it."""
        return [
            self._keys.members(record.federation_id),
            *self._plan_keys(record),
            *self._opening_keys(record),
            *(self._round_key(record, sequence) for sequence in sorted(record.results_in_use)),
            *(self._keys.layout(record.federation_id, digest) for digest in sorted(record.layouts_in_use)),
        ]

    def _committee_keys(self, federation: FederationRecord, sequence: int) -> list[str]:
        """Keys of all statements, dealings and shares of a round."""
        scope = (federation.federation_id, federation.instance, sequence)
        return [
            *(self._keys.statements(*scope, kind) for kind in Statement),
            *(self._keys.shares(*scope, place) for place in range(MAX_MEMBERS)),
            self._keys.orders(*scope),
            self._keys.dealings(*scope),
        ]

    def _opening_keys(self, record: FederationRecord) -> list[str]:
        openings = (result.opening for result in record.results)
        return [self._keys.opening(record.federation_id, opening.sha256) for opening in openings if opening]

    def _plan_keys(self, record: FederationRecord) -> list[str]:
        return [self._keys.plan(record.federation_id, plan.digest.sha256) for plan in record.plans]

    def _round_key(self, federation: FederationRecord, sequence: int) -> str:
        return self._keys.round(federation.federation_id, federation.instance, sequence)

    def _statements_key(self, kind: Statement, federation: FederationRecord, sequence: int) -> str:
        return self._keys.statements(federation.federation_id, federation.instance, sequence, kind)

    def _shards_key(self, federation: FederationRecord, record: RoundRecord) -> str:
        generation = len(record.dropped)
        return self._keys.shards(federation.federation_id, federation.instance, record.sequence, generation)


def order_digest(order: Sequence[str]) -> str:
    """SHA-256 in hex of a committee in its order."""
    return hashlib.sha256(json.dumps(order).encode()).hexdigest()


def _commit_from(data: bytes) -> Commit:
    ordinal, _, update = data.split(b" ", 2)
    return Commit(ordinal=int(ordinal), update=Update.read(update))


def _ms(duration: timedelta) -> int:
    return int(duration / timedelta(milliseconds=1))
