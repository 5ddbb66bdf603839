from collections.abc import Iterator
from pathlib import Path

import pytest

from shelora.cli.cluster import LocalCluster
from tests.e2e.agents import save_tiny_bert
from tests.e2e.nursery import ForkingCluster, Nursery


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as running:
        yield running


@pytest.fixture
def cluster(nursery: Nursery, tmp_path: Path) -> Iterator[LocalCluster]:
    with ForkingCluster(nursery, tmp_path / "cluster", workers=1) as running:
        yield running
