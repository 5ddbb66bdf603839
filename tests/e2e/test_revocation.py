"""An agent and all servers are revoked in the middle of a federation, and operators after it.

The agent is cut off, the others go on to the end under new keys; who is certified anew is good again.
"""

import asyncio
from pathlib import Path

import pytest

from shelora.audit import AuditEvent, verified
from shelora.cli.cluster import LocalCluster
from shelora.cli.members import LOCAL_NAMES
from shelora.errors import DomainError, Reason
from shelora.exits import EXIT_REFUSED
from shelora.operator import create_token, list_revocations, operator, revoke_holder
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import enroll
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import aggregation_pb2, aggregation_pb2_grpc, coordinator_pb2_grpc, key_authority_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.key_authority_pb2_grpc import KeyAuthorityStub
from tests.e2e import federations
from tests.e2e.agents import AGENTS, specification, start_agent
from tests.identities import OPERATOR, client


async def test_a_revoked_agent_is_cut_off_and_the_others_finish_in_the_next_epoch(
    cluster: LocalCluster, model: Path, tmp_path: Path
):
    spec, addresses = (
        specification("selective", rounds=8),
        cluster.addresses,
    )  # more than fit between two polls
    *others, revoked = [await start_agent(cluster, agent, addresses, model, tmp_path) for agent in AGENTS]
    await federations.start(cluster, spec)
    async with (
        asyncio.timeout(federations.TIMEOUT_S),
        operator(addresses.coordinator, cluster.credentials) as connection,
    ):
        while (await connection.get(spec.name)).trained_rounds < 1:  # noqa: ASYNC110 - it is in other processes
            await asyncio.sleep(federations.POLL_S)
        await revoke_holder(addresses.key_authority, cluster.credentials, client(revoked.name, "weather"))
        await _certify_servers_anew(cluster)
        while any(process.popen.poll() is None for process in (*others, revoked)):
            for process in cluster.processes:
                if process.popen.poll() and process is not revoked:
                    process.require_alive()
            await asyncio.sleep(federations.POLL_S)
        federation = await connection.get(spec.name)

    assert revoked.popen.returncode == EXIT_REFUSED
    assert "CERTIFICATE_REVOKED" in revoked.log.read_text()
    assert "ask the operator of federation weather" in revoked.log.read_text()
    assert [process.popen.returncode for process in others] == [0, 0]
    assert (federation.phase, federation.epoch) == (pb.PHASE_FINISHED, 2), federation.failure
    assert sorted(member.client_id for member in federation.members) == ["bank", "clinic"]
    assert federation.history[-1].cohort_count == 2
    assert (tmp_path / "bank" / "state" / "adapter").is_dir()

    await _assert_nothing_can_be_called(cluster, tmp_path / revoked.name / "state" / "identity")
    keys = tmp_path / "cluster" / "key-authority"
    assert sorted(path.name for path in (keys / "epochs").iterdir()) == [
        "weather.1.retired",
        "weather.2.sealed",
    ]
    with (keys / "audit.log").open("rb") as file:
        records = list(verified(file))
    released = {(r.epoch, r.client_id) for r in records if r.event is AuditEvent.SECRETS_RELEASED}
    assert released == {(1, "bank"), (1, "clinic"), (1, "sensor"), (2, "bank"), (2, "clinic")}
    events = [record.event for record in records]
    assert events.count(AuditEvent.CLIENT_REVOKED) == events.count(AuditEvent.EPOCH_RETIRED) == 1
    assert events.count(AuditEvent.ROLE_REVOKED) == 2
    await _an_operator_comes_back(cluster, tmp_path / "cluster" / "operator.token")


async def _certify_servers_anew(cluster: LocalCluster) -> None:
    """As after a theft: all servers of a kind are revoked, and those that are left are enrolled where they run."""
    addresses, roles = cluster.addresses, (Role.COORDINATOR, Role.AGGREGATION)
    for role in roles:
        await revoke_holder(addresses.key_authority, cluster.credentials, Identity(role))
    for role in roles:
        while "renewal_failed" not in cluster.servers[role].log.read_text():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(federations.POLL_S)
        assert "CERTIFICATE_REVOKED" in cluster.servers[role].log.read_text()
        token = await create_token(addresses.key_authority, cluster.credentials, role, names=LOCAL_NAMES)
        await enroll(token.token, addresses.enrolment, Path(addresses.operator_identity).parent / role)
    while not all(_knows_of(cluster.servers[role].log, Identity(role)) for role in roles):  # noqa: ASYNC110 - as above
        await asyncio.sleep(federations.POLL_S)


def _knows_of(log: Path, revoked: Identity) -> bool:
    lines = log.read_text().splitlines()
    return any('"event": "revoked"' in line and revoked.uri in line for line in lines)


async def _an_operator_comes_back(cluster: LocalCluster, token: Path) -> None:
    addresses = cluster.addresses
    await revoke_holder(addresses.key_authority, cluster.credentials, OPERATOR)
    with pytest.raises(DomainError) as refused:
        await list_revocations(addresses.key_authority, cluster.credentials)
    assert refused.value.reason is Reason.CERTIFICATE_REVOKED
    assert "--operator-token-file" in refused.value.message
    await asyncio.to_thread(cluster.restart, "key-authority")
    await enroll(token.read_text(), addresses.enrolment, Path(addresses.operator_identity))  # noqa: ASYNC240 - tiny
    found = await list_revocations(addresses.key_authority, cluster.credentials)
    assert [revocation.role for revocation in found] == ["", "coordinator", "aggregation", "operator"]


async def _assert_nothing_can_be_called(cluster: LocalCluster, identity: Path) -> None:
    credentials, addresses = TlsCredentials(IdentityFolder(identity)), cluster.addresses
    own = {"federation_id": "weather", "client_id": "sensor"}
    async with (
        open_channel(addresses.key_authority, credentials) as keys,
        open_channel(addresses.coordinator, credentials) as coordinator,
        open_channel(addresses.aggregation[0], credentials) as aggregation,
    ):
        secrets = [key_authority_pb2.GetEpochSecretsRequest(epoch=epoch, **own) for epoch in (1, 2)]
        progress = aggregation_pb2.QueryShardsRequest(round_id="weather.0.1", client_id="sensor")
        calls = [
            *((KeyAuthorityStub(keys).GetEpochSecrets, request) for request in secrets),
            (coordinator_pb2_grpc.CoordinatorStub(coordinator).Heartbeat, pb.HeartbeatRequest(**own)),
            (aggregation_pb2_grpc.AggregationStub(aggregation).QueryShards, progress),
        ]
        for method, request in calls:
            with pytest.raises(DomainError) as refused:
                await call(method, request)
            assert refused.value.reason is Reason.CERTIFICATE_REVOKED
