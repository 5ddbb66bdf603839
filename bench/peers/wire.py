"""Counts what travels between clients and servers: TCP relays on loopback, whatever is spoken."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_PIECE: Final = 65536


class Wire:
    """Relays, and the bytes that passed them. What its methods do happens in a loop with a thread of its own."""

    def __init__(self) -> None:
        self.up = 0
        """Bytes from clients, TLS included where it is spoken."""
        self.down = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def front(self, target: str) -> str:
        """The address, `host:port`, from which a new relay leads to the target's."""
        return self._run(self._listen(target))

    def close(self) -> None:
        """Ends the connections and the loop."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, target: str) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await self._relayed(target, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _relayed(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = target.rpartition(":")
        ends = [writer]
        with suppress(OSError, asyncio.CancelledError):
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
                ends.append(far_writer)
                await asyncio.gather(
                    _copy(reader, far_writer, self._sent), _copy(far_reader, writer, self._received)
                )
            finally:
                for end in ends:
                    end.transport.abort()

    def _sent(self, count: int) -> None:
        self.up += count

    def _received(self, count: int) -> None:
        self.down += count

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    """To the end of one direction, which the other one may outlive."""
    while data := await reader.read(_PIECE):
        count(len(data))
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


@contextmanager
def counted() -> Iterator[Wire]:
    """Relays until the block ends."""
    wire = Wire()
    try:
        yield wire
    finally:
        wire.close()
