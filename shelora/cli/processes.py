"""The processes of a local cluster: started with a log each, started again, stopped in order."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis

from shelora.cli.folder import MARK, STOP_TIMEOUT_S
from shelora.cli.supervision import Supervision
from shelora.errors import DomainError, Reason

START_TIMEOUT_S: Final = 180.0
LOG_TAIL_LINES: Final = 15
_POLL_S: Final = 0.05


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


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a process is started, and how one sees that it serves."""

    arguments: list[str]
    environment: Mapping[str, str]
    ready: Path | None = None
    redis_port: int | None = None

    def at(self, stem: str, address: str, enrolment: str) -> "Launch":
        """The same on the ports that it got."""
        ports = {f"{stem}LISTEN": address, **({f"{stem}ENROLMENT_LISTEN": enrolment} if enrolment else {})}
        return replace(self, environment={**self.environment, **ports})

    def wait(self, process: Process) -> None:
        """Returns once it serves. Raises INTERNAL with the end of its log if it ends or takes too long."""
        if self.ready is not None:
            _wait_until(self.ready.exists, process)
        if self.redis_port is not None:
            _wait_for_redis(self.redis_port, process)


class Processes:
    """All of a cluster by name, each covered by its supervision. A context manager, which stops the servers at its end.

    Args:
        folder: Of the cluster; logs lie below it.
        supervision: Ends them if this process dies.
        tell: Takes what is being started.
    """

    def __init__(self, folder: Path, supervision: Supervision, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._supervision = supervision
        self._tell = tell
        self._stack = ExitStack()
        self._launches: dict[str, Launch] = {}
        self._agents: list[Process] = []
        self.servers: dict[str, Process] = {}
        """By name; of one that was started again the newest."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def all(self) -> list[Process]:
        """Servers, then agents."""
        return [*self.servers.values(), *self._agents]

    def log(self, name: str) -> Path:
        """Where a process of that name writes."""
        return self._folder / "logs" / f"{name}.log"

    def spawn(self, name: str, launch: Launch) -> Process:
        """Starts an agent."""
        return self.adopt(self._started(name, launch))

    def adopt(self, agent: Process) -> Process:
        """Takes an agent, however it was started, as one of the cluster."""
        self._supervision.covers("agent", agent.popen.pid)
        self._agents.append(agent)
        return agent

    def start(self, name: str, launch: Launch) -> Process:
        """Starts a server; it stops before those that were started earlier."""
        self._tell(f"starting {name}")
        self._serve(name, launch)
        self._stack.callback(self._stop, name)
        return self.servers[name]

    def keep(self, name: str, launch: Launch) -> None:
        """How that server is started again."""
        self._launches[name] = launch

    def restart(self, name: str) -> Process:
        """Stops a server unless it has ended, and starts it again. Returns once it serves."""
        self._stop(name)
        launch = self._launches[name]
        if launch.ready is not None:
            launch.ready.unlink(missing_ok=True)  # one that was killed has left it
        self._serve(name, launch)
        launch.wait(self.servers[name])
        return self.servers[name]

    def stop_agents(self) -> None:
        """Ends agents side by side, before the servers that they would miss."""
        for process in self._agents:
            process.terminate()
        for process in self._agents:
            process.stop()

    def _serve(self, name: str, launch: Launch) -> None:
        self._launches[name] = launch
        self.servers[name] = process = self._started(name, launch)
        self._supervision.covers("server", process.popen.pid)

    def _stop(self, name: str) -> None:
        """Stops the newest process of that name."""
        self.servers[name].stop()

    def _started(self, name: str, launch: Launch) -> Process:
        environment = {**launch.environment, MARK: str(self._folder)}
        return Process(name, launch.arguments, self.log(name), environment)


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
