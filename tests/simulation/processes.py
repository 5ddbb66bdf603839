"""Processes of the simulated cluster: they take time, stand still, and die without a last word."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Final, TypeVar

from tests.simulation.faults import Crash, Faults, Jitter, Pause, Store
from tests.simulation.loop import VirtualLoop

_T = TypeVar("_T")

EPOCH_MS: Final = 1_700_000_000_000
"""Unix milliseconds at which a run begins."""

CURRENT: contextvars.ContextVar["Process"] = contextvars.ContextVar("process")


class Crashed(BaseException):
    """The process is dead. No code catches it, so that nothing is done on the way out."""


class Process:
    """One life of a process.

    Args:
        on_death: Told when it was killed by a fault.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        name: str,
        rng: Random,
        faults: Faults,
        *,
        skew_ms: int = 0,
        on_death: Callable[["Process", Crash], None] = lambda _process, _crash: None,
    ) -> None:
        self.name = name
        self.rng = rng
        self.dead = False
        self._loop = loop
        self._faults = faults
        self.even = Jitter() not in faults.standing
        self._skew_ms = skew_ms
        self._on_death = on_death
        self._paused_until_s = 0.0
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._context = contextvars.copy_context()
        self._context.run(CURRENT.set, self)

    def clock_ms(self) -> int:
        return EPOCH_MS + int(1000 * self._loop.now_s) + self._skew_ms

    def spawn(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Starts a task of this process."""
        return self._loop.create_task(work, name=name or self.name, context=self._context.copy())

    def run(self, work: Callable[[], _T]) -> _T:
        """What this process does at once."""
        return self._context.copy().run(work)

    def owns(self, task: asyncio.Task[Any]) -> None:
        """Remembers a task that was started by this process."""
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def operate(self, kind: str = "call") -> Store | None:
        """What precedes every store command and every call. Returns a fault of the command. Raises Crashed."""
        self._require_alive()
        fault = self._faults.on("operation", self.name, kind=kind)
        if isinstance(fault, Pause):
            self._paused_until_s = self._loop.now_s + fault.seconds
        elif isinstance(fault, Crash):
            self._loop.call_later(fault.delay_s, self.crash, fault)
        await self.latency()
        return fault if isinstance(fault, Store) else None

    def thread_s(self) -> float:
        """Seconds of a call in a thread."""
        fault = self._faults.on("thread", self.name)
        return fault.seconds if fault else self.step_s()

    async def latency(self) -> None:
        """Takes the time of one step. Raises Crashed."""
        await asyncio.sleep(self.step_s())
        while self._paused_until_s > self._loop.now_s:
            await asyncio.sleep(self._paused_until_s - self._loop.now_s)
        self._require_alive()

    def step_s(self) -> float:
        """Seconds of one step: mostly a millisecond, sometimes far more."""
        if self.even:
            return 0.001
        draw = self.rng.random()
        return 0.0005 + 0.002 * draw if draw < 0.97 else 0.3 * self.rng.random()

    def crash(self, fault: Crash) -> None:
        if not self.dead:
            self.kill()
            self._on_death(self, fault)

    def kill(self) -> None:
        """Ends all tasks. What they do on their way out reaches nothing and nobody."""
        self.dead = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            self._loop.call_later(0.01, self.kill)

    def _require_alive(self) -> None:
        if self.dead:
            raise Crashed
