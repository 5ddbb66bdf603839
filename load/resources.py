"""Memory and CPU time of processes, sampled while they run."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import psutil

from shelora.cli.processes import Process

PERIOD_S: Final = 0.5


@dataclass
class Usage:
    """What one process used."""

    at_s: list[float] = field(default_factory=list)
    """Seconds since the sampling began, one a sample."""
    rss_bytes: list[int] = field(default_factory=list)
    """Resident memory, one a sample."""
    cpu_s: float = 0.0
    """User and system time since the sampling began."""

    @property
    def peak_bytes(self) -> int:
        return max(self.rss_bytes, default=0)


class Sampler:
    """Samples processes and their children: a child that is named after its parent is a worker of it."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self._processes = [(p.name, psutil.Process(p.popen.pid)) for p in processes]
        self._cpu_before: dict[str, float] = {}
        self._began = time.monotonic()

    def sample(self) -> None:
        for name, process in self._processes:
            self._note(name, process)
            for number, child in enumerate(sorted(process.children(), key=lambda c: c.pid)):
                self._note(f"{name}/worker-{number}", child)

    def _note(self, name: str, process: psutil.Process) -> None:
        try:
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
        except psutil.NoSuchProcess:
            return
        spent = times.user + times.system
        usage = self.usage[name]
        usage.at_s.append(time.monotonic() - self._began)
        usage.rss_bytes.append(memory.rss)
        usage.cpu_s = spent - self._cpu_before.setdefault(name, spent)


@contextmanager
def sampled(processes: Sequence[Process], period_s: float = PERIOD_S) -> Iterator[Sampler]:
    """Samples from a thread of its own until the block ends."""
    sampler, stop = Sampler(processes), threading.Event()

    def work() -> None:
        while not stop.wait(period_s):
            sampler.sample()

    sampler.sample()
    thread = threading.Thread(target=work, name="sampler", daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        stop.set()
        thread.join()
        sampler.sample()
