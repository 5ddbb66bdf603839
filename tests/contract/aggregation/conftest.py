from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from services.aggregation.store import RedisShardStore, WorkerStore, connect, connect_worker
from shelora.ckks.parameters import INSECURE_TOY
from shelora.lora.layout import Layout, Tensor, build_layout


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisShardStore]:
    store = connect(redis_url, connections=8, timeout_s=10)
    yield store
    await store.close()


@pytest.fixture
def worker(redis_url: str) -> Iterator[WorkerStore]:
    store = connect_worker(redis_url, timeout_s=10)
    yield store
    store.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(scope="session")
def layout() -> Layout:
    return layout_of_size(3)


def layout_of_size(size: int) -> Layout:
    return build_layout(
        parameters=INSECURE_TOY.name,
        key_id=b"",
        matrices=(),
        tensors=(Tensor("head", (size,)),),
        tiers=(),
        encrypt_tensors=False,
        max_rank=1,
        max_directions=1,
    )
