"""Regression: a server crashed when clients left streams, as it asked a freed call for its peer."""

import asyncio
import random
from contextlib import aclosing, suppress

import grpc

from services.common.server import running_server
from shelora.transport.channel import open_channel
from shelora.transport.status import translated
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc

CROWDS, CLIENTS = 25, 20


class Crier(pb_grpc.CoordinatorServicer):
    """Watch never stops by itself."""

    async def Watch(self, request, context):
        async with translated(context), aclosing(self._assignments()) as assignments:
            async for assignment in assignments:
                yield assignment

    async def _assignments(self):
        while True:
            yield pb.Assignment(assignment_id="work")
            await asyncio.sleep(0.01)


async def _leave_in_the_middle(address: str, rng: random.Random) -> None:
    async with open_channel(address) as channel:
        call = pb_grpc.CoordinatorStub(channel).Watch(pb.WatchRequest())
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            for _ in range(rng.randrange(5)):
                await call.read()
        if rng.random() < 0.5:
            call.cancel()


async def test_a_server_survives_clients_that_leave_their_streams():
    rng = random.Random(0)
    service = "shelora.v1.Coordinator"

    def register(server):
        pb_grpc.add_CoordinatorServicer_to_server(Crier(), server)

    async with running_server([service], register) as address:
        for _ in range(CROWDS):
            await asyncio.gather(*(_leave_in_the_middle(address, rng) for _ in range(CLIENTS)))
        async with open_channel(address) as channel:
            call = pb_grpc.CoordinatorStub(channel).Watch(pb.WatchRequest())
            assert (await call.read()).assignment_id == "work"
