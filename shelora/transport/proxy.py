"""Which way connections leave this machine: directly, or through an HTTP proxy by `CONNECT`. One rule for all of them.

The proxy is the first that is set of `grpc_proxy`, `https_proxy`, `HTTPS_PROXY`, `http_proxy`. Directly reached are
this machine, and hosts that end in an entry of `no_grpc_proxy`, `no_proxy` or `NO_PROXY`, lie in one that is a network
such as 10.0.0.0/8, or any host if an entry is `*`.

gRPC has a rule of its own, which knows fewer variables; it gets what this one decides (`channel_options`), and what
gRPC's would exempt, this one exempts as well.
"""

import base64
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from shelora.errors import DomainError, Reason
from shelora.transport.address import HostPort, is_local

VARIABLES: Final = ("grpc_proxy", "https_proxy", "HTTPS_PROXY", "http_proxy")
EXEMPTIONS: Final = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
_LARGEST_ANSWER: Final = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """An HTTP proxy. `str()` names it and the variable it came from, never its password."""

    address: HostPort
    variable: str
    user: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.address} (from {self.variable})"

    @property
    def url(self) -> str:
        """As gRPC takes it, password included."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return f"http://{login}{self.address}"

    def connect(self, raw: socket.socket, target: HostPort) -> None:
        """Makes a fresh connection to this proxy one to the target. Raises: OSError, saying what the proxy answered."""
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.user:
            login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
            lines.append(f"Proxy-Authorization: Basic {login}")
        raw.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        status = _answer(raw).split(b"\r\n", 1)[0].decode("latin-1")
        if status.split(" ")[1:2] != ["200"]:
            raise OSError(f"it answers {status!r}" if status else "it closes the connection")


def proxy_for(target: HostPort, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that leads to a server; None where the way is direct.

    Raises: DomainError CONFIGURATION_INVALID, naming the variable, if it holds no usable proxy.
    """
    if is_local(str(target)) or any(_exempts(entry, target.host) for entry in _exemptions(environment)):
        return None
    for variable in VARIABLES:
        if value := environment.get(variable, "").strip():
            return _parsed(value, variable)
    return None


def channel_options(target: HostPort) -> tuple[tuple[str, Any], ...]:
    """What makes a gRPC channel go that way. Raises: as `proxy_for`."""
    proxy = proxy_for(target)
    if proxy is None:
        return (("grpc.enable_http_proxy", 0),)
    return (("grpc.enable_http_proxy", 1), ("grpc.http_proxy", proxy.url))


def named(address: str) -> str:
    """` through the proxy ... (from ...)`, for errors; empty where the way to `host:port` is direct."""
    try:
        proxy = proxy_for(HostPort.parse(address))
    except DomainError:
        return ""
    return "" if proxy is None else f" through {proxy}"


def _parsed(value: str, variable: str) -> Proxy:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        address = HostPort.parse(str(HostPort(parts.hostname or "", parts.port or 80)))
    except ValueError:  # its words show what they could not read, be it a password
        why = "the port is 1 to 65535, and odd characters of user and password are written as %XX"
        raise _unusable(variable, why) from None
    except DomainError as error:
        raise _unusable(variable, error.message) from None
    if parts.scheme != "http":
        raise _unusable(variable, f"only http:// proxies are supported, not {parts.scheme}://")
    return Proxy(
        address=address,
        variable=variable,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _unusable(variable: str, why: str) -> DomainError:
    return DomainError(
        Reason.CONFIGURATION_INVALID, f"{variable} names no usable proxy, as http://host:port: {why}"
    )


def _exemptions(environment: Mapping[str, str]) -> Iterator[str]:
    for variable in EXEMPTIONS:
        for entry in environment.get(variable, "").split(","):
            if stripped := entry.strip().lower():
                yield stripped


def _exempts(entry: str, host: str) -> bool:
    if entry == "*":
        return True
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.removeprefix("*").strip("[]"))


def _answer(raw: socket.socket) -> bytes:
    """The head of the proxy's answer. One byte at a time, as what follows is the server's."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < _LARGEST_ANSWER:
        piece = raw.recv(1)
        if not piece:
            break
        head += piece
    return head
