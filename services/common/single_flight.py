"""Work that many ask for at once, done once: what a thousand watching agents need is the same for all of them."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class SingleFlight(Generic[_Key, _Value]):
    """Answers by key, of which the newest `size` are kept. A caller that asks while one is made waits for it.

    A failure is everyone's who waited for it, and is not kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[_Key, asyncio.Task[_Value]] = OrderedDict()

    async def get(self, key: _Key, make: Callable[[], Awaitable[_Value]]) -> _Value:
        """The answer for a key, made if there is none. A caller that is cancelled does not stop it for the others."""
        task = self._answers.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            self._answers[key] = task = asyncio.ensure_future(_awaited(make))
            task.add_done_callback(_seen)
        self._answers.move_to_end(key)
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)
        return await asyncio.shield(task)


async def _awaited(make: Callable[[], Awaitable[_Value]]) -> _Value:
    return await make()


def _seen(task: "asyncio.Task[_Value]") -> None:
    """Those who wait have the error; if all have left, nobody needs it."""
    if not task.cancelled():
        task.exception()
