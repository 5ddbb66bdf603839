"""One version, in pyproject.toml: what must repeat it for other tools repeats it rightly."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from client_agent.main import app as agent
from coordinator.main import app as coordinator
from services.aggregation.main import app as aggregation
from services.key_authority.main import app as key_authority
from shelora.cli.main import app as operator
from shelora.version import VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_installed_version_is_that_of_the_project():
    assert PROJECT["version"] == VERSION, "run `make setup` again"


@pytest.mark.parametrize("app", [operator, agent, coordinator, aggregation, key_authority])
def test_every_program_tells_its_version(app):
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{VERSION}\n")


def test_chart_and_compose_use_images_of_this_version():
    chart = yaml.safe_load((ROOT / "deploy/helm/shelora/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    images = re.findall(r"shelora-\w+:([\d.]+)", (ROOT / "deploy/compose/compose.yaml").read_text())
    assert set(images) == {VERSION}


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == VERSION


def test_what_the_package_asks_for_admits_what_is_tested():
    pins = dict(
        line.replace("_", "-").split("==")
        for line in (ROOT / "requirements/constraints.txt").read_text().lower().splitlines()
        if "==" in line
    )
    wanted = PROJECT["dependencies"] + [
        r for extra in PROJECT["optional-dependencies"].values() for r in extra
    ]
    for requirement in wanted:
        name, least = re.fullmatch(r"([\w.-]+)[=>]=([\w.]+).*", requirement).groups()
        assert pins[name.lower()] == least, f"{name} is tested at another version than the least it asks for"
