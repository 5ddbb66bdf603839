"""Dashboards and alerts ask for metrics that exist, and say what they show."""

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/observability"
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in (FOLDER / "dashboards").glob("*.json")}
ALERTS = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
TARGETS = [
    pytest.param(panel, target, id=f"{name}-{panel['title']}-{target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel.get("targets", [])
]
PROMTOOL = shutil.which("promtool")

for module in (
    "client_agent.metrics",
    "coordinator.metrics",
    "services.aggregation.metrics",
    "services.key_authority.authority",
    "services.key_authority.enrolment",
    "services.common.guard",
    "services.common.observation",
    "services.common.rates",
    "services.common.revocations",
    "shelora.telemetry.logs",
    "shelora.transport.enrolment",
):
    import_module(module)


def described():
    """Name of a sample -> its labels, for every metric of every process."""
    found = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity"}}
    for metric in REGISTRY._collector_to_names:
        if not hasattr(metric, "_labelnames"):  # of the process, from the library
            names, labels = REGISTRY._collector_to_names[metric], set()
        else:
            (family,) = metric.describe()
            ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(
                family.type, ("",)
            )
            names, labels = [family.name + end for end in ends], set(metric._labelnames)
        found |= {name: labels | {"job", "instance", "le"} for name in names}
    return found


METRICS = described()
SELECTOR = re.compile(r"((?:shelora|process)_\w+|\bup\b|\bALERTS\b)(?:\{([^}]*)\})?")


def unknown(expression):
    """What an expression asks for that no process has: metrics, or labels of them."""
    missing = []
    for name, matchers in SELECTOR.findall(expression):
        labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
        if name not in METRICS:
            missing.append(name)
        elif not labels <= METRICS[name]:
            missing.append(f"{name}{labels - METRICS[name]}")
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
    known = set().union(*(METRICS.get(name, set()) for name, _ in SELECTOR.findall(expression)))
    return missing + sorted(grouped - known)


def test_an_expression_that_asks_for_what_there_is_not_is_found():
    assert unknown("sum(shelora_rounds_totals)") == ["shelora_rounds_totals"]
    assert unknown('sum by (why) (shelora_rounds_total{stat="x"})') == ["shelora_rounds_total{'stat'}", "why"]
    assert (
        unknown('sum by (le, kind) (rate(shelora_round_stage_duration_seconds_bucket{kind="VOTE"}[5m]))')
        == []
    )


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows_and_asks_for_metrics_that_exist(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    for target in panel["targets"]:
        assert unknown(target["expr"]) == []


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_a_legend_names_labels_that_the_result_has(panel, target):
    assert target["legendFormat"]
    grouped = re.search(r"by \(([^)]*)\)", target["expr"])
    (metric, _), *_ = SELECTOR.findall(target["expr"])
    labels = {label.strip() for label in grouped[1].split(",")} if grouped else METRICS[metric]
    assert set(re.findall(r"{{(.*?)}}", target["legendFormat"])) <= labels - {"le"}
    assert panel["type"] == "stat" or panel["options"]["legend"]["showLegend"]


@pytest.mark.parametrize("panel", [p for p in PANELS if p.values[0]["type"] == "stat"])
def test_a_number_says_itself_what_is_red(panel):
    """Grafana's own threshold, where a panel has none, paints every number from 80 on red."""
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["color"] == {"mode": "thresholds"}
    assert defaults["thresholds"]["steps"][0]["value"] is None


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_a_graph_misses_nothing_between_two_of_its_points(panel, target):
    """A window shorter than the step leaves events out, a longer one counts them several times."""
    windows = set(re.findall(r"\[(.*?)\]", target["expr"]))
    if "histogram_quantile" in target["expr"]:
        windows -= {"1h"}  # rounds are rare
    if panel["type"] == "timeseries" and windows:
        assert windows <= {"$__rate_interval", "$__interval"}
        assert panel["interval"] == "1m", "two scrapes of 30 s"
    if panel["type"] == "timeseries":
        assert "increase(" not in target["expr"], "bars whose sum is right: rate(), times $__interval_ms"


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_a_query_that_may_find_nothing_says_so_in_words(panel, target):
    if re.search(r">=? 0$", target["expr"]) and len(panel["targets"]) == 1:
        assert panel["fieldConfig"]["defaults"]["noValue"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_fill_the_width_and_do_not_overlap(name):
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARDS[name]["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert {x for x, _ in taken} == set(range(24))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_has_an_address_of_its_own_and_lets_choose_the_source(name):
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"shelora-{name.removesuffix('.json')}"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_metrics_that_exist_and_says_what_to_do(alert):
    assert unknown(alert["expr"]) == []
    few = re.search(r"increase\(.*> ([1-9])$", alert["expr"])
    assert not few, "increase extrapolates: one event counts as a little more"
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook"]
    assert "\n" not in alert["annotations"]["runbook"]
    assert f"`{alert['alert']}`" in OPERATIONS


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_a_page_names_metrics_that_exist(page):
    named = re.findall(r"\bshelora_\w+_(?:total|seconds|bytes|ratio|count)\b", page.read_text())
    assert set(named) <= METRICS.keys()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", [["check", "rules", "alerts.yaml"], ["test", "rules", "tests/alerts.yaml"]]
)
def test_promtool_accepts_the_alerts_and_they_fire_when_they_should(command):
    ran = subprocess.run([PROMTOOL, *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
