"""An agent's transfers: with one aggregation replica until it fails, then with the next."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from shelora.transport.channel import OpenChannel, open_channel
from shelora.transport.replicas import Replicas
from shelora.transport.tls import Credentials

STALL_S: Final = 60.0
"""Seconds a transfer may take beside its bytes."""
SLOWEST_BYTES_S: Final = 8_000
"""Bytes a second below which a transfer is given up: the next attempt resumes it, perhaps at another replica."""
REFRESH_S: Final = 30.0
"""Seconds between two looks for other replicas, while there is something to transfer."""


def replicas_for_transfers(
    addresses: Sequence[str],
    credentials: Credentials | None,
    connect: OpenChannel = open_channel,
    shuffle: Callable[[list[Any]], None] = random.shuffle,
) -> Replicas:
    """The replicas, one of them current.

    Args:
        addresses: Where to begin.
        credentials: The client's identity; None only in tests.
        connect: Opens the connections.
        shuffle: Brings replicas into this client's order, so that not all clients begin with the same one.
    """
    return Replicas(
        addresses,
        lambda address: connect(address, credentials),
        refresh_s=REFRESH_S,
        stays=True,
        shuffle=shuffle,
    )


def transfer_timeout_s(size_bytes: int) -> float:
    """Seconds after which a transfer of that size is given up."""
    return STALL_S + size_bytes / SLOWEST_BYTES_S
