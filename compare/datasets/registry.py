"""Data sets by name: the one place where they are looked up. `compare.settings.DATA` says how they are trained."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from compare.data import Encoded, cached
from compare.datasets import texts
from compare.datasets.digits import Digits
from compare.datasets.instructions import Instructions
from compare.datasets.port import DataSet
from compare.networks.port import Network

DATASETS: Final[Mapping[str, DataSet]] = {
    "r8": texts.R8,
    "20news": texts.NEWS,
    "tomatoes": texts.ROTTEN,
    "digits": Digits(),
    "instructions": Instructions(),
}


@cache
def encoded(name: str, assets: Path, store: Path) -> Encoded:
    """The data set, encoded; from `store` if it lies there."""
    data = DATASETS[name]
    return cached(store / data.file, lambda: data.encode(assets))


@cache
def network(name: str, assets: Path, store: Path) -> Network:
    """The network that is trained on a data set; one for all cells of a process."""
    return DATASETS[name].network(encoded(name, assets, store), assets)
