"""Who a certificate says its holder is: a role and, for clients, a federation and a name, in one URI."""

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Final

from shelora.errors import DomainError, Reason

_FEDERATION: Final = re.compile(r"[a-z0-9-]{1,64}")
_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DNS_NAME: Final = re.compile(r"(?!.{254})[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*")
_CLIENT_URI: Final = re.compile(r"shelora://federation/([^/]+)/client/([^/]+)")

MAX_NAMES: Final = 32
"""Most names of a server."""


class Role(StrEnum):
    """What the holder of a certificate is."""

    OPERATOR = "operator"
    COORDINATOR = "coordinator"
    AGGREGATION = "aggregation"
    KEY_AUTHORITY = "key-authority"
    CLIENT = "client"

    @classmethod
    def named(cls, name: str) -> "Role":
        """The role of that name. Raises: DomainError INVALID_ARGUMENT."""
        if name not in set(cls):
            raise _invalid(f"role must be one of {', '.join(cls)}")
        return cls(name)


SERVERS: Final = frozenset({Role.COORDINATOR, Role.AGGREGATION, Role.KEY_AUTHORITY})
"""Roles that are called, and so have names and addresses."""


@dataclass(frozen=True)
class Identity:
    """A role; of clients also the federation they belong to and their name in it.

    Raises: DomainError INVALID_ARGUMENT, naming the field.
    """

    role: Role

    federation_id: str = ""
    """1 to 64 characters of [a-z0-9-] for clients, else empty."""

    client_id: str = ""
    """1 to 64 characters of [A-Za-z0-9._-] for clients, else empty."""

    def __post_init__(self) -> None:
        if self.role is not Role.CLIENT:
            if self.federation_id or self.client_id:
                raise _invalid(f"the role {self.role} has neither federation_id nor client_id")
            return
        if not _FEDERATION.fullmatch(self.federation_id):
            raise _invalid("federation_id must be 1 to 64 characters of [a-z0-9-]")
        if not _CLIENT.fullmatch(self.client_id):
            raise _invalid("client_id must be 1 to 64 characters of [A-Za-z0-9._-]")

    def __str__(self) -> str:
        if self.role is Role.CLIENT:
            return f"client {self.client_id} of federation {self.federation_id}"
        return f"the {self.role}"

    @property
    def uri(self) -> str:
        """The form in a certificate."""
        if self.role is Role.CLIENT:
            return f"shelora://federation/{self.federation_id}/client/{self.client_id}"
        return f"shelora://{self.role}"

    @classmethod
    def from_uri(cls, uri: str) -> "Identity":
        """Reads what `uri` wrote; raises INVALID_ARGUMENT for anything else."""
        if match := _CLIENT_URI.fullmatch(uri):
            return cls(Role.CLIENT, *match.groups())
        for role in Role:
            if role is not Role.CLIENT and uri == f"shelora://{role}":
                return cls(role)
        raise _invalid("the certificate names no role of this system")


def checked_names(role: Role, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names and addresses for a certificate of that role, in their canonical spelling.

    Raises: DomainError INVALID_ARGUMENT for a malformed name, a server without any, or names of something else.
    """
    if role not in SERVERS:
        if names:
            raise _invalid(f"the role {role} is never called, so it has no names")
        return ()
    if not 1 <= len(names) <= MAX_NAMES:
        raise _invalid(f"names must be 1 to {MAX_NAMES} DNS names or addresses the server is reached at")
    return tuple(dict.fromkeys(_canonical(name) for name in names))


def _canonical(name: str) -> str:
    try:
        return str(ip_address(name))
    except ValueError:
        lowered = name.lower()
        if not _DNS_NAME.fullmatch(lowered):
            raise _invalid(f"names: {name[:80]!r} is neither a DNS name nor an IP address") from None
        return lowered


def _invalid(message: str) -> DomainError:
    return DomainError(Reason.INVALID_ARGUMENT, message)
