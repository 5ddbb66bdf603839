"""The coordinator's view of the key authority: it has keys made, and sees their public identifier."""

import grpc

from shelora.transport.channel import RETRY_S, call
from shelora.transport.status import for_callers
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1.key_authority_pb2_grpc import KeyAuthorityStub


class KeyAuthorityClient:
    """Calls the key authority over a channel. `retry_s`: seconds during which a transient failure is tried again."""

    def __init__(self, channel: grpc.aio.Channel, *, retry_s: float = RETRY_S) -> None:
        self._stub = KeyAuthorityStub(channel)
        self._retry_s = retry_s

    async def open_epoch(self, federation_id: str, epoch: int, parameters: str) -> bytes:
        """The identifier of the epoch's CKKS key, 16 bytes.

        Raises: INVALID_ARGUMENT, EPOCH_RETIRED, STORE_UNAVAILABLE.
        """
        request = pb.OpenEpochRequest(federation_id=federation_id, epoch=epoch, parameters=parameters)
        with for_callers():
            return (await call(self._stub.OpenEpoch, request, retry_s=self._retry_s)).key_id

    async def retire_epochs(self, federation_id: str, before: int) -> None:
        """Destroys the keys of the epochs before one. Raises STORE_UNAVAILABLE."""
        request = pb.RetireEpochsRequest(federation_id=federation_id, before_epoch=before)
        with for_callers():
            await call(self._stub.RetireEpochs, request, retry_s=self._retry_s)
