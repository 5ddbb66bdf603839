"""Runs a federation to its end in a test."""

import asyncio
from collections.abc import Sequence

from shelora.cli.cluster import LocalCluster, Process
from shelora.cli.operator import operator
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb

TIMEOUT_S = 240


async def start(cluster: LocalCluster, spec: FederationSpec) -> None:
    async with operator(cluster.addresses.coordinator) as connection:
        await connection.create(spec.to_proto())
        await connection.start(spec.name)


async def wait_until_over(
    cluster: LocalCluster, spec: FederationSpec, agents: Sequence[Process]
) -> pb.Federation:
    """The federation once it has ended and its agents have exited; fails with the log of whoever died."""
    async with asyncio.timeout(TIMEOUT_S), operator(cluster.addresses.coordinator) as connection:
        while (federation := await connection.get(spec.name)).phase in {pb.PHASE_CREATED, pb.PHASE_RUNNING}:
            for process in cluster.processes:
                if process not in agents or process.popen.poll():
                    process.require_alive()
            await asyncio.sleep(0.2)
        while any(agent.popen.poll() is None for agent in agents):
            await asyncio.sleep(0.2)
        return await connection.get(spec.name)
