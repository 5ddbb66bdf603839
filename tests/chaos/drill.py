"""A federation on a local cluster, and what befalls it."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process
from shelora.errors import DomainError
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from tests.chaos.auditor import Copies
from tests.chaos.relay import TcpRelay
from tests.chaos.timeline import Fault, Incident, Targets
from tests.e2e.agents import Agent, configure

DRAIN_S = 25.0
"""Seconds a drained server has: its grace is 20."""
COPY_S = 0.2


@dataclass
class Tale:
    """What happened, for the log and the findings."""

    say: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    """Ends of processes that nobody asked for."""

    def tell(self, what: str) -> None:
        self.lines.append(f"{time.monotonic() - self.started:6.1f} s  {what}")
        self.say(self.lines[-1])


class Drill:
    """Agents under supervision, servers that die and come back."""

    def __init__(
        self,
        cluster: LocalCluster,
        relay: TcpRelay,
        spec: FederationSpec,
        folder: Path,
        model: Path,
        tale: Tale,
    ) -> None:
        self._cluster = cluster
        self._relay = relay
        self._spec = spec
        self._folder = folder
        self._model = model
        self._tale = tale
        self._agents: dict[str, Process] = {}
        self._configured: dict[str, Path] = {}
        self._usual_s: dict[str, float] = {}
        self._busy: set[str] = set()
        """Targets that something befalls just now."""
        self._suffering: set[asyncio.Task[None]] = set()
        self.groups: list[int] = [process.popen.pid for process in cluster.processes]
        self.states: dict[str, Path] = {}
        """Where each agent's state lies."""
        self.copies = Copies(folder / "copies", {})

    @property
    def targets(self) -> Targets:
        fronts = ("coordinator", "redis", "key-authority", *self._named("aggregation"))
        return Targets(tuple(self._agents), tuple(self._cluster.servers), fronts)

    def _named(self, kind: str) -> list[str]:
        return [name for name in self._cluster.servers if name.startswith(kind)]

    def slow_down(self, delay_s: float) -> None:
        """Delays what goes to and from aggregation, for the whole drill."""
        self._usual_s = dict.fromkeys(self._named("aggregation"), delay_s)
        for front, seconds in self._usual_s.items():
            self._relay.delay(front, seconds)

    async def begin(self, agents: list[Agent]) -> None:
        """Creates the federation and starts the agents."""
        at = replace(self._cluster.addresses, coordinator=self._relay.front("coordinator"))
        self.states = {agent.name: self._folder / agent.name / "state" for agent in agents}
        for agent in agents:
            await self._cluster.enrol_client(self._spec.name, agent.name, self.states[agent.name])
            self._configured[agent.name] = configure(agent, at, self._model, self._folder)
        self.copies = Copies(self._folder / "copies", self.states)
        async with operator(at.coordinator, self._cluster.credentials) as connection:
            await connection.create(self._spec.to_proto())
            await connection.start(self._spec.name)
        for agent in agents:
            self._start_agent(agent.name)

    def _start_agent(self, name: str) -> None:
        environment = {"SHELORA_AGENT__LOG__JSON_LINES": "true", "SHELORA_AGENT__LOG__LEVEL": "DEBUG"}
        arguments = ["run", "--config", str(self._configured[name])]
        process = self._cluster.spawn(name, "client_agent.main", arguments, environment)
        self._agents[name] = process
        self.groups.append(process.popen.pid)

    async def copying(self) -> None:
        """Copies updates until cancelled."""
        while True:
            await asyncio.to_thread(self.copies.take)
            await asyncio.sleep(COPY_S)

    async def supervising(self) -> None:
        """Starts again whatever ends without being told, and notes it; until cancelled."""
        while True:
            for name, process in list(self._agents.items()):
                if name not in self._busy and process.popen.poll() not in {None, 0}:
                    self._note_exit(process)
                    self._start_agent(name)
            for name, process in list(self._cluster.servers.items()):
                if name not in self._busy and process.popen.poll() is not None:
                    self._note_exit(process)
                    with self._held(name):
                        await self._restart(name)
            await asyncio.sleep(COPY_S)

    def _note_exit(self, process: Process) -> None:
        tail = process.log.read_text(errors="replace").splitlines()[-1:]
        self._tale.exits.append(
            f"{process.name} exited with {process.popen.returncode}: {' '.join(tail)[:300]}"
        )
        self._tale.tell(f"UNEXPECTED {self._tale.exits[-1]}")

    async def strike(self, incident: Incident) -> None:
        """Lets an incident happen, if nothing befalls its target yet; it goes on beside what follows."""
        if incident.target in self._busy or self._is_gone(incident.target):
            return
        self._tale.tell(f"{incident.fault:<15} {incident.target} ({incident.lasts_s:.1f} s)")
        self._busy.add(incident.target)
        task = asyncio.create_task(self._suffer(incident))
        self._suffering.add(task)
        task.add_done_callback(self._suffering.discard)

    def _is_gone(self, target: str) -> bool:
        return target in self._agents and self._agents[target].popen.poll() is not None

    async def calm(self) -> None:
        """Waits until everything is up again."""
        await asyncio.gather(*self._suffering)

    def _held(self, name: str) -> "_Held":
        return _Held(self._busy, name)

    async def _suffer(self, incident: Incident) -> None:
        with self._held(incident.target):
            match incident.fault:
                case Fault.KILL:
                    await self._kill(incident)
                case Fault.DRAIN:
                    await self._drain(incident)
                case Fault.STOP:
                    await self._stop(incident)
                case Fault.KILL_WORKER:
                    self._kill_worker(incident.target)
                case Fault.CUT:
                    self._relay.cut(incident.target)
                case Fault.STALL:
                    self._relay.stall(incident.target, incident.lasts_s)
                    await asyncio.sleep(incident.lasts_s)
                case Fault.DELAY:
                    self._relay.delay(incident.target, incident.strength)
                    await asyncio.sleep(incident.lasts_s)
                    self._relay.delay(incident.target, self._usual_s.get(incident.target, 0.0))

    def _process(self, name: str) -> Process:
        return self._agents.get(name) or self._cluster.servers[name]

    async def _kill(self, incident: Incident) -> None:
        process = self._process(incident.target)
        process.popen.kill()
        await asyncio.to_thread(process.popen.wait)
        await asyncio.sleep(incident.lasts_s)
        await self._restart(incident.target)

    async def _drain(self, incident: Incident) -> None:
        process = self._process(incident.target)
        process.terminate()
        try:
            code = await asyncio.to_thread(process.popen.wait, DRAIN_S)
        except subprocess.TimeoutExpired:
            self._tale.exits.append(f"{incident.target} did not drain within {DRAIN_S:.0f} s")
            process.popen.kill()
            code = await asyncio.to_thread(process.popen.wait)
        if code != 0:
            self._note_exit(process)
        await self._restart(incident.target)

    async def _restart(self, name: str) -> None:
        if name in self._agents:
            self._start_agent(name)
            return
        for attempt in range(3):
            try:
                process = await asyncio.to_thread(self._cluster.restart, name)
            except DomainError as error:  # its port may have been taken for a moment
                self._tale.tell(f"{name} did not start, attempt {attempt + 1}: {error.message[-300:]}")
                await asyncio.sleep(1)
            else:
                self.groups.append(process.popen.pid)
                return
        self._tale.exits.append(f"{name} does not start")

    async def _stop(self, incident: Incident) -> None:
        pid = self._process(incident.target).popen.pid
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(incident.lasts_s)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _kill_worker(self, name: str) -> None:
        with suppress(psutil.Error):
            workers = psutil.Process(self._process(name).popen.pid).children()
            for worker in workers[:1]:
                worker.kill()

    async def federation(self) -> pb.Federation | None:
        """As the coordinator shows it; None while it does not answer."""
        try:
            async with operator(self._relay.front("coordinator"), self._cluster.credentials) as connection:
                return await connection.get(self._spec.name)
        except DomainError:
            return None

    async def is_over(self) -> bool:
        found = await self.federation()
        return found is not None and found.phase in {pb.PHASE_FINISHED, pb.PHASE_FAILED}

    def agents_left(self) -> list[str]:
        """Agents that have not ended."""
        return [name for name, process in self._agents.items() if process.popen.poll() is None]

    def logs(self, *kinds: str) -> dict[str, Path]:
        """Logs of the servers of some kinds; of the agents without an argument."""
        folder = self._folder / "cluster" / "logs"
        names = [name for kind in kinds for name in self._named(kind)] if kinds else list(self._agents)
        return {name: folder / f"{name}.log" for name in names}


class _Held:
    """Keeps others off a target."""

    def __init__(self, busy: set[str], name: str) -> None:
        self._busy = busy
        self._name = name

    def __enter__(self) -> None:
        self._busy.add(self._name)

    def __exit__(self, *_: object) -> None:
        self._busy.discard(self._name)
