"""TCP proxies that keep every byte, for searching what servers received and sent."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Recorder:
    """Forwards connections to one server and keeps both directions, connection by connection."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.address = ""
        self._streams: list[bytearray] = []

    def recorded(self) -> bytes:
        """Everything so far; connections and directions one after the other."""
        return b"\0".join(bytes(stream) for stream in self._streams)

    async def start(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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


@contextmanager
def recording(*targets: str) -> Iterator[list[Recorder]]:
    """Proxies for the targets, run by a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    recorders = [Recorder(target) for target in targets]
    try:
        for recorder in recorders:
            asyncio.run_coroutine_threadsafe(recorder.start(), loop).result(10)
        yield recorders
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
