import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis

from services.aggregation.store import RedisShardStore, WorkerStore, connect, connect_worker
from shelora.ckks.parameters import INSECURE_TOY
from shelora.lora.layout import Layout, Tensor, build_layout
from tests.simulation.clients import simulated_clients
from tests.simulation.valkey import Valkey


@pytest.fixture(params=["real", "simulated"])
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A synchronous client of the server under the stores."""
    if request.param == "real":
        with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
            yield client
        return
    server = Valkey(lambda: time.monotonic_ns() // 1_000_000)
    yield simulated_clients(server)[1]
    assert not server.immortal


@pytest.fixture
async def new_store(client: Any) -> AsyncIterator[Callable[[], RedisShardStore]]:
    """Makes stores on one server."""
    made = []

    def new() -> RedisShardStore:
        url = _url(client)
        made.append(
            connect(url, connections=8, timeout_s=10)
            if url
            else RedisShardStore(simulated_clients(client.server)[0])
        )
        return made[-1]

    yield new
    for store in made:
        await store.close()


@pytest.fixture
def store(new_store: Callable[[], RedisShardStore]) -> RedisShardStore:
    return new_store()


@pytest.fixture
def worker(client: Any) -> Iterator[WorkerStore]:
    url = _url(client)
    store = connect_worker(url, timeout_s=10) if url else WorkerStore(simulated_clients(client.server)[1])
    yield store
    store.close()


def _url(client: Any) -> str:
    """Of a real server; "" for the simulated one."""
    if hasattr(client, "server"):
        return ""
    return "redis://{host}:{port}".format(**client.connection_pool.connection_kwargs)


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
