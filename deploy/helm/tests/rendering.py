"""The chart as Helm's own engine renders it, for the tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate.utils
import yaml

CHART = Path(__file__).parents[1] / "shelora"
# Reads several megabytes for every object otherwise.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

RELEASE, NAMESPACE = "demo", "fed"
WORKLOADS = {"Deployment", "StatefulSet"}
SCENARIOS = {"default": None, **{path.stem: path for path in sorted((CHART / "ci").glob("*.yaml"))}}
"""Values that the chart is rendered with, by name."""


def values_of(scenario: str) -> dict[str, Any]:
    path = SCENARIOS[scenario]
    return yaml.safe_load(path.read_text()) if path else {}


@dataclass(frozen=True)
class Rendered:
    """Every object of a release."""

    objects: tuple[dict[str, Any], ...]
    notes: str

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] in kinds]

    def named(self, kind: str, component: str) -> dict[str, Any]:
        (found,) = [o for o in self.of(kind) if o["metadata"]["name"] == f"{RELEASE}-shelora-{component}"]
        return found

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Component and pod template of every workload."""
        for item in self.of(*WORKLOADS):
            template = item["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template

    def pod(self, component: str) -> dict[str, Any]:
        return dict(self.pods())[component]

    def environment(self, component: str) -> dict[str, str]:
        container, *_ = self.pod(component)["spec"]["containers"]
        return {entry["name"]: entry["value"] for entry in container["env"]}


def render(values: dict[str, Any]) -> Rendered:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
    manifests = (text for path, text in sorted(files.items()) if path.endswith(".yaml"))
    objects = (item for text in manifests for item in yaml.safe_load_all(text) if item)
    return Rendered(tuple(objects), notes)


@cache
def scenario(name: str) -> Rendered:
    return render(values_of(name))


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def merged(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`base` with some of its top-level objects updated."""
    return {**base, **{key: {**base.get(key, {}), **value} for key, value in changes.items()}}
