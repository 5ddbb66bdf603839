"""A federation whose servers are reached through an HTTP proxy alone: their name is known to nobody else."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.learner import Learner
from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.operator import create_token, operator
from shelora.transport.address import HostPort
from shelora.transport.enrolment import enroll
from shelora.transport.identity import Role
from shelora.v1 import coordinator_pb2 as pb
from tests.proxy import ConnectProxy
from tests.unit.client_agent.tiny import BAD, GOOD, LABELS, bert_config, save_model

NAME = "fl.test"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, fixed_ports=False, workers=1, names=[NAME]) as running:
        yield running


def far(address: str) -> str:
    """The address as the world outside knows it."""
    return str(HostPort(NAME, HostPort.parse(address).port))


async def token(cluster: LocalCluster, client: str) -> str:
    created = await create_token(
        cluster.addresses.key_authority, cluster.credentials, Role.CLIENT, federation="far", client=client
    )
    return created.token


async def test_agents_enrol_and_finish_a_federation_through_a_proxy_alone(cluster, tmp_path, monkeypatch):
    from transformers import BertModel  # noqa: PLC0415 - seconds

    model = save_model(BertModel(bert_config()), tmp_path / "bert")
    where = cluster.addresses
    spec = FederationSpec.model_validate(
        {
            "name": "far",
            "training": {"base_model": "tiny", "labels": LABELS, "local_steps": 2, "calibration_examples": 4},
            "round": {"rounds": 1, "clients": 2, "min_updates": 2, "deadline_s": 120},
        }
    )
    async with operator(where.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        await connection.start("far")
    with pytest.raises(DomainError, match=f"the name {NAME} is not known here"):
        await enroll(await token(cluster, "one"), far(where.enrolment), tmp_path / "x", retry_s=0)
    with ConnectProxy(NAME, login="me:secret") as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:secret@{proxy.address}")
        agents = []
        for name in ("one", "two"):
            home = tmp_path / name
            await enroll(await token(cluster, name), far(where.enrolment), home / "state" / "identity")
            agents.append(Agent(configured(where, name, home, model), Learner))
        enrolled = list(proxy.asked)
        assert enrolled == 4 * [far(where.enrolment)]  # for each, the pin's fetch and the call
        assert await asyncio.gather(*(agent.run() for agent in agents)) == [Outcome.FINISHED] * 2
        assert {far(where.coordinator), far(where.key_authority), *map(far, where.aggregation)} <= set(
            proxy.asked
        )
    assert (tmp_path / "one" / "state" / "adapter").exists()
    async with operator(where.coordinator, cluster.credentials) as connection:
        assert (await connection.get("far")).phase == pb.PHASE_FINISHED


async def test_a_call_that_fails_names_the_proxy_and_its_variable(cluster, monkeypatch):
    with ConnectProxy("other.test") as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        async with operator(far(cluster.addresses.coordinator), cluster.credentials) as connection:
            monkeypatch.setattr("shelora.operator.RETRY_S", 0)
            with pytest.raises(DomainError, match=rf"the proxy {proxy.address} \(from http_proxy\)") as error:
                await connection.list()
        assert error.value.reason is Reason.STORE_UNAVAILABLE


async def test_an_exemption_holds_for_both_steps_of_enrolment(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "vm.test,.0.1")  # uppercase alone, which gRPC does not know
    monkeypatch.setattr("shelora.transport.proxy.is_local", lambda _: False)
    await enroll(await token(cluster, "three"), cluster.addresses.enrolment, tmp_path, retry_s=0)


def configured(where, name: str, home: Path, model: Path) -> AgentConfig:
    rows = [{"text": f"the movie was {w}", "label": LABELS[w in GOOD]} for w in GOOD + BAD]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AgentConfig.model_validate(
        {
            "federation": "far",
            "client_id": name,
            "coordinator": far(where.coordinator),
            "aggregation": list(map(far, where.aggregation)),
            "key_authority": far(where.key_authority),
            "state_dir": home / "state",
            "model": {"path": str(model), "device": "cpu"},
            "data": {"train": home / "train.jsonl"},
            "lora": {"rank": 2},
            "resources": {"threads": 1},
        }
    )
