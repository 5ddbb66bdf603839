"""Servers and Redis with their load, from the metrics they serve to Prometheus; read by the page itself."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from shelora.dashboard.model import ago
from shelora.transport.address import HostPort
from shelora.view import size

TIMEOUT_S: Final = 2.0
"""Seconds for one whole answer, however slowly it comes."""
MAX_BYTES: Final = 4 << 20
"""Of one answer; more is refused."""


@dataclass(frozen=True)
class Sample:
    """Metrics of one server at one time: sums over labels, by name."""

    at_s: float
    values: Mapping[str, float] = field(default_factory=dict)

    def get(self, name: str) -> float:
        """0 if it has no such metric."""
        return self.values.get(name, 0.0)


@dataclass(frozen=True, kw_only=True)
class ServerRow:
    """One server, as people read it."""

    name: str
    address: str
    up: bool
    cpu: str
    memory: str
    calls: str
    note: str


def parsed(text: str, at_s: float) -> Sample:
    """Figures that are not finite are left out. Raises: ValueError if it is not what Prometheus reads."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if isfinite(one.value):
                    sums[one.name] = sums.get(one.name, 0.0) + one.value
    except (LookupError, TypeError) as error:  # the parser's own, of what it does not foresee
        raise ValueError("these are no metrics") from error
    return Sample(at_s, sums)


async def sampled(addresses: Mapping[str, str], at_s: float) -> dict[str, Sample | None]:
    """A sample of each server by name; None of those that do not answer."""
    read = await asyncio.gather(*(_read(HostPort.parse(a), at_s) for a in addresses.values()))
    return dict(zip(addresses, read, strict=True))


async def _read(server: HostPort, at_s: float) -> Sample | None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            text = await _metrics(server)
        return await asyncio.to_thread(parsed, text, at_s)
    except (OSError, TimeoutError, ValueError):
        return None


async def _metrics(server: HostPort) -> str:
    """What a server tells Prometheus, by HTTP/1.0: one answer, no redirection, and the end of the connection ends it.

    Raises: OSError; ValueError if it is no such answer, or too long.
    """
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=MAX_BYTES)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {server}\r\nAccept: text/plain\r\n\r\n".encode())
        answer = bytearray()
        while part := await reader.read(1 << 16):
            answer += part
            if len(answer) > MAX_BYTES:
                raise ValueError("too long")
    finally:
        writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise ValueError("no answer of a server's metrics")
    return body.decode()


def server_row(name: str, address: str, now: Sample | None, before: Sample | None) -> ServerRow:
    """One server: rates are since the sample before."""
    if now is None:
        return ServerRow(name=name, address=address, up=False, cpu="-", memory="-", calls="-", note="")
    return ServerRow(
        name=name,
        address=address,
        up=True,
        cpu=_rate(now, before, "process_cpu_seconds_total", "{:.0%} of a core"),
        memory=size(now.get("process_resident_memory_bytes")),
        calls=_rate(now, before, "shelora_rpc_total", "{:.1f} a second"),
        note=_note(now),
    )


def redis_row(samples: Mapping[str, Sample | None]) -> ServerRow | None:
    """Redis, as a coordinator sees it; None if no coordinator says."""
    told = [s for s in samples.values() if s is not None and "shelora_redis_used_bytes" in s.values]
    if not told:
        return None
    used, limit = (max(s.get(f"shelora_redis_{what}_bytes") for s in told) for what in ("used", "limit"))
    share = f"{used / limit:.0%} of {size(limit)}" if limit else "no maxmemory is set"
    return ServerRow(
        name="redis",
        address="",
        up=used > 0,
        cpu="-",
        memory=size(used),
        calls="-",
        note=share if used else "",
    )


def _rate(now: Sample, before: Sample | None, name: str, form: str) -> str:
    if before is None or now.at_s <= before.at_s or now.get(name) < before.get(name):
        return "-"
    return form.format((now.get(name) - before.get(name)) / (now.at_s - before.at_s))


def _note(now: Sample) -> str:
    parts = []
    if workers := now.get("shelora_aggregation_workers_count"):
        kind = "worker" if workers == 1 else "workers"
        parts.append(f"{now.get('shelora_aggregation_queue_count'):.0f} shards wait, {workers:.0f} {kind}")
    if started := now.get("process_start_time_seconds"):
        parts.append(f"up {ago(max(0.0, now.at_s - started))}")
    return ", ".join(parts)
