"""The event loop of virtual time."""

import asyncio
import time

import pytest

from tests.simulation.loop import Deadlock, VirtualLoop


@pytest.fixture
def loop():
    loop = VirtualLoop()
    yield loop
    loop.close()


def test_an_hour_passes_at_once(loop):
    began_s = time.monotonic()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.now_s == pytest.approx(3600)
    assert time.monotonic() - began_s < 60


def test_timers_ring_in_their_order(loop):
    rang = []

    async def ring(at_s):
        await asyncio.sleep(at_s)
        rang.append((at_s, loop.now_s))

    async def everybody():
        await asyncio.gather(*(ring(at_s) for at_s in (3.0, 1.0, 2.0)))

    loop.run_until_complete(everybody())
    assert rang == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_calls_in_threads_run_here_and_later(loop):
    async def called():
        before_s = loop.now_s
        answer = await asyncio.to_thread(lambda: "answer")
        return answer, loop.now_s - before_s

    answer, seconds = loop.run_until_complete(called())
    assert (answer, seconds > 0) == ("answer", True)


def test_waiting_for_nothing_is_a_deadlock(loop):
    async def wait():
        await asyncio.Event().wait()

    task = loop.create_task(wait())
    with pytest.raises(Deadlock):
        loop.run_until_complete(task)
    task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
