"""The gRPC face of the key authority: parses, calls, renders."""

from typing import Any, Final

import grpc

from services.key_authority.authority import Authority
from services.key_authority.epochs import EpochId
from shelora.transport.status import translated
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc

SERVICE_NAME: Final = "shelora.v1.KeyAuthority"

_Context = grpc.aio.ServicerContext[Any, Any]


class KeyAuthorityServicer(pb_grpc.KeyAuthorityServicer):
    """Serves shelora.v1.KeyAuthority; key_authority.proto says what each call does."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def OpenEpoch(self, request: pb.OpenEpochRequest, context: _Context) -> pb.OpenEpochResponse:
        async with translated(context):
            epoch_id = EpochId(request.federation_id, request.epoch)
            return pb.OpenEpochResponse(key_id=await self._authority.open_epoch(epoch_id, request.parameters))

    async def GetEpochSecrets(
        self, request: pb.GetEpochSecretsRequest, context: _Context
    ) -> pb.GetEpochSecretsResponse:
        async with translated(context):
            epoch_id = EpochId(request.federation_id, request.epoch)
            secrets = await self._authority.release(epoch_id, request.client_id, _authorization(context))
            return pb.GetEpochSecretsResponse(
                parameters=secrets.parameters,
                ckks_secret_key=secrets.ckks_secret_key,
                obfuscation_secret=secrets.obfuscation_secret,
                key_id=secrets.key_id,
            )


def _authorization(context: _Context) -> str | bytes | None:
    """The first `authorization` metadata of the call, None if there is none."""
    metadata = context.invocation_metadata() or ()
    return next((value for key, value in metadata if key == "authorization"), None)


def register(authority: Authority, server: grpc.aio.Server) -> None:
    """Adds the key authority to a server that has not started."""
    pb_grpc.add_KeyAuthorityServicer_to_server(KeyAuthorityServicer(authority), server)
