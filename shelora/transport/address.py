"""Addresses, and where plaintext may go: nowhere but this machine."""

from dataclasses import dataclass
from ipaddress import ip_address

from shelora.errors import DomainError, Reason

_LOCAL_SCHEMES = ("unix:", "unix-abstract:")


@dataclass(frozen=True)
class HostPort:
    """A TCP address. `str()` is the form gRPC takes."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, address: str) -> "HostPort":
        """Reads `host:port` or `[ipv6]:port`.

        Raises: DomainError CONFIGURATION_INVALID if it is neither, or the port is not in 0 to 65535.
        """
        host, _, port = address.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or not port.isascii() or not port.isdecimal() or int(port) > 65535:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"address {address!r} is not of the form host:port"
            )
        return cls(bare, int(port))


def is_local(address: str) -> bool:
    """Whether traffic to `address` stays on this machine: loopback or a Unix socket.

    A host name other than localhost is not local, whatever it resolves to now.

    Raises: DomainError CONFIGURATION_INVALID if the address has no known form.
    """
    if address.startswith(_LOCAL_SCHEMES):
        return True
    host = HostPort.parse(address).host
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
