"""The chart's pods with its default values, for the session. Skips where they cannot run, and says so."""

import os
import shutil
from collections.abc import Iterator

import pytest

from deploy.helm.tests.rendering import scenario
from tests.pods.agents import AGENT_IMAGE
from tests.pods.cluster import PODMAN, SERVER_IMAGE, Cluster, podman
from tests.pods.playable import pods


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if shutil.which(PODMAN[0]) is None or podman("info", check=False).returncode:
        pytest.skip("no podman: `podman info` must answer")
    for image in (SERVER_IMAGE, AGENT_IMAGE):
        if podman("image", "exists", image, check=False).returncode:
            pytest.skip(f"no image {image}: make images DOCKER=podman")
    running = Cluster(pods(scenario("default")))
    running.down()
    try:
        running.up()
        yield running
    finally:
        if not os.environ.get("KEEP"):
            running.down()
