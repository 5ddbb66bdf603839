from collections.abc import Iterator
from pathlib import Path

import pytest

from shelora.cli.cluster import LocalCluster
from tests.e2e.agents import save_tiny_bert


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "cluster", fixed_ports=False, workers=1) as running:
        yield running
