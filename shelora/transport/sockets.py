"""TCP connections whose making takes a bounded time, the resolution of the name included."""

import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final

from shelora.transport.address import HostPort

RESOLVE_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 10.0
"""For all addresses of a name together."""


def reached(target: HostPort) -> socket.socket:
    """A connection. Its operations time out after CONNECT_TIMEOUT_S.

    Raises: OSError if the name is not known or not resolved in time, or no address of it accepts in time.
    """
    deadline_s, last = time.monotonic() + CONNECT_TIMEOUT_S, OSError(f"{target.host} has no address")
    for family, kind, protocol, _, address in _resolved(target):
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(max(deadline_s - time.monotonic(), 0.1))
            raw.connect(address)
            raw.settimeout(CONNECT_TIMEOUT_S)
        except OSError as error:
            raw.close()
            last = error
        else:
            return raw
    raise last


def _resolved(target: HostPort) -> list[Any]:
    """What `getaddrinfo` finds. It cannot be interrupted, so it has a thread that may outlive the wait."""
    found: list[list[Any]] = []
    failed: list[OSError] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except OSError as error:
            failed.append(OSError(f"the name {target.host} is not known here ({error.strerror})"))

    thread = threading.Thread(target=resolve, name="resolve", daemon=True)
    thread.start()
    thread.join(RESOLVE_TIMEOUT_S)
    if failed:
        raise failed[0]
    with suppress(IndexError):
        return found[0]
    raise OSError(
        f"the name {target.host} was not resolved within {RESOLVE_TIMEOUT_S:g} s: is DNS reachable?"
    )
