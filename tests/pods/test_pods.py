"""One life of the chart's pods, in order: they come up and serve, are confined, do what NOTES.txt promises, lose
nothing when each is deleted in the middle of a round, and come back after all were away.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from deploy.helm.tests.rendering import scenario
from tests.containers import ASK, training
from tests.e2e.agents import AGENTS, configure, save_tiny_bert, specification
from tests.pods.agents import agent_pod
from tests.pods.cluster import PODMAN, Cluster, podman

pytestmark = pytest.mark.timeout(3600)

ROUNDS = 4
FEDERATION = "weather"
NOTES = scenario("default").notes.replace("\\\n", "")
SERVERS = (
    "aggregation-0",
    "coordinator-0",
    "redis-0",
    "key-authority-0",
    "aggregation-1",
    "coordinator-1",
)
ABSENT = "agent-sensor"
"""It stands still while the others' round goes on, which waits for it."""
STEPS = 400
"""Of training, which last some seconds: the absent agent is stopped meanwhile."""
KUBECTL = """
kubectl() {  # --namespace NAME exec [-i] POD|deployment/NAME -- COMMAND...
    shift 3
    interactive=
    if [ "$1" = -i ]; then interactive=$1; shift; fi
    case $1 in deployment/*) pod=${1#deployment/}-0 ;; *) pod=$1 ;; esac
    shift 2
    component=${pod#demo-shelora-}
    $PODMAN exec $interactive "$pod-${component%-*}" "$@"
}
set -euo pipefail
"""


def noted(words: str, folder: Path, client: str = "") -> str:
    """What the command that NOTES.txt prints answers, with names of our own in place of its examples."""
    (command,) = [line for line in NOTES.splitlines() if words in line]
    script = KUBECTL + command.replace("my-federation", FEDERATION).replace("newsroom-1", client)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PODMAN": " ".join(PODMAN)},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def noted_address(pattern: str) -> str:
    """One of the addresses that NOTES.txt gives for agents."""
    found = re.search(rf'{pattern} (?:\[")?([\w.:-]+)', NOTES)
    assert found, pattern
    return found[1]


def federation(cluster: Cluster) -> dict:
    """As JSON of its message; empty while it cannot be asked for."""
    asked = ("exec", cluster.pods["demo-shelora-operator-0"].container, "python3", "-c", ASK, FEDERATION)
    done = podman(*asked, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def collecting(cluster: Cluster) -> bool:
    """Whether a round waits for the absent agent, whose seat on its committee is taken."""
    current = federation(cluster).get("current", {})
    sent = {f"agent-{update['clientId']}" for update in current.get("updates", [])}
    return current.get("state") == "ROUND_STATE_COLLECTING" and ABSENT not in sent


def absent(cluster: Cluster) -> bool:
    """Stops the absent agent, unless it is too early or too late for that in this round."""
    if not collecting(cluster):
        return False
    podman("kill", "--signal", "STOP", cluster.pods[ABSENT].container)
    if not collecting(cluster):
        podman("kill", "--signal", "CONT", cluster.pods[ABSENT].container)
        return False
    return True


def waiting_round(cluster: Cluster) -> str:
    """The round of training that waits for the third update; "" if there is none."""
    current = federation(cluster).get("current", {})
    held = (current.get("kind"), current.get("updateCount")) == ("ROUND_KIND_TRAIN", len(AGENTS) - 1)
    return current["roundId"] if held else ""


def all_ready(cluster: Cluster) -> None:
    for pod in cluster.pods.values():
        if pod.component != "agent":
            cluster.wait(lambda pod=pod: cluster.ready(pod), f"{pod.name} is ready")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_bert(tmp_path_factory.mktemp("model"))
    opened(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agents")


def opened(folder: Path) -> None:
    """For the users of containers, up to pytest's own folder."""
    subprocess.run(["chmod", "-R", "a+rwX", str(folder)], check=True)
    for parent in folder.parents[:2]:
        parent.chmod(0o711)


def test_every_pod_starts_and_turns_ready_in_no_order(cluster: Cluster):
    all_ready(cluster)


def test_every_process_is_confined(cluster: Cluster):
    for pod in cluster.pods.values():
        status = podman("exec", pod.container, "cat", "/proc/1/status").stdout
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), pod.name
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE), pod.name
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), pod.name
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE), pod.name
        user = str(pod.manifest["spec"]["securityContext"]["runAsUser"])
        assert re.search(rf"^Uid:\s+{user}\s", status, re.MULTILINE), pod.name
        assert podman("exec", pod.container, "touch", "/x", check=False).returncode, pod.name


