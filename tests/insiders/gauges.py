"""What an attack costs others: memory of the servers, time of members' calls."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil

from shelora.cli.cluster import LocalCluster

SAMPLE_S = 0.05


@dataclass
class Memory:
    """Resident memory of every server, bytes."""

    rest: dict[str, int]
    peak: dict[str, int]

    @property
    def growth_mib(self) -> dict[str, float]:
        """By server, MiB."""
        return {name: (self.peak[name] - rest) / 2**20 for name, rest in self.rest.items()}


@asynccontextmanager
async def memory_of(cluster: LocalCluster) -> AsyncIterator[Memory]:
    """Watches the servers while something is done inside."""
    processes = {name: psutil.Process(server.popen.pid) for name, server in cluster.servers.items()}

    def resident() -> dict[str, int]:
        return {name: process.memory_info().rss for name, process in processes.items()}

    rest = resident()
    memory = Memory(rest, dict(rest))

    async def watch() -> None:
        while True:
            for name, size in resident().items():
                memory.peak[name] = max(memory.peak[name], size)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    try:
        yield memory
    finally:
        watching.cancel()


@dataclass
class Latency:
    """Times of calls that were made one after the other, seconds."""

    times_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def worst_s(self) -> float:
        return max(self.times_s)


@asynccontextmanager
async def latency_of(made: Callable[[], Awaitable[object]]) -> AsyncIterator[Latency]:
    """Makes a call again and again while something is done inside; the last one is waited for."""
    latency, over = Latency(), asyncio.Event()

    async def probe() -> None:
        while not over.is_set():
            began_s = time.perf_counter()
            await made()
            latency.times_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(SAMPLE_S)

    probing = asyncio.create_task(probe())
    try:
        yield latency
    finally:
        over.set()
        await probing
