"""Wakes whoever waits for a federation to change: one Redis subscription a process, however many wait.

A wake-up is a hint, never information: the woken read the store. Notifications may be lost (a connection broke, a
replica started late), so everyone who waits also looks again after a while.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from redis.exceptions import RedisError

from coordinator.keys import Keys
from coordinator.store import RedisClient

_READ_S: Final = 5.0
"""Seconds one read of the subscription waits."""
_RECONNECT_S: Final = 1.0

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Signal:
    """A subscriber's wake-up. Set at first, so that no change before the first look is missed."""

    federation_id: str | None
    client_id: str | None
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next change since the last return, or after `timeout_s`."""
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()

    def concerns(self, federation_id: str, client_id: str) -> bool:
        """Whether a change is this subscriber's; "" concerns every client."""
        of_federation = self.federation_id in {None, federation_id}
        return of_federation and (self.client_id is None or client_id in {"", self.client_id})


class Changes:
    """Fans notifications out to the subscribers of this process."""

    def __init__(self, redis: RedisClient, keys: Keys | None = None) -> None:
        self._redis = redis
        self._keys = keys or Keys()
        self._signals: set[Signal] = set()
        self.closed = False
        """Set once the process drains; streams end then."""

    @contextmanager
    def subscribed(self, federation_id: str | None = None, client_id: str | None = None) -> Iterator[Signal]:
        """A signal for the changes of one federation (or all), of everyone or of what concerns one client."""
        signal = Signal(federation_id, client_id)
        self._signals.add(signal)
        try:
            yield signal
        finally:
            self._signals.discard(signal)

    def close(self) -> None:
        """Tells every subscriber that the process drains."""
        self.closed = True
        self.wake_all()

    def wake_all(self) -> None:
        for signal in self._signals:
            signal.wake()

    async def run(self) -> None:
        """Listens until cancelled; reconnects, and wakes everyone then, for what was missed."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                _log.warning("changes_disconnected", error=type(error).__name__)
                await asyncio.sleep(_RECONNECT_S)

    async def _listen(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.psubscribe(self._keys.every_change)
            self.wake_all()
            while True:
                message = await subscription.get_message(timeout=_READ_S)
                if message is not None:
                    self._notify(message["channel"].decode(), message["data"].decode())

    def _notify(self, channel: str, client_id: str) -> None:
        federation_id = self._keys.federation_of_channel(channel)
        for signal in self._signals:
            if signal.concerns(federation_id, client_id):
                signal.wake()
