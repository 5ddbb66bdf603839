"""The one thread for blocking work (training, cryptography), so that the event loop stays free for heartbeats."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Worker:
    """Runs one call after the other. A caller that is cancelled leaves its call to end by itself; later ones wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")

    async def run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The result of the call, made in the worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    async def close(self) -> None:
        """Waits for the call in progress and drops those behind it."""
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
