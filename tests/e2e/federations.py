"""Runs a federation to its end in a test."""

import asyncio
from collections.abc import Sequence

from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb

TIMEOUT_S = 240
POLL_S = 0.2


async def start(cluster: LocalCluster, spec: FederationSpec) -> None:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        await connection.start(spec.name)


async def wait_until_over(
    cluster: LocalCluster, spec: FederationSpec, agents: Sequence[Process], killed: Sequence[Process] = ()
) -> pb.Federation:
    """The federation once it has ended and its agents have exited; fails with the log of whoever died unasked."""
    async with (
        asyncio.timeout(TIMEOUT_S),
        operator(cluster.addresses.coordinator, cluster.credentials) as connection,
    ):
        while True:
            federation = await connection.get(spec.name)
            over = federation.phase not in {pb.PHASE_CREATED, pb.PHASE_RUNNING}
            if over and all(agent.popen.poll() is not None for agent in agents):
                return await connection.get(spec.name)
            for process in cluster.processes:
                if process not in killed and (process not in agents or process.popen.poll()):
                    process.require_alive()
            await asyncio.sleep(POLL_S)
