"""Which certificates are revoked: all that a holder was issued up to a time, so that a later one is good again.

A holder is an identity. Clients have one each; operators share one, and so do servers of a kind, so they are revoked
together, and those that are still trusted are certified anew.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shelora.errors import DomainError, Reason
from shelora.transport.certificates import Certificate
from shelora.transport.identity import Identity, Role
from shelora.v1 import enrolment_pb2 as pb

REVOCABLE_ROLES: Final = (Role.OPERATOR, Role.COORDINATOR, Role.AGGREGATION)
"""Roles that are revoked as a whole. The key authority certifies itself."""

_REMEDIES: Final = MappingProxyType(
    {
        Role.CLIENT: "ask the operator of federation {federation} why; a token for {client} "
        "(shelora token create --federation {federation} --client {client}) enrols it anew",
        Role.OPERATOR: "enrol anew (shelora enroll), with the token that the key authority leaves at its start "
        "(--operator-token-file), or one of an operator who has (shelora token create --role operator)",
    }
)
_REMEDY_OF_SERVERS: Final = (
    "with a workload key that the key authority still has it enrols anew by itself; else enrol it (shelora enroll) "
    "with a token from: shelora token create --role {role} --name …"
)
_SECOND_MS: Final = 1000


@dataclass(frozen=True)
class Revocation:
    """Ends the certificates that a holder was issued up to a time."""

    identity: Identity
    at_ms: int
    """Unix milliseconds; no two revocations of an authority have the same."""

    @classmethod
    def from_proto(cls, message: pb.Revocation) -> "Revocation":
        """Raises: DomainError INVALID_ARGUMENT, naming the field."""
        role = Role.named(message.role or Role.CLIENT)
        return cls(Identity(role, message.federation_id, message.client_id), message.at_unix_ms)

    def to_proto(self, *, enrolled_again: bool = False) -> pb.Revocation:
        return pb.Revocation(
            federation_id=self.identity.federation_id,
            client_id=self.identity.client_id,
            at_unix_ms=self.at_ms,
            enrolled_again=enrolled_again,
            role="" if self.identity.role is Role.CLIENT else self.identity.role,
        )


class RevokedError(DomainError):
    """The certificate is revoked."""

    def __init__(self, identity: Identity) -> None:
        remedy = _REMEDIES.get(identity.role, _REMEDY_OF_SERVERS).format(
            role=identity.role, federation=identity.federation_id, client=identity.client_id
        )
        super().__init__(Reason.CERTIFICATE_REVOKED, f"the certificate of {identity} was revoked: {remedy}")


class RevocationList:
    """The revocations that are known. It only grows: nothing is ever good again but what is issued later."""

    def __init__(self) -> None:
        self._at_ms: dict[Identity, int] = {}
        self.newest_ms = 0
        """Time of the newest revocation; 0 without any."""

    def __len__(self) -> int:
        return len(self._at_ms)

    def add(self, revocations: Iterable[Revocation]) -> None:
        """Takes in revocations, in any order and again."""
        for revocation in revocations:
            known = self._at_ms.get(revocation.identity, 0)
            self._at_ms[revocation.identity] = max(known, revocation.at_ms)
            self.newest_ms = max(self.newest_ms, revocation.at_ms)

    def covers(self, certificate: Certificate) -> bool:
        """Whether a certificate is revoked."""
        return issued_ms(certificate) <= self._at_ms.get(certificate.identity, -1)

    def clients_of(self, federation_id: str) -> Mapping[str, int]:
        """Revoked clients of a federation, each with the time up to which its certificates are."""
        return {
            identity.client_id: at_ms
            for identity, at_ms in self._at_ms.items()
            if identity.federation_id == federation_id
        }


def issued_ms(certificate: Certificate) -> int:
    """When a certificate was issued, Unix milliseconds. Certificates count whole seconds."""
    return round(certificate.issued.timestamp()) * _SECOND_MS


def first_issue_after(at_ms: int) -> int:
    """The earliest time of issue, Unix milliseconds, that a revocation at `at_ms` does not cover."""
    return (at_ms // _SECOND_MS + 1) * _SECOND_MS
