from collections.abc import Iterator
from pathlib import Path

import pytest

from shelora.cli.cluster import LocalCluster
from tests.insiders.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One cluster a family of attacks; every test makes a federation of its own."""
    folder: Path = tmp_path_factory.mktemp("lab")
    with LocalCluster(folder / "cluster", fixed_ports=False, workers=1) as cluster:
        yield Lab(cluster, folder)
