"""The cluster of deploy/compose, for the session. Skips where there is no container engine, and says so."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.compose.stack import Stack, compose_command
from tests.containers import run

GRAFANA = os.environ.get("GRAFANA_IMAGE", "grafana/grafana:12.1.1")


def _available(image: str) -> bool:
    return not subprocess.run(
        ["docker", "image", "inspect", image], capture_output=True, check=False
    ).returncode or (
        not subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, check=False).returncode
    )


@pytest.fixture(scope="session")
def compose() -> list[str]:
    command = compose_command()
    if command is None or run("docker", "info", check=False).returncode:
        pytest.skip("no container engine: `docker info` and `docker compose version` must answer")
    return command


@pytest.fixture(scope="session")
def grafana(compose: list[str]) -> bool:
    """Whether its image can be had; the rest of the cluster is tested without it."""
    return _available(GRAFANA)


@pytest.fixture(scope="session")
def stack(compose: list[str], grafana: bool) -> Iterator[Stack]:
    running = Stack(compose, without=() if grafana else ("grafana",))
    running.down("--volumes")
    try:
        running.up()
        yield running
    finally:
        if not os.environ.get("KEEP"):
            running.down("--volumes")
