"""How much one caller may ask of a server: calls a second, calls at once, bytes a second. Others are not held up.

Token buckets: tokens come in at a rate, at most a burst of them is kept, and a new caller finds the bucket full.
A call without a token is refused with RATE_LIMITED and the time to wait, which our channels do. Bytes are not refused
but waited for: while the server does not read on, the connection makes the sender wait.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from shelora.errors import Reason, RetryLaterError
from shelora.telemetry.metrics import counter

LIMITED: Final = counter(
    "rpc_limited_total",
    "RPCs refused because their caller asked too much.",
    {"limit": ("rate", "concurrency")},
)

MAX_CALLERS: Final = 10_000
"""Callers remembered, the latest; about 1 KiB each. One that is forgotten finds full buckets again."""

FULL_WAIT_S: Final = 1.0
"""Seconds after which a caller with too many calls in progress may ask again: when one ends is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """What one caller may ask of one replica; 0 stands for no limit."""

    calls_s: float = 0.0
    """Calls a second, in the long run."""
    calls_burst: int = 0
    """Calls that may come at once after a pause."""
    concurrent: int = 0
    """Calls in progress, streams included."""
    bytes_s: float = 0.0
    """Bytes a second of streams that a caller sends, in the long run."""
    bytes_burst: int = 0
    """Bytes that may come at once after a pause."""


class Bucket:
    """Tokens that come in at `rate` a second, at most `burst`. Taking more than there are leaves a debt."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s

    def wait_s(self, tokens: float, now_s: float) -> float:
        """Seconds until that many tokens are there; 0 if they are, or if the rate is 0: no limit."""
        if not self._rate:
            return 0.0
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        return max(0.0, (tokens - self._tokens) / self._rate)

    def take(self, tokens: float) -> None:
        """Takes tokens, those that are not there too."""
        self._tokens -= tokens


class Caller:
    """What one caller has asked."""

    def __init__(self, limits: RateLimits, now_s: float) -> None:
        self.calls = Bucket(limits.calls_s, limits.calls_burst, now_s)
        self.bytes = Bucket(limits.bytes_s, limits.bytes_burst, now_s)
        self.in_progress = 0


class Rates:
    """The limits of one server. Takes a clock and a sleep, in seconds."""

    def __init__(
        self,
        limits: RateLimits,
        clock_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._limits = limits
        self._clock_s = clock_s
        self._sleep = sleep
        self._callers: OrderedDict[str, Caller] = OrderedDict()

    @contextmanager
    def call(self, name: str) -> Iterator[Caller]:
        """Counts a call while it lasts. Raises: RATE_LIMITED."""
        caller = self._caller(name)
        self._admit(caller)
        caller.in_progress += 1
        try:
            yield caller
        finally:
            caller.in_progress -= 1

    async def receive(self, caller: Caller, size_bytes: int) -> None:
        """Counts bytes that arrived; returns when their caller may send more."""
        wait_s = caller.bytes.wait_s(0, self._clock_s())
        caller.bytes.take(size_bytes)
        if wait_s:
            await self._sleep(wait_s)

    def _admit(self, caller: Caller) -> None:
        most = self._limits.concurrent
        if most and caller.in_progress >= most:
            LIMITED.labels("concurrency").inc()
            raise RetryLaterError(
                Reason.RATE_LIMITED,
                f"{most} calls of this caller are in progress, the most allowed: end one first",
                FULL_WAIT_S,
            )
        wait_s = caller.calls.wait_s(1, self._clock_s())
        if wait_s:
            LIMITED.labels("rate").inc()
            allowed = f"more than {self._limits.calls_s:g} calls a second of this caller"
            raise RetryLaterError(Reason.RATE_LIMITED, f"{allowed}: try again in {wait_s:.3f} s", wait_s)
        caller.calls.take(1)

    def _caller(self, name: str) -> Caller:
        caller = self._callers.pop(name, None) or Caller(self._limits, self._clock_s())
        self._callers[name] = caller
        while len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        return caller
