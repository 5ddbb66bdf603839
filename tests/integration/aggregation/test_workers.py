"""The pool of worker processes: it outlives its workers. The workers here are stand-ins that do as they are told."""

import asyncio
import os
import sys

import pytest

from services.aggregation.workers import PoolLimits, WorkerPool
from shelora.errors import DomainError, Reason

STAND_IN = """
import os, signal, sys, time
print('{"ready":true}', flush=True)
for line in sys.stdin:
    match line.split():
        case ["die"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["crash"]: os.kill(os.getpid(), signal.SIGSEGV)
        case ["half"]: print("half an answer", end="", flush=True); os._exit(1)
        case ["hang"]: time.sleep(1000)
        case ["threads"]: print(os.environ["OMP_NUM_THREADS"], flush=True)
        case ["pid"]: print(os.getpid(), flush=True)
        case ["leave"]: print("left", flush=True); sys.exit()
        case _: print("said", line.strip(), flush=True)
"""


def limits(*, workers: int = 1, queue: int = 10, job_timeout_s: float = 60) -> PoolLimits:
    return PoolLimits(workers=workers, threads=1, queue=queue, job_timeout_s=job_timeout_s)


def stand_ins(pool_limits: PoolLimits) -> WorkerPool:
    return WorkerPool(pool_limits, {}, [sys.executable, "-S", "-c", STAND_IN])


@pytest.fixture
async def pool():
    pool = stand_ins(limits())
    await pool.start()
    yield pool
    await pool.close()


async def failure(call) -> str:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is Reason.WORKER_FAILED
    return caught.value.message


async def test_a_worker_answers_its_job(pool):
    assert await pool.run(b"hello\n") == b"said hello\n"


@pytest.mark.parametrize("job", [b"die\n", b"crash\n", b"half\n"])
async def test_a_worker_that_dies_fails_its_job_and_is_replaced(pool, job):
    assert "died" in await failure(pool.run(job))
    assert await pool.run(b"hello\n") == b"said hello\n"


async def test_a_worker_that_died_between_jobs_fails_none_once_it_is_known(pool):
    await pool.run(b"leave\n")
    answers = [await asyncio.gather(pool.run(b"hello\n"), return_exceptions=True) for _ in range(3)]
    assert answers[-1] == [b"said hello\n"]


async def test_a_worker_that_takes_too_long_is_killed_and_replaced():
    pool = stand_ins(limits(job_timeout_s=1))
    await pool.start()
    pid = int(await pool.run(b"pid\n"))
    assert "longer" in await failure(pool.run(b"hang\n"))
    assert await pool.run(b"hello\n") == b"said hello\n"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await pool.close()


async def test_jobs_wait_for_a_worker_in_their_order(pool):
    answers = await asyncio.gather(*(pool.run(f"{number}\n".encode()) for number in range(8)))
    assert answers == [f"said {number}\n".encode() for number in range(8)]


async def test_jobs_beyond_the_queue_are_refused(monkeypatch):
    monkeypatch.setattr("services.aggregation.workers.END_S", 0.1)
    pool = stand_ins(limits(queue=1))
    await pool.start()
    running = asyncio.ensure_future(failure(pool.run(b"hang\n")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(failure(pool.run(b"hello\n")))
    await asyncio.sleep(0)
    assert "too many" in await failure(pool.run(b"hello\n"))
    await pool.close()
    assert "shutting down" in await running
    assert "shutting down" in await waiting


async def test_closing_the_pool_ends_its_workers_even_in_the_middle_of_a_job(monkeypatch):
    monkeypatch.setattr("services.aggregation.workers.END_S", 0.1)
    pool = stand_ins(limits())
    await pool.start()
    pid = int(await pool.run(b"pid\n"))
    running = asyncio.ensure_future(failure(pool.run(b"hang\n")))
    await asyncio.sleep(0.05)
    await pool.close()
    await running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_closed_pool_refuses_jobs(pool):
    await pool.close()
    assert "shutting down" in await failure(pool.run(b"hello\n"))


async def test_workers_limit_the_threads_of_linear_algebra(pool):
    assert await pool.run(b"threads\n") == b"1\n"


async def test_a_worker_that_does_not_start_fails_the_start_of_the_pool():
    pool = WorkerPool(limits(workers=2), {}, [sys.executable, "-c", "raise SystemExit(1)"])
    await failure(pool.start())


async def test_a_caller_that_leaves_does_not_disturb_the_next_job(pool):
    leaving = asyncio.ensure_future(pool.run(b"first\n"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await pool.run(b"second\n") == b"said second\n"


async def test_jobs_that_are_only_spread_come_after_all_others_and_reach_every_worker():
    pool = stand_ins(limits(workers=2))
    await pool.start()
    pids = set()
    for _ in range(100):
        pids |= set(await pool.spread(b"pid\n"))
        if len(pids) == 2:
            break
    assert len(pids) == 2
    await pool.close()


async def test_spread_jobs_wait_for_those_that_somebody_waits_for(pool):
    order = []

    async def noted(name, call):
        await call
        order.append(name)

    await asyncio.gather(
        noted("first", pool.run(b"one\n")),
        noted("spread", pool.spread(b"two\n")),
        noted("last", pool.run(b"three\n")),
    )
    assert order == ["first", "last", "spread"]


@pytest.mark.parametrize("job", [b"die\n", b"half\n"])
async def test_a_worker_that_dies_helping_costs_nobody_anything(pool, job):
    assert await pool.spread(job) == []
    assert await pool.run(b"hello\n") == b"said hello\n"
