"""Addresses, and where plaintext may go: nowhere but this machine."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Final

from pydantic import AfterValidator

from shelora.errors import DomainError, Reason

_LOCAL_SCHEMES = ("unix:", "unix-abstract:")
_PORT: Final = re.compile("[0-9]{1,5}")
_LAST_PORT: Final = 65535
_NUMBERS: Final = re.compile(r"[0-9.]+")
_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True)
class HostPort:
    """A TCP address. `str()` is the form gRPC takes."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, address: str, *, listening: bool = False) -> "HostPort":
        """Reads `host:port` or `[ipv6]:port`.

        Args:
            address: What someone wrote.
            listening: It is one to serve on: port 0 is allowed, and picks a free one.

        Raises: DomainError CONFIGURATION_INVALID if it is anything else, with the remedy.
        """
        problem = _malformed(address)
        host, _, port = address.rpartition(":")
        if problem is None and not _PORT.fullmatch(port):
            problem = (
                "add the port, as in host:7101"
                if not host or ":" not in address
                else "the port is 1 to 65535"
            )
        if problem is None and not (0 if listening else 1) <= int(port) <= _LAST_PORT:
            problem = "the port is 1 to 65535, or 0 for a free one" if listening else "the port is 1 to 65535"
        if problem is None:
            problem = _no_host(host)
        if problem is not None:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"address {address!r} is not host:port: {problem}"
            )
        return cls(host.removeprefix("[").removesuffix("]"), int(port))


def _malformed(address: str) -> str | None:
    """What is wrong with an address as a whole."""
    wrong = {
        f"leave out {address.partition('://')[0]}://": "://" in address,
        "remove the blanks": any(map(str.isspace, address)),
        "remove user and password": "@" in address,
        "remove what follows the port": any(character in address for character in "/?#"),
        "write one address": "," in address,
        "put an IPv6 address in brackets, as in [::1]:7101": address.count(":") > 1 and address[0] != "[",
    }
    return next((remedy for remedy, found in wrong.items() if found), None)


def _no_host(host: str) -> str | None:
    """What is wrong with a host, brackets included."""
    if not host:
        return "write the host before the port"
    if host.startswith("["):
        return (
            None
            if host.endswith("]") and _is_address(host[1:-1], 6)
            else "in brackets belongs an IPv6 address"
        )
    if not host.isascii():
        return "write the host in ASCII (xn--...)"
    if _NUMBERS.fullmatch(host):
        return None if _is_address(host, 4) else f"{host} is no IPv4 address"
    return None if _HOST.fullmatch(host) else f"{host!r} is not a host name"


def _is_address(text: str, version: int) -> bool:
    try:
        return ip_address(text).version == version
    except ValueError:
        return False


def _called(address: str) -> str:
    try:
        return str(HostPort.parse(address))
    except DomainError as error:
        raise ValueError(error.message) from error


def _served(address: str) -> str:
    try:
        return str(HostPort.parse(address, listening=True))
    except DomainError as error:
        raise ValueError(error.message) from error


Address = Annotated[str, AfterValidator(_called)]
"""Field of a configuration: whom to call, `host:port`."""


def _probed(address: str) -> str:
    return address if address.startswith("unix:/") else _served(address)


ProbeAddress = Annotated[str, AfterValidator(_probed)]
"""Field of a configuration: where to answer health checks, `host:port` or `unix:/path`."""

ListenAddress = Annotated[str, AfterValidator(_served)]
"""Field of a configuration: where to serve, `host:port`; port 0 picks a free one."""


def is_local(address: str) -> bool:
    """Whether traffic to `address` stays on this machine: loopback or a Unix socket.

    A host name other than localhost is not local, whatever it resolves to now.

    Raises: DomainError CONFIGURATION_INVALID if the address has no known form.
    """
    if address.startswith(_LOCAL_SCHEMES):
        return True
    host = HostPort.parse(address, listening=True).host
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_plaintext(address: str) -> None:
    """Refuses plaintext beyond this machine. Only tests use any: every process of the system speaks TLS.

    Raises: DomainError CONFIGURATION_INVALID.
    """
    if not is_local(address):
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            f"plaintext at {address} would expose secrets and updates to the network: give an identity",
        )
