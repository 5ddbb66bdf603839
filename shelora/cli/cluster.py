"""A cluster on one machine: Valkey, key authority, coordinator and aggregation, each a process of its own.

The same programs and settings as under compose or Kubernetes; only the addresses differ.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import TypeAdapter, ValidationError

from shelora.cli.folder import ADDRESSES
from shelora.cli.members import CLIENT_IDENTITY, LOCAL_NAMES, Members
from shelora.cli.processes import Launch, Process, Processes
from shelora.cli.servers import LOOPBACK, Relay, Servers
from shelora.cli.supervision import Supervision
from shelora.configuration import invalid
from shelora.levels import Level
from shelora.operator import own_credentials
from shelora.transport.certificates import utc_now
from shelora.transport.identity import Role
from shelora.transport.tls import Held, IdentityFolder, TlsCredentials


@dataclass(frozen=True, kw_only=True)
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
        """Reads `cluster.json`. Raises: CONFIGURATION_INVALID if no cluster runs there; OSError."""
        path = folder / ADDRESSES
        try:
            return _ADDRESSES.validate_json(path.read_bytes())
        except FileNotFoundError:
            raise invalid(f"no local cluster runs in {folder}: start one with `shelora up`") from None
        except ValidationError:
            raise invalid(
                f"{path} is not what `shelora up` writes: remove it, and start the cluster anew"
            ) from None


_ADDRESSES: Final = TypeAdapter(Addresses)


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
        host: Where servers listen, but for Redis, which is for this machine alone; an address among their names.
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
        host: str = LOOPBACK,
    ) -> None:
        self._names = (*LOCAL_NAMES, *names)
        self._folder = folder.absolute()
        self._coordinators = coordinators
        self._replicas = aggregation_replicas
        self._workers = workers
        self._announces = announce
        self._settings = settings or {}
        self._relay = relay
        self._stack = ExitStack()
        self._supervision = Supervision(self._folder, tell)
        self._processes = Processes(self._folder, self._supervision, tell)
        self._servers = Servers(
            folder=self._folder, processes=self._processes, fixed_ports=fixed_ports, relay=relay, host=host
        )

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            starting.callback(self._stack.close)
            self._stack.enter_context(self._supervision)
            self._stack.enter_context(self._processes)
            self.addresses = self._start()
            starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.stop_agents()
        self._stack.close()

    @property
    def processes(self) -> list[Process]:
        """All that were started, servers first; of one that was started again the newest."""
        return self._processes.all

    @property
    def servers(self) -> Mapping[str, Process]:
        """Servers by name."""
        return self._processes.servers

    def require_alive(self) -> None:
        """Raises INTERNAL with the end of the log of the first server that died."""
        for process in self.processes:
            process.require_alive()

    def spawn(self, name: str, module: str, arguments: list[str], environment: Mapping[str, str]) -> Process:
        """Starts `python -m module` as a process that stops with the cluster, before the servers."""
        command = [sys.executable, "-m", module, *arguments]
        return self._processes.spawn(name, Launch(arguments=command, environment=environment))

    def restart(self, name: str) -> Process:
        """Stops a server unless it has ended, and starts it again: same settings, same address.

        Returns once it serves.
        """
        return self._servers.restart(name)

    def add_aggregation(self) -> str:
        """Starts another replica of aggregation. Returns its name."""
        self._replicas += 1
        name = f"aggregation-{self._replicas - 1}"
        self._start_aggregation(name, self._replicas - 1)()
        return name

    def _start(self) -> Addresses:
        self._servers.prepare()
        redis_url, authority = self._servers.redis(), self._servers.key_authority(self._names)
        self._redis_url = redis_url()
        self._key_authority, enrolment = authority()
        self._members = Members(self._folder / "identities", self._key_authority, enrolment, self._names)
        asyncio.run(self._members.enrol_operator(self._servers.operator_token.read_text()))
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
            coordinator=coordinators[0],
            key_authority=self._key_authority,
            aggregation=aggregation,
            redis_url=self._redis_url,
            enrolment=enrolment,
            operator_identity=str(self._members.operator),
            metrics=self._servers.metrics,
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
        return self._servers.aggregation(name, replica, settings)

    def _advertised(self, name: str) -> str:
        return "127.0.0.1:0" if self._relay is None else self._relay.front(name)

    def _start_coordinator(self, name: str, replica: int, aggregation: Sequence[str]) -> Callable[[], str]:
        settings = {
            **self._member_settings(name, Role.COORDINATOR),
            "AGGREGATION_ADDRESSES": json.dumps(aggregation),
        }
        return self._servers.coordinator(name, replica, settings)

    def _member_settings(self, name: str, role: Role) -> dict[str, str]:
        return {
            "REDIS_URL": self._redis_url,
            "KEY_AUTHORITY_ADDRESS": self._key_authority,
            "IDENTITY": self._enrolled(name, role),
            **self._settings.get(role.value, {}),
        }

    def _enrolled(self, name: str, role: Role) -> str:
        """Folder of a server's identity."""
        return str(asyncio.run(self._members.enrol_server(name, role)))


def _numbered(kind: str, count: int) -> list[str]:
    """Names of the replicas of one kind of server; numbered if there are several."""
    return [kind] if count == 1 else [f"{kind}-{replica}" for replica in range(count)]
