"""Bytes of committees' messages as they travel, counted between a client and the real servicer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import grpc

from coordinator.servicer import CoordinatorServicer
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc
from tests.unit.committee.rounds import World, context_of

WORLD = World(context_of(40))
KEYS = [member.key for member in WORLD.members.values()]
OPENING = pb.GetOpeningResponse(context=WORLD.context.to_proto())
OPENING.opening.answers.extend(KEYS)


class Committees:
    """Answers with what there is."""

    async def keys(self, *_: str) -> list:
        return KEYS

    async def opening(self, *_: str, has_keys: bool) -> pb.GetOpeningResponse:
        return pb.GetOpeningResponse() if has_keys else OPENING


class Counted:
    """Bytes that came from the server."""

    total = 0

    async def relay(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError):
            await asyncio.gather(
                self._pipe(reader, server_writer), self._pipe(server_reader, writer, counted=True)
            )

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool = False
    ) -> None:
        while data := await reader.read(65536):
            self.total += len(data) * counted
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[coordinator_pb2_grpc.CoordinatorStub, Counted]]:
    handlers = SimpleNamespace(lookup=SimpleNamespace(store=None), committees=Committees())
    server, counted = grpc.aio.server(), Counted()
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorServicer(handlers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    relay = await asyncio.start_server(lambda r, w: counted.relay(port, r, w), "127.0.0.1", 0)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{relay.sockets[0].getsockname()[1]}")
    try:
        yield coordinator_pb2_grpc.CoordinatorStub(channel), counted
    finally:
        await channel.close()
        await server.stop(None)
        relay.close()


async def test_keys_and_whole_openings_are_compressed_on_their_way():
    """grpc.aio takes `set_compression` and compresses no unary response, unless metadata goes first."""
    scope = {"federation_id": "clinic", "round_id": "clinic.0.1", "client_id": "ward-001"}
    async with connected() as (stub, counted):
        await stub.GetOpening(pb.GetOpeningRequest(federation_id="clinic", has_keys=True))
        before = counted.total
        keys = await stub.GetCommitteeKeys(pb.GetCommitteeKeysRequest(**scope))
        between = counted.total
        opening = await stub.GetOpening(pb.GetOpeningRequest(federation_id="clinic"))
        after = counted.total
    assert list(keys.keys) == KEYS
    assert opening == OPENING
    assert between - before < 0.7 * keys.ByteSize()
    assert after - between < 0.7 * opening.ByteSize()
