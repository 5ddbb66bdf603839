"""An event loop whose clock jumps: no waiting, no threads, no sockets, the same order of events every time.

Time passes only when nothing is left to do at an instant; then the clock jumps to the next timer. Calls that product
code gives to threads run here, one after the other, at an instant that `thread_s` draws.
"""

import asyncio
from collections.abc import Callable
from typing import Any


class Deadlock(Exception):  # noqa: N818 - what happened
    """Nobody will ever do anything again."""


class _Jump:
    """In place of a selector: `select` makes the time pass at once."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock
        self._loop.now_s += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Time begins at 0 seconds.

    Args:
        thread_s: Draws how long a call in a thread takes.
        guarded: Makes a call in a thread end with the process that asked for it.
    """

    def __init__(
        self,
        thread_s: Callable[[], float] = lambda: 0.001,
        guarded: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
    ) -> None:
        super().__init__()
        self.now_s = 0.0
        self._thread_s = thread_s
        self._guarded = guarded
        self._free_s: dict[int, float] = {}
        self._selector = _Jump(self)
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """Runs the call later in this thread. A caller that leaves does not stop it, as with a real thread."""
        future = self.create_future()
        guarded = self._guarded(func)

        def work() -> None:
            try:
                result = guarded(*args)
            except BaseException as error:  # noqa: BLE001 - it is the caller's, whatever it is
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        at_s = self.now_s + self._thread_s()
        if executor is not None:  # one thread: calls follow one another
            at_s = max(at_s, self._free_s.get(id(executor), 0.0) + 1e-4)
            self._free_s[id(executor)] = at_s
        self.call_at(at_s, work)
        return future

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
