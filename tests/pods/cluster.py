"""The pods of a release in a network of their own, driven through podman."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from shelora.version import VERSION
from tests.containers import PATIENCE_S, run, wait
from tests.pods.playable import Pod, Volume

PODMAN = shlex.split(os.environ.get("PODMAN", "podman"))
NETWORK = "shelora-test-pods"
SERVER_IMAGE = f"localhost/shelora-server:{VERSION}"

_PREPARE = """
import base64, json, os, sys
for volume in json.load(sys.stdin):
    folder = "/mnt/" + volume["name"]
    if volume["files"]:
        os.makedirs(folder + "/..1", exist_ok=True)
        os.symlink("..1", folder + "/..data")
        for name, text in volume["files"].items():
            path = folder + "/..1/" + name
            with open(path, "wb") as file:
                file.write(base64.b64decode(text))
            os.chown(path, 0, volume["group"])
            os.chmod(path, volume["file_mode"])
            os.symlink("..data/" + name, folder + "/" + name)
    os.chown(folder, 0, volume["group"])
    os.chmod(folder, volume["mode"])
"""

_ASK_HEALTH = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
address, service = sys.argv[1:]
with grpc.insecure_channel(address) as channel:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)
"""


def podman(*command: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run(*PODMAN, *command, check=check, input=stdin)


class Cluster:
    """The controllers' and the kubelet's part."""

    def __init__(self, pods: Iterable[Pod]) -> None:
        self.pods = {pod.name: pod for pod in pods}

    def up(self) -> None:
        podman("network", "create", NETWORK)
        for pod in self.pods.values():
            self.start(pod)

    def down(self) -> None:
        for pod in self.pods.values():
            podman("pod", "stop", "--ignore", "--time", "0", pod.name, check=False)
            podman("pod", "rm", "--force", "--ignore", "--time", "0", pod.name)
            _remove(pod, pod.volumes)
        podman("network", "rm", "--force", NETWORK)

    def start(self, pod: Pod) -> None:
        """Prepares the volumes that are not there and starts the pod; does not wait for it to serve."""
        _prepare(pod)
        network = ",".join([NETWORK, *(f"alias={name}" for name in pod.names)]).replace(",", ":", 1)
        podman("kube", "play", "--network", network, "-", stdin=yaml.safe_dump(pod.playable(_folders(pod))))

    def delete(self, pod: Pod) -> None:
        """As `kubectl delete pod`: preStop, SIGTERM, grace, SIGKILL; claims stay. Fails if it needed SIGKILL."""
        time.sleep(pod.pre_stop_s)
        grace = pod.manifest["spec"]["terminationGracePeriodSeconds"] - pod.pre_stop_s
        podman("pod", "stop", "--time", str(grace), pod.name)
        assert (code := self.state(pod)["ExitCode"]) == 0, f"{pod.name} ended with {code}\n{_log(pod)}"
        podman("pod", "rm", pod.name)
        _remove(pod, [volume for volume in pod.volumes if not volume.keep])

    def state(self, pod: Pod) -> dict[str, Any]:
        return json.loads(podman("inspect", pod.container).stdout)[0]["State"]

    def ready(self, pod: Pod) -> bool:
        """Its readiness probe, asked from outside the pod where it is one by gRPC."""
        match pod.ready:
            case {"exec": {"command": command}}:
                return podman("exec", pod.container, *command, check=False).returncode == 0
            case {"grpc": {"port": port, "service": service}}:
                asked = ("python3", "-c", _ASK_HEALTH, f"{self.address(pod)}:{port}", service)
                return (
                    podman("run", "--rm", "--network", NETWORK, SERVER_IMAGE, *asked, check=False).returncode
                    == 0
                )
        return bool(self.state(pod)["Running"])

    def address(self, pod: Pod) -> str:
        infra = podman("pod", "inspect", "--format", "{{.InfraContainerID}}", pod.name).stdout.strip()
        (fact,) = json.loads(podman("inspect", infra).stdout)
        return str(fact["NetworkSettings"]["Networks"][NETWORK]["IPAddress"])

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        wait(condition, what, self.logs, patience_s)

    def logs(self) -> str:
        return "\n".join(_log(pod) for pod in self.pods.values())


def _log(pod: Pod) -> str:
    done = podman("logs", "--tail", "15", pod.container, check=False)
    return f"--- {pod.name}\n{done.stdout}{done.stderr}"


def _full_name(pod: Pod, volume: Volume) -> str:
    return f"{volume.name}-{pod.name}"


def _prepare(pod: Pod) -> None:
    """What a kubelet does to a pod's volumes before it starts the pod."""
    there = set(podman("volume", "ls", "--quiet").stdout.split())
    new = [volume for volume in pod.volumes if _full_name(pod, volume) not in there]
    mounts = [f"--volume={_full_name(pod, volume)}:/mnt/{volume.name}" for volume in new]
    prepare = ("--user=0:0", "--network=none", *mounts, SERVER_IMAGE, "python3", "-c", _PREPARE)
    if new:
        podman("run", "--rm", "--interactive", *prepare, stdin=json.dumps([vars(volume) for volume in new]))


def _remove(pod: Pod, volumes: Sequence[Volume]) -> None:
    if volumes:
        podman("volume", "rm", "--force", *(_full_name(pod, volume) for volume in volumes))


def _folders(pod: Pod) -> dict[str, str]:
    """Volumes as directories: what podman mounts as a volume it gives to the image's user."""
    inspect = ("volume", "inspect", "--format", "{{.Mountpoint}}")
    return {volume.name: podman(*inspect, _full_name(pod, volume)).stdout.strip() for volume in pod.volumes}
