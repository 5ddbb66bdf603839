import pytest

from tests.contract.coordinator.world import World, world


@pytest.fixture
async def fed(redis_url: str):
    async with world(redis_url) as built:
        yield built


__all__ = ["World"]
