"""TCP proxies that keep every byte, for searching what servers received and sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager


class Recorder:
    """Forwards connections to one server and keeps both directions, connection by connection."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.address = ""
        self._streams: list[bytearray] = []
        self._connections: set[asyncio.Task] = set()

    def recorded(self) -> bytes:
        """Everything so far; connections and directions one after the other."""
        return b"\0".join(bytes(stream) for stream in self._streams)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Recorder"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self._streams.append(stream)
        try:
            while data := await reader.read(65536):
                stream += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def recording(*targets: str) -> AsyncIterator[list[Recorder]]:
    """Proxies for the targets, while the context lasts."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Recorder(target).running()) for target in targets]
