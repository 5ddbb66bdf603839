"""Agents in pods of their own, as a site of the federation would run them: the agent's image, and a folder."""

from pathlib import Path
from typing import Any

from shelora.version import VERSION
from tests.pods.playable import Pod

AGENT_IMAGE = f"localhost/shelora-agent:{VERSION}"
USER = 10001


def agent_pod(name: str, home: Path, model: Path, enrolment: str) -> Pod:
    """Enrols with the token in its folder and takes part until the federation ends."""
    name = f"agent-{name}"
    folders = {"home": home, "model": model}
    command = ["client-agent", "run", "--config", f"{home}/agent.yaml"]
    container: dict[str, Any] = {
        "name": "agent",
        "image": AGENT_IMAGE,
        "command": [*command, "--token-file", f"{home}/token", "--authority", enrolment],
        "env": [
            {"name": "TMPDIR", "value": str(home)}
        ],  # torch needs one; Podman 4 gives no /tmp beside a read-only root
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": key, "mountPath": str(path)} for key, path in folders.items()],
    }
    spec = {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 60,
        "securityContext": {"runAsUser": USER, "runAsGroup": USER},
        "containers": [container],
        "volumes": [{"name": key, "hostPath": {"path": str(path)}} for key, path in folders.items()],
    }
    labels = {"shelora/agent": "true"}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
    return Pod(name, "agent", manifest, volumes=(), names=(), ready={}, pre_stop_s=0)
