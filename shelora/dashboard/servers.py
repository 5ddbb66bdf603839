"""Servers and Redis with their load, from the metrics they serve to Prometheus; read by the page itself."""

import asyncio
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from shelora.dashboard.model import ago
from shelora.view import size

TIMEOUT_S: Final = 2.0
MAX_BYTES: Final = 4 << 20
"""Of one answer; more is cut off and so refused."""
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
    """Raises: ValueError if it is not what Prometheus reads."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            sums[one.name] = sums.get(one.name, 0.0) + one.value
    return Sample(at_s, sums)


async def sampled(addresses: Mapping[str, str], at_s: float) -> dict[str, Sample | None]:
    """A sample of each server by name; None of those that do not answer."""
    read = await asyncio.gather(*(asyncio.to_thread(_read, a, at_s) for a in addresses.values()))
    return dict(zip(addresses, read, strict=True))


def _read(address: str, at_s: float) -> Sample | None:
    try:
        with _OPENER.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            return parsed(answer.read(MAX_BYTES).decode(), at_s)
    except (OSError, HTTPException, ValueError):
        return None


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
