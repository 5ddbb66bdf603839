"""The aggregation replicas: any of them serves any call, so a failing one is left for the next."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias, TypeVar

import grpc
import structlog

from shelora.transport.channel import OpenChannel, is_transient, open_channel, retrying
from shelora.transport.status import error_from_rpc
from shelora.transport.tls import Credentials
from shelora.v1 import aggregation_pb2_grpc as pb_grpc

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

AggregationStub: TypeAlias = "pb_grpc.AggregationAsyncStub"

STALL_S: Final = 60.0
"""Seconds a transfer may take beside its bytes."""
SLOWEST_BYTES_S: Final = 8_000
"""Bytes a second below which a transfer is given up: the next attempt resumes it, perhaps at another replica."""


class Replicas:
    """Channels to all replicas, one of them current.

    Args:
        addresses: Of the replicas.
        credentials: The client's identity; None only in tests.
        connect: Opens the connections.
        first: Any number that differs between clients, so that not all of them begin with the same replica.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: Credentials | None,
        connect: OpenChannel = open_channel,
        first: int = 0,
    ) -> None:
        self._addresses = tuple(addresses)
        self._channels = [connect(address, credentials) for address in addresses]
        self._current = first % len(self._channels)

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close()

    async def attempt(self, operation: Callable[[AggregationStub], Awaitable[_T]]) -> _T:
        """Runs an operation that may be repeated; after a failure that may pass, again with the next replica.

        Raises: DomainError with the server's reason, or STORE_UNAVAILABLE if no replica could be reached.
        """
        try:
            async for attempt in retrying():
                with attempt:
                    return await self._once(operation)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._addresses[self._current]) from error
        raise AssertionError("retrying ends with a result or an error")

    async def _once(self, operation: Callable[[AggregationStub], Awaitable[_T]]) -> _T:
        try:
            return await operation(pb_grpc.AggregationStub(self._channels[self._current]))
        except grpc.aio.AioRpcError as error:
            if is_transient(error):
                _log.info("replica_failed", address=self._addresses[self._current], code=error.code().name)
                self._current = (self._current + 1) % len(self._channels)
            raise


def transfer_timeout_s(size_bytes: int) -> float:
    """Seconds after which a transfer of that size is given up."""
    return STALL_S + size_bytes / SLOWEST_BYTES_S
