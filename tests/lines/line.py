"""A device's line to the servers: a network namespace, and a pair of interfaces between it and this machine's own."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

DEVICE = "shelora-device"
"""The namespace."""
HERE, THERE = "shelora0", "shelora1"
"""The interfaces: the servers' and the device's."""
NETWORK = "10.201.77"
SERVERS = f"{NETWORK}.1"
ADDRESSES = (f"{NETWORK}.2", f"{NETWORK}.3")
"""Of the device, which it takes in turn."""
MODEM_BYTES = 32_768
"""What passes the shaper at once."""
QUEUE = "300ms"
"""What waits before it at most: more is dropped, and TCP sends it again."""


def unavailable() -> str:
    """Why there can be no such line here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc", "ss") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} of iproute2 is not installed"
    try:
        with Line(up_kbit=1000, down_kbit=1000) as line:
            line.reset()
    except subprocess.CalledProcessError as error:
        return f"this kernel or container refuses `{' '.join(error.cmd)}`: {error.stderr.strip()}"
    return ""


@dataclass
class Line:
    """A context manager; the line is there until its end.

    Attributes:
        up_kbit: Kilobits a second from the device.
        down_kbit: Kilobits a second to it.
    """

    up_kbit: int
    down_kbit: int
    _turn: int = 0

    def __enter__(self) -> Self:
        self._remove()  # what a run that was killed has left
        try:
            self._lay()
        except subprocess.CalledProcessError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What runs a program on the device."""
        return ["ip", "netns", "exec", DEVICE, *arguments]

    def cut(self) -> None:
        """Nothing passes from now on, and nobody is told."""
        _ip("link", "set", HERE, "down")

    def mend(self) -> None:
        """It passes again."""
        _ip("link", "set", HERE, "up")

    def reset(self) -> None:
        """Every connection of the device breaks, on both sides."""
        _run("ip", "netns", "exec", DEVICE, "ss", "--kill", "--tcp", "state", "established")

    def move(self) -> None:
        """The device gets another address, as one that changes networks: connections of the old one fall silent."""
        self._turn += 1
        old, new = (ADDRESSES[(self._turn - past) % len(ADDRESSES)] for past in (1, 0))
        _ip("-n", DEVICE, "addr", "del", f"{old}/24", "dev", THERE)
        _ip("-n", DEVICE, "addr", "add", f"{new}/24", "dev", THERE)

    @property
    def up_bytes(self) -> int:
        """What has come from the device, headers included."""
        return int(Path(f"/sys/class/net/{HERE}/statistics/rx_bytes").read_text(encoding="ascii"))

    @property
    def down_bytes(self) -> int:
        """What has gone to the device, headers included."""
        return int(Path(f"/sys/class/net/{HERE}/statistics/tx_bytes").read_text(encoding="ascii"))

    def _lay(self) -> None:
        _ip("netns", "add", DEVICE)
        _ip("link", "add", HERE, "type", "veth", "peer", "name", THERE, "netns", DEVICE)
        _ip("addr", "add", f"{SERVERS}/24", "dev", HERE)
        _ip("link", "set", HERE, "up")
        _ip("-n", DEVICE, "addr", "add", f"{ADDRESSES[0]}/24", "dev", THERE)
        _ip("-n", DEVICE, "link", "set", THERE, "up")
        _ip("-n", DEVICE, "link", "set", "lo", "up")
        _shape(HERE, self.down_kbit)
        _shape(THERE, self.up_kbit, "-n", DEVICE)

    def _remove(self) -> None:
        subprocess.run(["ip", "link", "del", HERE], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", DEVICE], capture_output=True, check=False)


def _shape(interface: str, kbit: int, *where: str) -> None:
    """Lets pass so much, and lets little wait."""
    limits = ("rate", f"{kbit}kbit", "burst", str(MODEM_BYTES), "latency", QUEUE)
    _run("tc", *where, "qdisc", "add", "dev", interface, "root", "tbf", *limits)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
