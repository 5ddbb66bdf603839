"""Starts agents in no time: a process that has imported torch forks them. They are processes like any other.

`python -m tests.chaos.nursery` is that process: one JSON object a line in, what to start; one out for each beginning
and each end. It imports and forks, nothing else: no thread and no connection is there to be torn by a fork.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process

POLL_S = 0.02
STOP_TIMEOUT_S = 25


class Forked:
    """What `subprocess.Popen` is for a process that the nursery started."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self._nursery = nursery
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self._nursery.ends.get(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._nursery.ended:
            if not self._nursery.ended.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedProcess(Process):
    """A `shelora.cli.processes.Process` that the nursery started."""

    def __init__(self, name: str, log: Path, popen: Forked) -> None:
        self.name = name
        self.log = log
        self.popen = popen


class Nursery:
    """Starts agents and tells how they ended. A context manager, which kills those that are left."""

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}
        """Return codes by process, as `subprocess` gives them."""
        self.ended = threading.Condition()
        self._begun: dict[int, int] = {}
        self._count = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __name__]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._popen.stdin.close()
        self._popen.wait(STOP_TIMEOUT_S)
        self._reader.join()
        self._popen.stdout.close()

    def spawn(
        self, name: str, arguments: list[str], log: Path, environment: Mapping[str, str]
    ) -> ForkedProcess:
        """Starts `client-agent` with these arguments; its output is added to the log."""
        self._count += 1
        number = self._count
        order = {"number": number, "arguments": arguments, "log": str(log), "environment": dict(environment)}
        self._popen.stdin.write(json.dumps(order) + "\n")
        self._popen.stdin.flush()
        with self.ended:
            self.ended.wait_for(lambda: number in self._begun or self._popen.poll() is not None)
        return ForkedProcess(name, log, Forked(self, self._begun[number]))

    def _read(self) -> None:
        for line in self._popen.stdout:
            news = json.loads(line)
            with self.ended:
                if "number" in news:
                    self._begun[news["number"]] = news["pid"]
                else:
                    self.ends[news["pid"]] = news["code"]
                self.ended.notify_all()


class ForkingCluster(LocalCluster):
    """A local cluster whose agents come from the nursery."""

    def __init__(self, nursery: Nursery, folder: Path, **options: Any) -> None:
        super().__init__(folder, fixed_ports=False, **options)
        self._nursery = nursery

    def spawn(
        self, name: str, module: str, arguments: list[str], environment: Mapping[str, str]
    ) -> ForkedProcess:
        assert module == "client_agent.main"
        return self._processes.adopt(
            self._nursery.spawn(name, arguments, self._processes.log(name), environment)
        )


def main() -> None:
    """Forks what it is told to, until its input ends."""
    import client_agent.agent  # noqa: F401, PLC0415 - the point of it all

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: set[int] = set()
    while True:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable:
            line = _line()
            if not line:
                break
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(order)
            children.add(pid)
            _tell(number=order["number"], pid=pid)
        _bury(children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _line() -> bytes:
    """A line of standard input, unbuffered: what is buffered, `select` does not see."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def _bury(children: set[int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.discard(pid)
            _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def _tell(**news: Any) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def _become(order: dict[str, Any]) -> None:
    """The child: an agent with its own session, log and randomness."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target in (1, 2):
            os.dup2(log, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"])
        random.seed()
        from client_agent.main import app  # noqa: PLC0415 - as above

        app(order["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
