import pytest

from coordinator.records import Model
from shelora.federation import ProtectionSpec
from shelora.lora.layout import Matrix
from shelora.strategies.port import RoundTerms
from shelora.strategies.registry import strategy_of


@pytest.fixture
def some_layout():
    model = Model(matrices=(Matrix("q", 4, 6),), tensors=())
    return strategy_of("none").layout(model, ProtectionSpec(mode="none"), RoundTerms(key_id=b"", max_rank=2))
