"""`python -m tests.insiders.figures`: what strangers cost, in memory of the servers and time of a member's calls."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError
from shelora.transport.channel import call
from shelora.v1 import aggregation_pb2, key_authority_pb2
from tests.insiders.gauges import Latency, latency_of, memory_of
from tests.insiders.lab import Hostile, Lab
from tests.insiders.stranger import CALLS, CONNECTING

MOST_GROWTH_MIB = 64
"""What 200 strangers at once may make a server grow by."""
SERVERS = ("enrolment", "coordinator", "aggregation", "key-authority")
SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an attack did."""

    ends: dict[str, int]
    """How the attacker's calls or connections ended."""
    growth_mib: dict[str, float]
    """By server."""
    quiet: dict[str, Latency]
    """A member's calls before, by server."""
    attacked: dict[str, Latency]

    @property
    def worst_growth_mib(self) -> float:
        return max(self.growth_mib.values())

    @property
    def worst_ratio(self) -> float:
        """Of the medians, of the server that suffers most."""
        return max(self.attacked[name].median_s / self.quiet[name].median_s for name in self.quiet)


async def under_attack(lab: Lab, kind: str, target: str, seconds: float) -> Figures:
    """Measures a quiet time of two seconds, then the attack of a stranger's process."""
    spec = await lab.create(kind, start=False)
    async with lab.hostile(spec, "member") as member:
        await member.join()
        async with probing(member) as quiet:
            await asyncio.sleep(2.0)
        async with memory_of(lab.cluster) as memory, probing(member) as attacked:
            ends = await _stranger(kind, _address(lab.cluster, target), seconds)
    return Figures(ends=ends, growth_mib=memory.growth_mib, quiet=quiet, attacked=attacked)


@asynccontextmanager
async def probing(member: Hostile) -> AsyncIterator[dict[str, Latency]]:
    """A member's calls to every server, again and again."""
    secrets = key_authority_pb2.GetEpochSecretsRequest(
        federation_id=member.federation, epoch=1, client_id=member.name
    )

    async def of_coordinator() -> None:
        await member.beat()

    async def of_aggregation() -> None:
        await call(member.aggregation.ListReplicas, aggregation_pb2.ListReplicasRequest())

    async def of_key_authority() -> None:
        with suppress(DomainError):  # no epoch is open yet: it is refused, as quickly as it would be answered
            await call(member.keys.GetEpochSecrets, secrets)

    async with (
        latency_of(of_coordinator) as coordinator,
        latency_of(of_aggregation) as aggregation,
        latency_of(of_key_authority) as key_authority,
    ):
        yield {"coordinator": coordinator, "aggregation": aggregation, "key-authority": key_authority}


def _address(cluster: LocalCluster, target: str) -> str:
    addresses = cluster.addresses
    known = {
        "enrolment": addresses.enrolment,
        "coordinator": addresses.coordinator,
        "aggregation": addresses.aggregation[0],
        "key-authority": addresses.key_authority,
    }
    return known[target]


async def _stranger(kind: str, address: str, seconds: float) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.insiders.stranger", kind, address, str(seconds)]
    process = await asyncio.create_subprocess_exec("nice", *command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return json.loads(output)


async def table(lab: Lab) -> Table:
    """All attacks on all ports."""
    shown = Table("attack", "on", "calls", "grows by (MiB)", "member's call, quiet", "attacked", "ratio")
    targets = [(kind, "enrolment") for kind in (*CALLS, "silent-calls")]
    targets += [(kind, server) for kind in CONNECTING if kind != "silent-calls" for server in SERVERS]
    for kind, target in targets:
        figures = await under_attack(lab, kind, target, SECONDS)
        worst = max(figures.quiet, key=lambda n: figures.attacked[n].median_s / figures.quiet[n].median_s)
        shown.add_row(
            kind,
            target,
            str(sum(figures.ends.values())),
            f"{figures.worst_growth_mib:.1f}",
            f"{1000 * figures.quiet[worst].median_s:.1f} ms",
            f"{1000 * figures.attacked[worst].median_s:.1f} ms",
            f"{figures.worst_ratio:.1f}",
        )
    return shown


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder) / "cluster", fixed_ports=False, workers=1) as cluster,
    ):
        Console(width=120).print(asyncio.run(table(Lab(cluster, Path(folder)))))


if __name__ == "__main__":
    main()
