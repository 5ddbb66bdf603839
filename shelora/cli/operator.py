"""What an operator asks of a coordinator."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from shelora.transport.channel import call, open_channel
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:  # the asynchronous stub is a type only; at run time the channel decides
    from shelora.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

RETRY_S = 10.0
"""A person waits: shorter than between servers."""


class Operator:
    """The operator's calls. Each raises DomainError with the coordinator's reason."""

    def __init__(self, stub: "CoordinatorAsyncStub") -> None:
        """Takes an asynchronous stub."""
        self._stub = stub

    async def create(self, spec: pb.FederationSpec) -> pb.Federation:
        """Creates a federation, or returns it if it exists with the same specification."""
        return await call(self._stub.CreateFederation, pb.CreateFederationRequest(spec=spec), retry_s=RETRY_S)

    async def start(self, federation: str) -> pb.Federation:
        """Lets a federation begin as soon as enough agents have joined."""
        request = pb.StartFederationRequest(federation_id=federation)
        return await call(self._stub.StartFederation, request, retry_s=RETRY_S)

    async def get(self, federation: str) -> pb.Federation:
        """Reads a federation."""
        request = pb.GetFederationRequest(federation_id=federation)
        return await call(self._stub.GetFederation, request, retry_s=RETRY_S)

    async def list(self) -> list[pb.Federation]:
        """All federations by name."""
        response = await call(self._stub.ListFederations, pb.ListFederationsRequest(), retry_s=RETRY_S)
        return list(response.federations)


@asynccontextmanager
async def operator(address: str, *, allow_plaintext: bool = False) -> AsyncIterator[Operator]:
    """An operator connected to the coordinator at `host:port`."""
    async with open_channel(address, allow_plaintext=allow_plaintext) as channel:
        yield Operator(CoordinatorStub(channel))
