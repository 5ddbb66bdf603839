"""The gRPC face of the key authority: parses, calls, renders."""

from typing import Any, Final

import grpc

from services.common.guard import certificate_of
from services.key_authority.authority import Authority
from services.key_authority.enrolment import Enrolments
from services.key_authority.epochs import EpochId
from services.key_authority.register import Grant
from services.key_authority.revoking import Revoker
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import REVOCABLE_ROLES
from shelora.transport.status import translated
from shelora.v1 import enrolment_pb2, enrolment_pb2_grpc
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc

SERVICE_NAMES: Final = ("shelora.v1.KeyAuthority", "shelora.v1.Enrolment")

_Context = grpc.aio.ServicerContext[Any, Any]


class KeyAuthorityServicer(pb_grpc.KeyAuthorityServicer):
    """Serves shelora.v1.KeyAuthority; key_authority.proto says what each call does."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def OpenEpoch(self, request: pb.OpenEpochRequest, context: _Context) -> pb.OpenEpochResponse:
        async with translated(context):
            epoch_id = EpochId(request.federation_id, request.epoch)
            return pb.OpenEpochResponse(key_id=await self._authority.open_epoch(epoch_id, request.parameters))

    async def RetireEpochs(
        self, request: pb.RetireEpochsRequest, context: _Context
    ) -> pb.RetireEpochsResponse:
        async with translated(context):
            await self._authority.retire(EpochId(request.federation_id, request.before_epoch))
            return pb.RetireEpochsResponse()

    async def GetEpochSecrets(
        self, request: pb.GetEpochSecretsRequest, context: _Context
    ) -> pb.GetEpochSecretsResponse:
        async with translated(context):
            epoch_id = EpochId(request.federation_id, request.epoch)
            secrets = await self._authority.release(epoch_id, request.client_id, certificate_of(context))
            return pb.GetEpochSecretsResponse(
                parameters=secrets.parameters,
                ckks_secret_key=secrets.ckks_secret_key,
                obfuscation_secret=secrets.obfuscation_secret,
                key_id=secrets.key_id,
            )


class EnrolmentServicer(enrolment_pb2_grpc.EnrolmentServicer):
    """Serves shelora.v1.Enrolment; enrolment.proto says what each call does."""

    def __init__(self, enrolments: Enrolments, revoker: Revoker) -> None:
        self._enrolments = enrolments
        self._revoker = revoker

    async def CreateToken(
        self, request: enrolment_pb2.CreateTokenRequest, context: _Context
    ) -> enrolment_pb2.CreateTokenResponse:
        async with translated(context):
            token, expires_ms = await self._enrolments.create_token(_grant(request), request.expires_in_s)
            return enrolment_pb2.CreateTokenResponse(token=token.encoded, expires_unix_ms=expires_ms)

    async def Enroll(
        self, request: enrolment_pb2.EnrollRequest, context: _Context
    ) -> enrolment_pb2.EnrollResponse:
        async with translated(context):
            certificate = await self._enrolments.enroll(
                request.token, request.signing_request, request.client_id
            )
            return enrolment_pb2.EnrollResponse(certificate=certificate, authority=self._enrolments.authority)

    async def EnrollServer(
        self, request: enrolment_pb2.EnrollServerRequest, context: _Context
    ) -> enrolment_pb2.EnrollServerResponse:
        async with translated(context):
            certificate, proof = await self._enrolments.enroll_server(request.signing_request, request.proof)
            return enrolment_pb2.EnrollServerResponse(certificate=certificate, proof=proof)

    async def Renew(
        self, request: enrolment_pb2.RenewRequest, context: _Context
    ) -> enrolment_pb2.RenewResponse:
        async with translated(context):
            holder = certificate_of(context)
            if holder is None:
                raise DomainError(Reason.UNAUTHENTICATED, "renewal needs a client certificate")
            certificate = await self._enrolments.renew(request.signing_request, holder)
            return enrolment_pb2.RenewResponse(certificate=certificate)

    async def RevokeClient(
        self, request: enrolment_pb2.RevokeClientRequest, context: _Context
    ) -> enrolment_pb2.RevokeClientResponse:
        async with translated(context):
            holder = Identity(Role.CLIENT, request.federation_id, request.client_id)
            revocation = await self._revoker.revoke(holder)
            return enrolment_pb2.RevokeClientResponse(revocation=revocation.to_proto())

    async def RevokeRole(
        self, request: enrolment_pb2.RevokeRoleRequest, context: _Context
    ) -> enrolment_pb2.RevokeRoleResponse:
        async with translated(context):
            if request.role not in REVOCABLE_ROLES:
                raise DomainError(
                    Reason.INVALID_ARGUMENT, f"role must be one of {', '.join(REVOCABLE_ROLES)}"
                )
            revocation = await self._revoker.revoke(Identity(Role(request.role)))
            return enrolment_pb2.RevokeRoleResponse(revocation=revocation.to_proto())

    async def ListRevocations(
        self, request: enrolment_pb2.ListRevocationsRequest, context: _Context
    ) -> enrolment_pb2.ListRevocationsResponse:
        async with translated(context):
            found = await self._revoker.listed(request.after_unix_ms)
            return enrolment_pb2.ListRevocationsResponse(
                revocations=[
                    entry.revocation.to_proto(enrolled_again=entry.enrolled_again) for entry in found
                ]
            )


def _grant(request: enrolment_pb2.CreateTokenRequest) -> Grant:
    return Grant(
        role=Role.named(request.role),
        federation_id=request.federation_id,
        client_id=request.client_id,
        names=tuple(request.names),
        promise=_promise(request.promise) if request.HasField("promise") else None,
    )


def _promise(name: str) -> Level:
    if name not in set(Level):
        raise DomainError(Reason.INVALID_ARGUMENT, f"promise must be one of {', '.join(Level)}")
    return Level(name)


def register(authority: Authority, enrolments: Enrolments, revoker: Revoker, server: grpc.aio.Server) -> None:
    """Adds the key authority's services to a server that has not started."""
    pb_grpc.add_KeyAuthorityServicer_to_server(KeyAuthorityServicer(authority), server)
    register_enrolment(enrolments, revoker, server)


def register_enrolment(enrolments: Enrolments, revoker: Revoker, server: grpc.aio.Server) -> None:
    """Adds enrolment alone, of which a stranger may call what the guard admits."""
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(EnrolmentServicer(enrolments, revoker), server)
