"""An agent's transfers: with one aggregation replica until it fails, then with the next."""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import structlog

from shelora.transport import replicas
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
REFRESH_S: Final = 30.0
"""Seconds between two looks for other replicas, while there is something to transfer."""


class Replicas:
    """The replicas, one of them current.

    Args:
        addresses: Where to begin.
        credentials: The client's identity; None only in tests.
        connect: Opens the connections.
        shuffle: Brings replicas into this client's order, so that not all clients begin with the same one.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: Credentials | None,
        connect: OpenChannel = open_channel,
        shuffle: Callable[[list[Any]], None] = random.shuffle,
    ) -> None:
        self._known = replicas.Replicas(
            addresses,
            lambda address: connect(address, credentials),
            refresh_s=REFRESH_S,
            shuffle=shuffle,
        )
        self._last = ""
        """Address of the replica called last."""

    async def close(self) -> None:
        """Closes the connections."""
        await self._known.close()

    async def attempt(self, operation: Callable[[AggregationStub], Awaitable[_T]]) -> _T:
        """Runs an operation that may be repeated; after a failure that may pass, again with the next replica.

        Raises: DomainError with the server's reason, or STORE_UNAVAILABLE if no replica could be reached.
        """
        try:
            async for attempt in retrying():
                with attempt:
                    return await self._once(operation)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._last) from error
        raise AssertionError("retrying ends with a result or an error")

    async def _once(self, operation: Callable[[AggregationStub], Awaitable[_T]]) -> _T:
        replica = self._known.current()
        self._last = replica.address
        try:
            return await operation(replica.stub)
        except grpc.aio.AioRpcError as error:
            if is_transient(error):
                _log.info("replica_failed", address=replica.address, code=error.code().name)
                self._known.failed(replica)
            raise


def transfer_timeout_s(size_bytes: int) -> float:
    """Seconds after which a transfer of that size is given up."""
    return STALL_S + size_bytes / SLOWEST_BYTES_S
