"""Wake-ups over a real Redis whose connection ends in unusual ways."""

import asyncio
import errno

import pytest
from redis.asyncio.client import PubSub

from coordinator import changes
from coordinator.changes import Changes
from coordinator.keys import Keys
from services.common.redis_client import connect


@pytest.fixture
async def listening(redis_url, monkeypatch):
    """Changes that listen, and the subscriptions that they opened, oldest first."""
    opened: list[PubSub] = []
    client = connect(redis_url)
    real = client.pubsub
    monkeypatch.setattr(client, "pubsub", lambda **options: opened.append(real(**options)) or opened[-1])
    monkeypatch.setattr(changes, "_RECONNECT_S", 0.05)
    listener = Changes(client)
    task = asyncio.create_task(listener.run())
    try:
        yield listener, opened, client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.aclose()


async def until(true) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.01)


async def test_a_peer_that_vanished_is_noticed_and_listened_to_again(listening):
    """As when the machine or pod of Redis is gone: the kernel ends the connection with ETIMEDOUT.

    redis-py takes that for the end of its own wait, and returns at once for ever. A coordinator that asked again had
    spent a gigabyte of memory on tracebacks within forty seconds.
    """
    listener, opened, client = listening
    await until(lambda: listener.version("films")[0] == 1)
    opened[0].connection._reader.set_exception(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
    await until(lambda: listener.version("films")[0] == 2)
    assert len(opened) == 2
    with listener.subscribed("films") as signal:
        await signal.wait(0)
        channel = Keys().changes("films")
        await client.publish(channel, "clinic")
        assert await signal.wait(20)


async def test_a_quiet_subscription_stays(listening, monkeypatch):
    monkeypatch.setattr(changes, "_READ_S", 0.1)
    listener, opened, _ = listening
    await until(lambda: listener.version("films")[0] == 1)
    await asyncio.sleep(0.5)
    assert len(opened) == 1
