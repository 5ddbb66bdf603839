"""Events that come again and again: told once, and after a while how often more."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

WINDOW_S: Final = 60.0
"""Seconds in which an event like one before is counted and not told."""

MAX_EVENTS: Final = 10_000
"""Different events counted at once; more are logged each time."""

_Event = TypeVar("_Event", bound=Hashable)


class Repeats(Generic[_Event]):
    """Whether an event is new, and how often it was repeated. For use in an event loop.

    Args:
        tell: Takes an event and how often it came again in the window after the first.
        window_s: As WINDOW_S.
    """

    def __init__(self, tell: Callable[[_Event, int], object], window_s: float = WINDOW_S) -> None:
        self._tell = tell
        self._window_s = window_s
        self._counts: dict[_Event, int] = {}

    def is_new(self, event: _Event) -> bool:
        """True for the first of a window, which the caller tells; counts the others."""
        if event in self._counts:
            self._counts[event] += 1
            return False
        if len(self._counts) < MAX_EVENTS:
            self._counts[event] = 0
            asyncio.get_running_loop().call_later(self._window_s, self._end, event)
        return True

    def flush(self) -> None:
        """Tells what is only counted yet."""
        for event in list(self._counts):
            self._end(event)

    def _end(self, event: _Event) -> None:
        if count := self._counts.pop(event, 0):
            self._tell(event, count)
