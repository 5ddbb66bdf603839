"""One life of the cluster, in order: it comes up, is confined, runs a federation that is broken at every place, and is
taken down and up with nothing lost.
"""

import base64
import json
import urllib.parse
import urllib.request

import pytest

from tests.compose.stack import ADDRESS, AGENTS, ROUNDS, SERVERS, Stack
from tests.containers import run, training

pytestmark = pytest.mark.timeout(3600)

PUBLISHED = {
    "key-authority": {7099, 7102},
    "coordinator": {7101},
    "aggregation-0": {7103},
    "aggregation-1": {7104},
    "prometheus": {9090},
    "grafana": {3000},
}
SECRETS = (
    ("authority-secrets", "sealing.key"),
    ("authority-secrets", "coordinator.key"),
    ("authority-secrets", "aggregation.key"),
    ("coordinator-secrets", "redis.password"),
    ("aggregation-secrets", "redis.password"),
    ("grafana-secrets", "admin.password"),
)


def fetched(url: str, password: str = "") -> dict:
    request = urllib.request.Request(url)
    if password:
        request.add_header(
            "Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()
        )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def secret(stack: Stack, volume: str, file: str) -> str:
    return stack.once("cat", f"/mnt/{file}", volume=volume)


def test_the_cluster_comes_up_healthy(stack: Stack):
    for service in (*SERVERS, "prometheus"):
        stack.wait(lambda service=service: stack.healthy(service), f"{service} is healthy")


