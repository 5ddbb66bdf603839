"""TCP proxies that keep every byte, for searching what servers received and sent."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from shelora.transport.tls import IDENTITY_FILE, IdentityFolder

Calling = Callable[[dict], ssl.SSLContext]
"""The client side of TLS, by the certificate that the caller showed."""


class Recorder:
    """Forwards connections to one server and keeps both directions, connection by connection."""

    def __init__(
        self, target: str, accepting: ssl.SSLContext | None = None, calling: Calling | None = None
    ) -> None:
        """With `accepting` and `calling` it ends TLS on both sides and keeps what was inside."""
        self._accepting = accepting
        self._calling = calling
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
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._accepting)
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
            secured = self._calling(writer.get_extra_info("peercert")) if self._calling else None
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port, ssl=secured)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        except asyncio.CancelledError:
            pass  # the end of the recording, which is no error of this connection
        finally:
            for end in (writer, far_writer):
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self._streams.append(stream)
        try:
            while data := await reader.read(65536):
                stream += data
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()


def inside_tls(
    target: str,
    server: Path,
    clients: Sequence[Path],
    at_most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
) -> Recorder:
    """A recorder of what is said inside TLS: only the keys of the server and of all its clients make it possible.

    It shows callers the server's certificate, and the server the certificate of the very client that called,
    over TLS of at most the given version.
    """
    contexts = {
        _uri(IdentityFolder(folder).read().facts.identity.uri): _calling(folder, at_most)
        for folder in clients
    }
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / IDENTITY_FILE)
    accepting.load_verify_locations(server / IDENTITY_FILE)
    accepting.verify_mode = ssl.CERT_REQUIRED
    accepting.set_alpn_protocols(["h2"])

    def calling(shown: dict) -> ssl.SSLContext:
        return contexts[next(name for name in shown["subjectAltName"] if name[0] == "URI")]

    return Recorder(target, accepting, calling)


def _uri(value: str) -> tuple[str, str]:
    return ("URI", value)


def _calling(client: Path, at_most: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = at_most
    context.load_cert_chain(client / IDENTITY_FILE)
    context.load_verify_locations(client / IDENTITY_FILE)
    context.set_alpn_protocols(["h2"])
    return context


@asynccontextmanager
async def recording(*recorders: Recorder) -> AsyncIterator[list[Recorder]]:
    """Proxies for the targets, while the context lasts."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(recorder.running()) for recorder in recorders]
