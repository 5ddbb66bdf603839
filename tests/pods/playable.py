"""What the chart renders, as `podman kube play` takes it: one pod at a time, with its containers, users, limits,
commands and settings as they are. Replaced is what podman knows nothing of, or nobody here would do:

- Deployments and StatefulSets become their pods, one a replica. Nobody scales or rolls them.
- Volumes become directories, filled and owned as a kubelet does it (`Volume`). Podman ignores fsGroup, gives every
  container of a pod an emptyDir in memory of its own, and one `tmp` to all pods. Sizes, and memory as medium, are lost.
- Services become names of their pods in podman's network (`Pod.names`), those that the certificates hold. Podman does
  not look whether a pod is ready.
- Ports of containers are taken out, which are for reading: Podman before 5 publishes them on this machine, where the
  next replica's would meet them.
- restartPolicy becomes OnFailure: under Always, Podman 4 restarts an init container each time it ends, as long as its
  pod runs.
- Probes and preStop are taken out: podman has no gRPC probes, no readiness and no hooks. `Pod.ready` says what a
  kubelet would ask; `cluster.py` asks, and waits before it stops.

NetworkPolicies, autoscalers, budgets and service accounts have no meaning here.
"""

import base64
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from deploy.helm.tests.rendering import NAMESPACE, WORKLOADS, Rendered

DOMAIN = "cluster.local"
KEPT = {"io.podman.annotations.init.container.type": "always"}
"""Podman runs these init containers at each start of a pod, as a kubelet does. Those of its other kind it removes, and
fails if that is too soon for it."""
Object = dict[str, Any]


@dataclass(frozen=True)
class Volume:
    """A directory that a kubelet would prepare: root's, and fsGroup's by setgid."""

    name: str
    """In its pod."""
    group: int
    mode: int
    keep: bool = False
    """Outlives its pod."""
    files: dict[str, str] = field(default_factory=dict)
    """Name to base64, behind two symbolic links, as a kubelet mounts Secrets and ConfigMaps."""
    file_mode: int = 0o644


@dataclass(frozen=True)
class Pod:
    name: str
    component: str
    manifest: Object = field(repr=False)
    volumes: tuple[Volume, ...] = field(repr=False)
    names: tuple[str, ...]
    """What the cluster's DNS would call it by its Services."""
    ready: Object
    """Its readiness probe; empty without one."""
    pre_stop_s: int

    def playable(self, folders: Mapping[str, str]) -> Object:
        """Its manifest, where the folder of each volume is."""
        mounted = [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]
        return {
            **self.manifest,
            "spec": {**self.manifest["spec"], "volumes": [*self.manifest["spec"]["volumes"], *mounted]},
        }

    @property
    def container(self) -> str:
        """As podman calls it."""
        (container,) = self.manifest["spec"]["containers"]
        return f"{self.name}-{container['name']}"


def pods(rendered: Rendered) -> Iterator[Pod]:
    for workload in rendered.of(*WORKLOADS):
        for number in range(workload["spec"].get("replicas", 1)):
            yield _pod(rendered, workload, f"{workload['metadata']['name']}-{number}")


def _pod(rendered: Rendered, workload: Object, name: str) -> Pod:
    template = deepcopy(workload["spec"]["template"])
    spec, labels = template["spec"], template["metadata"]["labels"]
    (container,) = spec["containers"]
    claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
    sources = spec.get("volumes", []) + [{"name": c, "persistentVolumeClaim": {}} for c in claims]
    volumes = tuple(_volume(rendered, source, spec["securityContext"]["fsGroup"]) for source in sources)
    spec["volumes"] = []
    spec["restartPolicy"] = "OnFailure"
    for probe in ("startupProbe", "livenessProbe"):
        container.pop(probe, None)
    ready = container.pop("readinessProbe", {})
    hooks = container.pop("lifecycle", {})
    container.pop("ports", None)
    return Pod(
        name=name,
        component=labels["app.kubernetes.io/component"],
        manifest={
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels, "annotations": KEPT},
            "spec": spec,
        },
        volumes=volumes,
        names=tuple(_names(rendered, labels)),
        ready=ready,
        pre_stop_s=hooks.get("preStop", {}).get("sleep", {}).get("seconds", 0),
    )


def _volume(rendered: Rendered, source: Object, group: int) -> Volume:
    name = source["name"]
    match source:
        case {"persistentVolumeClaim": _}:
            return Volume(name, group, 0o2775, keep=True)
        case {"emptyDir": _}:
            return Volume(name, group, 0o2777)
        case {"secret": {"secretName": secret, "items": items, "defaultMode": mode}}:
            data = _named(rendered, "Secret", secret)["data"]
            return Volume(
                name, group, 0o3777, files={i["path"]: data[i["key"]] for i in items}, file_mode=mode
            )
        case {"configMap": {"name": configuration}}:
            data = _named(rendered, "ConfigMap", configuration)["data"]
            encoded = {file: base64.b64encode(text.encode()).decode() for file, text in data.items()}
            return Volume(name, group, 0o3777, files=encoded)
    raise AssertionError(f"a volume that no test prepares: {source}")


def _named(rendered: Rendered, kind: str, name: str) -> Object:
    (found,) = [item for item in rendered.of(kind) if item["metadata"]["name"] == name]
    return found


def _names(rendered: Rendered, labels: dict[str, str]) -> Iterator[str]:
    for service in rendered.of("Service"):
        if service["spec"]["selector"].items() <= labels.items():
            name = service["metadata"]["name"]
            yield from (
                name,
                f"{name}.{NAMESPACE}",
                f"{name}.{NAMESPACE}.svc",
                f"{name}.{NAMESPACE}.svc.{DOMAIN}",
            )
