"""What an operator asks of a coordinator and of the key authority."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec, ProtectionSpec
from shelora.levels import Level
from shelora.text import printable
from shelora.transport.certificates import utc_now
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import renew, renewal_at
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import Credentials, IdentityFolder, TlsCredentials
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import enrolment_pb2
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub
from shelora.v1.enrolment_pb2_grpc import EnrolmentStub

if TYPE_CHECKING:  # the asynchronous stub is a type only; at run time the channel decides
    from shelora.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

DELETE_S: Final = 60.0
"""Seconds to wait for a deletion; a coordinator looks at ended federations twice a minute."""
POLL_S: Final = 0.3
REREAD_ROUNDS: Final = 3
"""Newest rounds of a history that was read before which are read again: agents evaluate a result as the next round
begins, and one that cannot be opened is taken back after at most two."""
RETRY_S: Final = 10.0
"""A person waits: shorter than between servers."""


_Message = TypeVar("_Message", bound=Message)


def shown(message: _Message) -> _Message:
    """A message from a server, in place, its texts as a terminal may show them: members have chosen some of them."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING and field.is_repeated:
            value[:] = [printable(text) for text in value]
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, printable(value))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                shown(part)
    return message


class Operator:
    """The operator's calls. Each raises DomainError with the coordinator's reason; texts in answers are printable."""

    def __init__(self, stub: "CoordinatorAsyncStub") -> None:
        """Takes an asynchronous stub."""
        self._stub = stub

    async def create(self, spec: pb.FederationSpec) -> pb.Federation:
        """Creates a federation, or returns it if it exists with the same specification."""
        request = pb.CreateFederationRequest(spec=spec)
        return shown(await call(self._stub.CreateFederation, request, retry_s=RETRY_S))

    async def start(self, federation: str) -> pb.Federation:
        """Lets a federation begin as soon as enough agents have joined."""
        request = pb.StartFederationRequest(federation_id=federation)
        return shown(await call(self._stub.StartFederation, request, retry_s=RETRY_S))

    async def rotate(self, federation: str) -> pb.Federation:
        """Has a federation change to new keys after the round in progress."""
        present = await self.get(federation)
        request = pb.RotateKeysRequest(federation_id=federation, from_epoch=present.epoch)
        return shown(await call(self._stub.RotateKeys, request, retry_s=RETRY_S))

    async def stop(self, federation: str) -> pb.Federation:
        """Ends a federation with its newest result."""
        request = pb.StopFederationRequest(federation_id=federation)
        return shown(await call(self._stub.StopFederation, request, retry_s=RETRY_S))

    async def extend(self, federation: str, rounds: int) -> pb.Federation:
        """Adds training rounds to those that a federation has now."""
        present = await self.get(federation)
        total = present.spec.round.rounds + rounds
        request = pb.ExtendFederationRequest(federation_id=federation, rounds=total)
        return shown(await call(self._stub.ExtendFederation, request, retry_s=RETRY_S))

    async def delete(self, federation: str) -> None:
        """Has everything of a federation deleted; returns when all is gone.

        Raises: FEDERATION_UNKNOWN; STORE_UNAVAILABLE if it takes longer than a person waits: it goes on by itself.
        """
        request = pb.DeleteFederationRequest(federation_id=federation)
        await call(self._stub.DeleteFederation, request, retry_s=RETRY_S)
        look = pb.GetFederationRequest(federation_id=federation, view=pb.FEDERATION_VIEW_SPECIFICATION)
        try:
            async with asyncio.timeout(DELETE_S):
                while True:
                    await call(self._stub.GetFederation, look, retry_s=RETRY_S)
                    await asyncio.sleep(POLL_S)
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_UNKNOWN:
                raise
        except TimeoutError:
            why = (
                f"federation {federation} is still being deleted; it goes on by itself: see `shelora status`"
            )
            raise DomainError(Reason.STORE_UNAVAILABLE, why) from None

    async def get(self, federation: str, known: Sequence[pb.RoundSummary] = ()) -> pb.Federation:
        """Reads a federation, its history page by page.

        Args:
            federation: Its name.
            known: History read before. All but its newest rounds, whose reports may still come, is not read again.
        """
        kept = known[:-REREAD_ROUNDS]
        request = pb.GetFederationRequest(
            federation_id=federation, history_after=kept[-1].sequence if kept else 0
        )
        found = page = await call(self._stub.GetFederation, request, retry_s=RETRY_S)
        while page.more_history:
            request.view = pb.FEDERATION_VIEW_HISTORY
            request.history_after = page.history[-1].sequence
            page = await call(self._stub.GetFederation, request, retry_s=RETRY_S)
            found.history.extend(page.history)
        found.more_history = False
        if not kept:
            return shown(found)
        if [r.round_id for r in found.history[:REREAD_ROUNDS]] != [r.round_id for r in known[len(kept) :]]:
            return await self.get(federation)  # another federation has the name now
        read = list(found.history)
        del found.history[:]
        found.history.extend([*kept, *read])
        return shown(found)

    async def list(self) -> list[pb.Federation]:
        """All federations by name."""
        response = await call(self._stub.ListFederations, pb.ListFederationsRequest(), retry_s=RETRY_S)
        return list(shown(response).federations)