def test_every_container_is_confined(stack: Stack):
    for service, fact in stack.running().items():
        host = fact["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert not host["CapAdd"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
        assert host["LogConfig"]["Config"]["max-size"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert not host["Privileged"], service
        users = set(run("docker", "top", fact["Id"], "-eo", "uid,pid").stdout.split()[2::2])
        assert "0" not in users, service


def test_only_the_documented_ports_are_published_and_on_this_machine_alone(stack: Stack):
    for service, fact in stack.running().items():
        bindings = [b for ports in fact["NetworkSettings"]["Ports"].values() for b in ports or ()]
        assert {int(b["HostPort"]) for b in bindings} == PUBLISHED.get(service, set()), service
        assert {b["HostIp"] for b in bindings} <= {ADDRESS}, service


def test_no_secret_is_in_what_the_engine_shows_or_in_the_logs(stack: Stack):
    shown = json.dumps(list(stack.running().values())) + stack.compose("logs", "--no-color").stdout
    for name in SECRETS:
        assert len(value := secret(stack, *name)) == 64, name
        assert value not in shown, name


def test_making_the_secrets_again_changes_none(stack: Stack):
    before = [secret(stack, *name) for name in SECRETS]
    stack.compose("up", "--no-deps", "secrets")
    assert [secret(stack, *name) for name in SECRETS] == before


def test_agents_reach_neither_redis_nor_the_world(stack: Stack):
    networks = stack.running()["redis"]["NetworkSettings"]["Networks"]
    (redis,) = [network["IPAddress"] for network in networks.values()]
    for host, port in (("redis", 6379), (redis, 6379), ("1.1.1.1", 53)):
        assert not reached_by_an_agent(stack, host, port), host
    assert reached_by_an_agent(stack, "coordinator", 7101)
    assert reached_by_an_agent(stack, "key-authority", 7099)


def reached_by_an_agent(stack: Stack, host: str, port: int) -> bool:
    code = f"import socket; socket.create_connection(({host!r}, {port}), 10); print('reached')"
    return stack.once("python3", "-c", code, network="agents") == "reached"


def test_redis_obeys_its_users_alone(stack: Stack):
    def asked(*words: str) -> str:
        done = stack.exec("redis", "valkey-cli", "--no-auth-warning", *words, check=False)
        return done.stdout + done.stderr

    assert "NOAUTH" in asked("ping")
    assert "PONG" in asked("--user", "probe", "--pass", "none", "ping")
    assert "NOPERM" in asked("--user", "probe", "--pass", "none", "get", "shelora:coordinator:federations")
    password = secret(stack, "aggregation-secrets", "redis.password")
    assert "NOPERM" in asked(
        "--user", "aggregation", "--pass", password, "get", "shelora:coordinator:federations"
    )
    assert "NOPERM" in asked("--user", "aggregation", "--pass", password, "flushall")


def scraped(job: str) -> set[str]:
    """The instances that Prometheus reaches."""
    query = urllib.parse.urlencode({"query": f'up{{job="{job}"}} == 1'})
    samples = fetched(f"http://{ADDRESS}:9090/api/v1/query?{query}")["data"]["result"]
    return {sample["metric"]["instance"] for sample in samples}


def test_prometheus_scrapes_every_server_and_keeps_our_labels(stack: Stack):
    servers = {"key-authority", "coordinator", "aggregation-0", "aggregation-1"}
    stack.wait(lambda: scraped("shelora") == servers, "all are up")
    named = fetched(f"http://{ADDRESS}:9090/api/v1/labels")["data"]
    assert not [label for label in named if label.startswith("exported_")]


def test_grafana_shows_the_provisioned_dashboards(stack: Stack, grafana: bool):
    if not grafana:
        pytest.skip("the image of Grafana cannot be had here")
    stack.wait(lambda: stack.healthy("grafana"), "Grafana is healthy")
    password = secret(stack, "grafana-secrets", "admin.password")
    found = fetched(f"http://{ADDRESS}:3000/api/search?type=dash-db", password)
    assert {dashboard["uid"] for dashboard in found} == {"shelora-federations", "shelora-servers"}
    assert (
        fetched(f"http://{ADDRESS}:3000/api/datasources/uid/prometheus", password)["url"]
        == "http://prometheus:9090"
    )


def test_a_federation_survives_every_container(stack: Stack):
    stack.up(demo=True)
    stack.wait(
        lambda: stack.federation().get("current", {}).get("kind") == "ROUND_KIND_TRAIN", "a round begins"
    )
    stack.crash("aggregation-0")
    stack.crash("newsroom-2")
    stack.compose("stop", "coordinator")  # rounds stand still, so that the agents stay
    stack.wait(lambda: scraped("shelora-agents") == set(AGENTS), "Prometheus scrapes every agent")
    stack.compose("start", "coordinator")
    stack.crash("redis")
    stack.wait(lambda: stack.finished_rounds() >= 1, "the first round ends")
    stack.crash("coordinator")
    stack.restart("key-authority")
    stack.restart("newsroom-3")
    stack.restart("aggregation-1")


def test_a_round_goes_on_after_everything_was_taken_down(stack: Stack):
    before = stack.federation()
    stack.down()
    stack.up(demo=True)
    stack.wait(lambda: bool(stack.federation()), "the coordinator answers")
    assert training(stack.federation())[: len(training(before))] == training(before), "rounds were lost"
    stack.wait(lambda: stack.federation().get("phase") == "PHASE_FINISHED", "the federation finishes")
    assert [r["number"] for r in training(stack.federation()) if not r.get("reason")] == [
        *range(1, ROUNDS + 1)
    ]


def test_every_agent_ends_by_itself_with_an_adapter(stack: Stack):
    agents_end(stack)


def agents_end(stack: Stack) -> None:
    for agent in AGENTS:
        stack.wait(lambda agent=agent: stack.state(agent)["Status"] == "exited", f"{agent} ends")
        assert stack.state(agent)["ExitCode"] == 0, agent
        assert "adapter_model.safetensors" in stack.once("ls", "/mnt/state/adapter", volume=agent)


def lasting(federation: dict) -> dict:
    """Without the coordinator's clock, and when it saw each member last."""
    return {field: value for field, value in federation.items() if field not in {"nowUnixMs", "members"}}


def test_nothing_is_lost_by_down_and_up(stack: Stack):
    def keys() -> str:
        checked = stack.exec("key-authority", "shelora-key-authority", "check-data").stdout
        return checked.partition("register")[0]  # what follows grows with every start

    before, kept = stack.federation(), keys()
    stack.down()
    stack.up(demo=True)  # which finds a federation that has ended
    stack.wait(lambda: bool(stack.federation()), "the coordinator answers")
    assert lasting(stack.federation()) == lasting(before)
    assert keys() == kept
    agents_end(stack)
