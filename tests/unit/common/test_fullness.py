import asyncio
from contextlib import asynccontextmanager, suppress

import pytest
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError

from coordinator.metrics import REDIS_LIMIT, REDIS_USED, tell_fullness
from services.common.fullness import watch_fullness


class FakeRedis:
    """Gives each answer in turn, then waits for ever."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.all_given = asyncio.Event()

    async def info(self, section):
        assert section == "memory"
        if not self._answers:
            self.all_given.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@asynccontextmanager
async def watched(*answers):
    redis = FakeRedis(*answers)
    task = asyncio.create_task(watch_fullness(redis, tell_fullness, poll_s=0))
    await redis.all_given.wait()
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def gauges():
    return REDIS_USED._value.get(), REDIS_LIMIT._value.get()


async def test_the_gauges_are_what_redis_says():
    async with watched({"used_memory": 10, "maxmemory": 100}, {"used_memory": 20, "maxmemory": 100}):
        assert gauges() == (20, 100)


@pytest.mark.parametrize("error", [RedisConnectionError("gone"), NoPermissionError("info"), TimeoutError()])
async def test_a_redis_that_does_not_say_leaves_no_stale_numbers_and_is_logged_once(error):
    with structlog.testing.capture_logs() as logs:
        async with watched({"used_memory": 10, "maxmemory": 100}, error, error):
            assert gauges() == (0, 0)
    assert [record["event"] for record in logs] == ["redis_fullness_unknown"]


async def test_it_is_asked_again_after_a_failure():
    async with watched(RedisConnectionError("gone"), {"used_memory": 10, "maxmemory": 0}):
        assert gauges() == (10, 0)
