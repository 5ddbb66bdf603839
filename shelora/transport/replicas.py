"""The replicas of aggregation as their callers see them: any of them serves any call.

The configured addresses are where one begins. Replicas that announce themselves (`ListReplicas`) are learned of while
the process runs, so a new one gets its share without a restart, and those that are gone are forgotten.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import structlog

from shelora.errors import DomainError
from shelora.telemetry.outages import Outage
from shelora.transport.channel import RETRY_S, is_transient, retrying
from shelora.transport.status import error_from_rpc
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc as pb_grpc

_T = TypeVar("_T")

AggregationStub: TypeAlias = "pb_grpc.AggregationAsyncStub"
"""Its methods return awaitables; a class of the stub file only."""

LIST_TIMEOUT_S: Final = 15.0
"""Deadline of ListReplicas."""

SHUNNED_S: Final = 10.0
"""Seconds during which a replica that failed is called only if all others failed, too."""

CLOSING_S: Final = 900.0
"""Seconds that calls to a replica which is not announced any more may take: it may be draining."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Replica:
    """One replica and the channel to it."""

    address: str
    channel: grpc.aio.Channel
    stub: AggregationStub


class Replicas:
    """The replicas known now. For one event loop; calls start looking for others when it is time.

    Args:
        seeds: Configured addresses, `host:port`; always kept.
        connect: Opens a channel.
        refresh_s: Seconds between two looks for other replicas.
        stays: Calls go to one replica until it fails or others are learned of; otherwise to another one each time.
        clock_s: Monotonic seconds; the loop's by default.
        shuffle: Brings the replicas into an order of this caller's own, so that not all begin with the same one.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        connect: Callable[[str], grpc.aio.Channel],
        *,
        refresh_s: float,
        stays: bool = False,
        clock_s: Callable[[], float] | None = None,
        shuffle: Callable[[list[Any]], None] = random.shuffle,
    ) -> None:
        self._seeds = tuple(seeds)
        self._connect = connect
        self._refresh_s = refresh_s
        self._stays = stays
        self._clock_s = clock_s or asyncio.get_running_loop().time
        self._shuffle = shuffle
        self._known: dict[str, Replica] = {}
        self._order: deque[str] = deque()
        """Addresses, the one longest not chosen first."""
        self._failed_s: dict[str, float] = {}
        self._outages: dict[str, Outage] = {}
        self._current: Replica | None = None
        self._refresh_due_s = self._clock_s()
        self._refreshing: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.learn(())

    @property
    def addresses(self) -> tuple[str, ...]:
        """All that are known, sorted."""
        return tuple(sorted(self._known))

    async def call(
        self, operation: Callable[[AggregationStub], Awaitable[_T]], *, retry_s: float = RETRY_S
    ) -> _T:
        """Runs an operation that may be repeated. After a failure that may pass, the next replica tries it.

        Args:
            operation: What to do with a replica.
            retry_s: No attempt starts later than this after the first.

        Raises: DomainError with the server's reason, or STORE_UNAVAILABLE if no replica could be reached.
        """
        address = ""

        async def attempt() -> _T:
            nonlocal address
            replica = self.choose()
            address = replica.address
            try:
                answer = await operation(replica.stub)
            except grpc.aio.AioRpcError as error:
                if is_transient(error):
                    self._outage(address).failed(error_from_rpc(error, address), address=address)
                    self.failed(replica)
                raise
            self._outage(address).ended(address=address)
            return answer

        try:
            return await retrying(retry_s=retry_s)(attempt)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, address) from error

    async def each(self, operation: Callable[[AggregationStub], Awaitable[object]]) -> None:
        """Runs an operation at all replicas known, once. What fails is logged: only for what nobody depends on."""
        replicas = tuple(self._known.values())
        answers = await asyncio.gather(
            *(operation(replica.stub) for replica in replicas), return_exceptions=True
        )
        for replica, answer in zip(replicas, answers, strict=True):
            if isinstance(answer, BaseException):
                _log.debug("replica_did_not_help", address=replica.address, error=type(answer).__name__)

    def choose(self) -> Replica:
        """The replica for the next call; one that failed lately only if all others did, too."""
        self._refresh_if_due()
        if not self._stays or self._current is None:
            self._current = self._turned()
        return self._current

    def failed(self, replica: Replica) -> None:
        """Says that a call failed in a way that another replica may not."""
        self._failed_s[replica.address] = self._clock_s()
        if self._current == replica:
            self._current = None

    def learn(self, addresses: Sequence[str]) -> None:
        """Makes these and the configured ones the replicas; channels to others close when their calls have ended."""
        wanted = list(dict.fromkeys((*addresses, *self._seeds)))
        if set(wanted) == set(self._known):
            return
        for address in [address for address in wanted if address not in self._known]:
            channel = self._connect(address)
            self._known[address] = Replica(address, channel, pb_grpc.AggregationStub(channel))
            _log.info("replica_found", address=address)
        for address in [address for address in self._known if address not in wanted]:
            self._close(self._known.pop(address))
            self._failed_s.pop(address, None)
            self._outages.pop(address, None)
        self._shuffle(wanted)
        self._order = deque(wanted)
        self._current = None

    async def keep_fresh(self) -> None:
        """Looks for others all the time, until cancelled: for those that must know at once when they are needed."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_s)

    async def refresh(self) -> None:
        """Asks for the replicas, one after another until one answers; keeps those known if none does."""
        self._refresh_due_s = self._clock_s() + self._refresh_s
        for replica in sorted(self._known.values(), key=lambda known: self._shunned_s(known.address)):
            try:
                answer = await replica.stub.ListReplicas(pb.ListReplicasRequest(), timeout=LIST_TIMEOUT_S)
                self.learn(answer.addresses)
            except (grpc.aio.AioRpcError, DomainError) as error:
                if is_transient(error):
                    self.failed(replica)
                _log.debug("replicas_not_listed", address=replica.address, error=type(error).__name__)
            else:
                return

    async def close(self) -> None:
        """Closes the connections."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*filter(None, (self._refreshing, *self._closing)), return_exceptions=True)
        for replica in self._known.values():
            await replica.channel.close()

    def _outage(self, address: str) -> Outage:
        return self._outages.setdefault(address, Outage(_log, "replica_failed", over="replica_answers"))

    def _turned(self) -> Replica:
        chosen = min(self._order, key=self._shunned_s)  # the first of several
        self._order.remove(chosen)
        self._order.append(chosen)
        return self._known[chosen]

    def _shunned_s(self, address: str) -> float:
        """When it failed; 0 if that is long ago."""
        failed_s = self._failed_s.get(address, -SHUNNED_S)
        return failed_s if failed_s > self._clock_s() - SHUNNED_S else 0.0

    def _refresh_if_due(self) -> None:
        """Looks for others beside the call at hand, which does not wait for it."""
        now_s = self._clock_s()
        if now_s >= self._refresh_due_s and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self.refresh(), name="list-replicas")

    def _close(self, replica: Replica) -> None:
        _log.info("replica_gone", address=replica.address)
        task = asyncio.create_task(replica.channel.close(CLOSING_S), name="close-replica")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
