"""Wakes everything that waits for a federation to change: one Redis subscription a process, however many wait.

A wake-up is a hint, never information: the woken read the store. Notifications may be lost (a connection broke, a
replica started late), so everyone who waits also looks again after a while.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from coordinator.keys import Keys
from services.common.redis_client import RedisClient, refusal
from shelora.errors import DomainError, Reason
from shelora.telemetry.outages import Outage

_READ_S: Final = 5.0
"""Seconds one read of the subscription waits."""
_RECONNECT_S: Final = 1.0

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Signal:
    """A subscriber's wake-up. Set at first, so that no change before the first look is missed."""

    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Returns True at the next change since the last return, or False after `timeout_s`."""
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._event.wait()
        except TimeoutError:
            pass
        woken = self._event.is_set()
        self._event.clear()
        return woken


class Changes:
    """Fans notifications out to the subscribers of this process."""

    def __init__(self, redis: RedisClient, keys: Keys | None = None) -> None:
        self._redis = redis
        self._keys = keys or Keys()
        self._signals: defaultdict[tuple[str | None, str | None], dict[Signal, None]] = defaultdict(dict)
        """By federation and client; None is all of them. Those that wait longest are woken first."""
        self._counts: Counter[str] = Counter()
        self._wakings = 0
        self.closed = False
        """Set once the process drains; streams end then."""

    @contextmanager
    def subscribed(self, federation_id: str | None = None, client_id: str | None = None) -> Iterator[Signal]:
        """A signal for the changes of one federation (or all), of everyone or of what concerns one client."""
        signal, concern = Signal(), (federation_id, client_id)
        self._signals[concern][signal] = None
        try:
            yield signal
        finally:
            del self._signals[concern][signal]
            if not self._signals[concern]:
                del self._signals[concern]

    def version(self, federation_id: str) -> tuple[int, int]:
        """Differs from every earlier one once something that concerns all clients of the federation has changed."""
        return self._wakings, self._counts[federation_id]

    def close(self) -> None:
        """Tells every subscriber that the process drains."""
        self.closed = True
        self.wake_all()

    def wake_all(self) -> None:
        self._wakings += 1
        for signals in self._signals.values():
            _wake(signals)

    async def run(self) -> None:
        """Listens until cancelled; reconnects, and wakes everyone then, for what was missed."""
        outage = Outage(_log, "changes_disconnected", over="changes_connected")
        while True:
            try:
                await self._listen(outage)
            except (RedisError, OSError) as error:
                why = refusal(error) or type(error).__name__
                outage.failed(DomainError(Reason.STORE_UNAVAILABLE, why))
                await asyncio.sleep(_RECONNECT_S)

    async def _listen(self, outage: Outage) -> None:
        async with self._redis.pubsub() as subscription:
            await subscription.psubscribe(self._keys.every_change)
            outage.ended()
            self.wake_all()
            while True:
                message = await _next(subscription)
                if message is not None and message["type"] == "pmessage":
                    self._notify(message["channel"].decode(), message["data"].decode())

    def _notify(self, channel: str, client_id: str) -> None:
        """Wakes whom a change concerns; "" for a client is every client."""
        federation_id = self._keys.federation_of_channel(channel)
        if client_id:
            concerned = [(None, None), (federation_id, None), (federation_id, client_id)]
        else:
            self._counts[federation_id] += 1
            concerned = [concern for concern in self._signals if concern[0] in {None, federation_id}]
        for concern in concerned:
            _wake(self._signals.get(concern, ()))


async def _next(subscription: PubSub) -> dict[str, Any] | None:
    """The next message of a subscription; None if there is none for some seconds.

    redis-py takes the ETIMEDOUT of a connection whose peer has vanished for the end of its own wait: it returns None at
    once, each time it is called. Raises: ConnectionError then.
    """
    time = asyncio.get_running_loop().time
    asked_s = time()
    message: dict[str, Any] | None = await subscription.get_message(timeout=_READ_S)
    if message is None and time() - asked_s < _READ_S / 2:
        raise RedisConnectionError("the connection of the subscription is gone")
    return message


def _wake(signals: Iterable[Signal]) -> None:
    for signal in signals:
        signal.wake()
