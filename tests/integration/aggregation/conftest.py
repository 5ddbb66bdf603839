from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from services.aggregation.keys import RoundKeys
from tests.integration.aggregation.cohort import Cohort, large_layout
from tests.integration.aggregation.service import ROUND, Caller, InlinePool, replica


@pytest.fixture
def keys(redis_url: str) -> Iterator["StoredKeys"]:
    with redis.Redis.from_url(redis_url) as client:
        yield StoredKeys(client)


class StoredKeys:
    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def besides_the_round(self) -> set[bytes]:
        return set(self.client.keys()) - {RoundKeys(ROUND).round.encode()}


@pytest.fixture(scope="session")
def cohort() -> Cohort:
    return Cohort()


@pytest.fixture(scope="session")
def wide() -> Cohort:
    """Two clients whose shards have many pieces."""
    return Cohort(size=2, layout=large_layout)


@pytest.fixture
def pool(redis_url: str) -> Iterator[InlinePool]:
    pool = InlinePool(redis_url)
    yield pool
    pool.close()


@pytest.fixture
async def caller(redis_url: str, pool: InlinePool) -> AsyncIterator[Caller]:
    async with replica(redis_url, pool) as caller:
        yield caller
