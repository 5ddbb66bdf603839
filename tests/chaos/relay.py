"""TCP relays in front of the servers of a local cluster, whose connections can be cut, stalled and delayed."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")
_PIECE = 65536
_SLOW_PIECE = 4096


@dataclass(eq=False)
class _Front:
    """One address, the servers behind it, and what ails the way there."""

    targets: list[str] = field(default_factory=list)
    address: str = ""
    turn: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while nothing passes."""
    delay_s: float = 0.0
    ends: set[asyncio.StreamWriter] = field(default_factory=set)

    def candidates(self) -> list[str]:
        """The servers, another one first each time."""
        self.turn += 1
        start = self.turn % len(self.targets)
        return [*self.targets[start:], *self.targets[:start]]


class TcpRelay:
    """A `shelora.cli.servers.Relay`; a context manager. Its loop has a thread, its methods are for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._fronts: defaultdict[str, _Front] = defaultdict(_Front)
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def front(self, name: str) -> str:
        """Address, `host:port`, at which callers reach the servers of that name."""
        return self._run(self._listening(name))

    def lead(self, name: str, target: str) -> None:
        """Adds a server to those behind that name; connections go to them in turn."""
        self._fronts[name].targets.append(target)

    def cut(self, name: str) -> int:
        """Resets every connection. Returns how many there were."""
        return self._run(self._cut(name))

    def stall(self, name: str, seconds: float) -> None:
        """Lets nothing pass for some time; connections stay."""
        self._run(self._stall(name, seconds))

    def delay(self, name: str, seconds: float) -> None:
        """From now on every 4 KiB take that long; 0 for not."""
        self._fronts[name].delay_s = seconds

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listening(self, name: str) -> str:
        front = self._fronts[name]
        if not front.address:
            front.open.set()
            server = await asyncio.start_server(lambda r, w: self._serve(front, r, w), "127.0.0.1", 0)
            self._servers.append(server)
            front.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return front.address

    async def _serve(self, front: _Front, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        ends = [writer]
        front.ends.add(writer)
        try:
            far_reader, far_writer = await _connected(front)
            ends.append(far_writer)
            await asyncio.gather(_copy(front, reader, far_writer), _copy(front, far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # nobody listens behind it, or the drill is over
        finally:
            front.ends.discard(writer)
            for end in ends:
                end.transport.abort()

    async def _cut(self, name: str) -> int:
        ends = list(self._fronts[name].ends)
        for end in ends:
            end.transport.abort()
        return len(ends)

    async def _stall(self, name: str, seconds: float) -> None:
        front = self._fronts[name]
        front.open.clear()
        self._loop.call_later(seconds, front.open.set)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _connected(front: _Front) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first server that takes one. Raises: OSError if none does."""
    for target in front.candidates():
        host, _, port = target.rpartition(":")
        with suppress(OSError):
            return await asyncio.open_connection(host, int(port))
    raise ConnectionRefusedError


async def _copy(front: _Front, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes bytes on in one direction, to the end or until either side breaks."""
    with suppress(OSError):
        while data := await reader.read(_SLOW_PIECE if front.delay_s else _PIECE):
            await front.open.wait()
            if front.delay_s:
                await asyncio.sleep(front.delay_s)
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