@asynccontextmanager
async def operator(address: str, credentials: Credentials) -> AsyncIterator[Operator]:
    """An operator connected to the coordinator at `host:port`."""
    async with open_channel(address, credentials) as channel:
        yield Operator(CoordinatorStub(channel))


async def promised_level(coordinator: str, credentials: Credentials, federation: str) -> Level:
    """What to promise a client of a federation: the level it has; that of a new one by default if there is none yet.

    Raises: DomainError INVALID_ARGUMENT for an unprotected federation, which must be promised in so many words;
    what `call` raises.
    """
    try:
        async with operator(coordinator, credentials) as connection:
            level = FederationSpec.from_proto((await connection.get(federation)).spec).protection.level
    except DomainError as error:
        if error.reason is not Reason.FEDERATION_UNKNOWN:
            raise
        return ProtectionSpec().level
    if level is Level.NONE:
        why = f"the coordinator says that {federation} protects nothing: give --promise none if that is meant"
        raise DomainError(Reason.INVALID_ARGUMENT, why)
    return level


async def create_token(
    key_authority: str,
    credentials: Credentials,
    role: Role,
    *,
    federation: str = "",
    client: str = "",
    names: tuple[str, ...] = (),
    expires_in: timedelta = timedelta(),
    promise: Level | None = None,
) -> enrolment_pb2.CreateTokenResponse:
    """A join token of the key authority at `host:port`; enrolment.proto explains the fields.

    Raises: DomainError INVALID_ARGUMENT, naming the field, and what `call` raises.
    """
    request = enrolment_pb2.CreateTokenRequest(
        role=role,
        federation_id=federation,
        client_id=client,
        names=names,
        expires_in_s=int(expires_in.total_seconds()),
        promise=promise,
    )
    async with open_channel(key_authority, credentials) as channel:
        return await call(EnrolmentStub(channel).CreateToken, request, retry_s=RETRY_S)


async def revoke_holder(
    key_authority: str, credentials: Credentials, holder: Identity
) -> enrolment_pb2.Revocation:
    """Revokes the certificates of a client, or of everyone of a role.

    Raises: DomainError CLIENT_UNKNOWN, INVALID_ARGUMENT if the role cannot be revoked, and what `call` raises.
    """
    federation, client = holder.federation_id, holder.client_id
    async with open_channel(key_authority, credentials) as channel:
        stub = EnrolmentStub(channel)
        if holder.role is Role.CLIENT:
            request = enrolment_pb2.RevokeClientRequest(federation_id=federation, client_id=client)
            return (await call(stub.RevokeClient, request, retry_s=RETRY_S)).revocation
        whole = enrolment_pb2.RevokeRoleRequest(role=holder.role)
        return (await call(stub.RevokeRole, whole, retry_s=RETRY_S)).revocation


async def list_revocations(key_authority: str, credentials: Credentials) -> list[enrolment_pb2.Revocation]:
    """All revocations, the oldest first."""
    revocations: list[enrolment_pb2.Revocation] = []
    async with open_channel(key_authority, credentials) as channel:
        stub = EnrolmentStub(channel)
        while True:
            after = revocations[-1].at_unix_ms if revocations else 0
            request = enrolment_pb2.ListRevocationsRequest(after_unix_ms=after)
            found = shown(await call(stub.ListRevocations, request, retry_s=RETRY_S)).revocations
            if not found:
                return revocations
            revocations += found


async def own_credentials(identity: Path, key_authority: str | None) -> TlsCredentials:
    """The operator's credentials, renewed first if it is time and the key authority is known.

    Raises: DomainError CONFIGURATION_INVALID if there is no valid identity in the folder.
    """
    folder = IdentityFolder(identity)
    credentials = TlsCredentials(folder)
    if key_authority and credentials.held.facts.renewal_due <= utc_now():
        await renew(folder, renewal_at(key_authority, credentials))
    return credentials
