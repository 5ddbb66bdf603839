"""What a data set decides: what its model's frozen layers make of examples, and the network that is trained above."""

from pathlib import Path
from typing import Protocol

from compare.data import Encoded
from compare.networks.port import Network


class DataSet(Protocol):
    """A data set and its model."""

    @property
    def file(self) -> str:
        """Name of what is cached; another one wherever `encode` would return something else."""

    def encode(self, assets: Path) -> Encoded:
        """What the frozen layers make of it. Fetches what `assets` lacks."""

    def network(self, encoded: Encoded, assets: Path) -> Network:
        """What is trained on it."""