def test_the_notes_lead_to_an_operator_and_a_federation(cluster: Cluster, home: Path):
    assert "enrolled as the operator" in noted("shelora enroll", home)
    spec = specification(rounds=ROUNDS, min_updates=len(AGENTS), deadline_s=3600).model_dump(mode="json")
    # So many steps at the usual rate lead each agent elsewhere, and the mean nowhere: agents would object to it.
    spec["training"] |= {"local_steps": STEPS, "learning_rate": 0.2 / STEPS}
    (home / f"{FEDERATION}.yaml").write_text(yaml.safe_dump(spec))
    noted("federation create", home)
    assert federation(cluster)["phase"] == "PHASE_RUNNING"


def test_agents_enrol_by_the_notes_and_train(cluster: Cluster, home: Path, model: Path):
    addresses = SimpleNamespace(
        coordinator=noted_address("coordinator:"),
        aggregation=(noted_address("aggregation:"),),
        key_authority=noted_address("key_authority:"),
    )
    for agent in AGENTS:
        configure(agent, addresses, model, home)
        (home / agent.name / "token").write_text(noted("token create", home, agent.name))
        opened(home / agent.name)
        pod = agent_pod(
            agent.name, home / agent.name, model, noted_address("client-agent enroll .* --authority")
        )
        cluster.pods[pod.name] = pod
        cluster.start(pod)
    cluster.wait(lambda: absent(cluster), "an agent is stopped while it trains")
    cluster.wait(lambda: bool(waiting_round(cluster)), "a round waits for the one that stands still")


@pytest.mark.parametrize("name", SERVERS)
def test_a_round_outlives_each_server_that_is_deleted(cluster: Cluster, name: str):
    pod, before = cluster.pods[f"demo-shelora-{name}"], waiting_round(cluster)
    assert before
    cluster.delete(pod)
    cluster.start(pod)
    cluster.wait(lambda: cluster.ready(pod), f"{name} is ready again")
    cluster.wait(lambda: waiting_round(cluster) == before, "the round waits on, with its updates")


def test_the_federation_finishes_with_every_round_at_the_first_attempt(cluster: Cluster):
    podman("kill", "--signal", "CONT", cluster.pods[ABSENT].container)
    cluster.wait(lambda: federation(cluster).get("phase") == "PHASE_FINISHED", "the federation finishes")
    rounds = training(federation(cluster))
    assert [(r["number"], r["updateCount"], r.get("reason", "")) for r in rounds] == [
        (number, len(AGENTS), "") for number in range(1, ROUNDS + 1)
    ]
    for agent in AGENTS:
        pod = cluster.pods[f"agent-{agent.name}"]
        cluster.wait(lambda pod=pod: not cluster.state(pod)["Running"], f"{pod.name} ends")
        assert cluster.state(pod)["ExitCode"] == 0, pod.name


def test_nothing_is_written_where_a_kubelet_would_mount_nothing(cluster: Cluster):
    """Podman mounts these writable even where the root is read-only; a kubelet does not."""
    for pod in cluster.pods.values():
        if pod.component != "agent":
            found = podman("exec", pod.container, "find", "/var/tmp", "/run/lock", "-mindepth", "1").stdout
            assert not found, pod.name


def test_all_is_there_again_after_all_was_away(cluster: Cluster):
    before = federation(cluster)
    assert training(before)
    servers = [cluster.pods[f"demo-shelora-{name}"] for name in SERVERS]
    for pod in servers:
        cluster.delete(pod)
    for pod in servers:
        cluster.start(pod)
    all_ready(cluster)
    cluster.wait(lambda: training(federation(cluster)) == training(before), "its rounds are there again")
