"""The page in a container: what the compose file starts, and whom it listens to."""

import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from shelora.cli.main import _tell_address, app
from shelora.dashboard.serving import _listening

COMPOSE = yaml.safe_load((Path(__file__).parents[3] / "deploy" / "compose" / "compose.yaml").read_text())
PAGE = COMPOSE["services"]["dashboard"]


def test_the_page_of_the_compose_file_is_asked_for_and_published_on_loopback_alone():
    assert PAGE["profiles"] == ["dashboard"]
    assert PAGE["ports"] == ["127.0.0.1:8080:8080"], "whatever PUBLISH says: the page has no TLS"
    assert PAGE["volumes"] == ["operator:/operator"]
    assert PAGE["networks"] == ["members"], "agents do not reach it"


def test_the_page_understands_its_command_line_and_shows_the_load_of_every_server():
    command = shlex.split(PAGE["command"].replace("${PUBLIC_NAME:-localhost}", "localhost"))
    shown = {command[i + 1] for i, word in enumerate(command) if word == "--metrics"}
    servers = ("coordinator", "key-authority", "aggregation-0", "aggregation-1")
    assert shown == {f"{server}={server}:9464" for server in servers}
    for server in servers:
        environment = COMPOSE["services"][server]["environment"]
        assert [port for name, port in environment.items() if name.endswith("_METRICS_PORT")] == ["9464"]
        assert set(COMPOSE["services"][server]["networks"]) & set(PAGE["networks"])
    environment = PAGE["environment"] | {"SHELORA_IDENTITY": "/nowhere"}
    result = CliRunner().invoke(app, command[1:], env=environment)
    assert "/nowhere" in result.output, "it misses its identity alone"


def test_the_address_is_for_this_user_alone(tmp_path, capsys):
    _tell_address(tmp_path / "address", "http://127.0.0.1:8080/secret/?token=secret")
    assert (tmp_path / "address").read_text() == "http://127.0.0.1:8080/secret/?token=secret\n"
    assert (tmp_path / "address").stat().st_mode & 0o777 == 0o600
    told = capsys.readouterr()
    assert "secret" not in told.out + told.err


def test_it_listens_on_loopback_unless_it_is_told_otherwise():
    with _listening("127.0.0.1", 0) as here, _listening("0.0.0.0", 0) as everywhere:
        assert here.getsockname()[0] == "127.0.0.1"
        assert everywhere.getsockname()[0] == "0.0.0.0"
