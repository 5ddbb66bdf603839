"""A pool of worker processes that outlives any of them.

Processes, since the SEAL binding holds the interpreter lock; pipes and lines of JSON, so that a worker can be killed
in the middle of anything and nothing it says is ever more than text.
"""

import asyncio
import itertools
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from services.aggregation import metrics
from services.aggregation.answers import READY
from shelora.errors import DomainError, Reason

COMMAND: Final = (sys.executable, "-P", "-m", "services.aggregation.worker")
"""`-P`: never another package of that name, which may lie where the server was started."""

START_S: Final = 120.0
"""Time for a worker to import its libraries on a busy machine."""

END_S: Final = 5.0
"""Time for a worker to end after its input did."""

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
"""Pauses between attempts to start a worker that does not start, doubling: neither busy loops nor long outages."""

ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps up to 256 MiB of freed memory in a worker: by default every large array is mapped, and its pages cleared,
anew, a sixth of the CPU time of an aggregation."""
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Size of a pool and patience with it."""

    workers: int
    """Processes."""
    threads: int
    """Threads that linear algebra may use in each."""
    queue: int
    """Jobs that may wait."""
    job_timeout_s: float
    """Seconds after which a job fails and its worker is replaced."""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class _Job:
    spare: bool
    """Whether everything else comes first."""
    number: int
    line: bytes = field(compare=False)
    answer: "asyncio.Future[bytes]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future(), compare=False
    )


class WorkerPool:
    """Runs jobs, one at a time in each worker, in the order they came; those that are only spread, last."""

    def __init__(
        self, limits: PoolLimits, environment: Mapping[str, str], command: Sequence[str] = COMMAND
    ) -> None:
        """Takes what the workers find in their environment besides our own."""
        self._limits = limits
        self._command = command
        threads = dict.fromkeys(_THREAD_VARIABLES, str(limits.threads))
        self._environment = {**os.environ, **ALLOCATOR, **threads, **environment}
        self._queue: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue(limits.queue)
        self._numbers = itertools.count()
        self._slots: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Starts the workers and waits until they are ready. Raises WORKER_FAILED if one does not start."""
        starting = (_Worker.start(self._command, self._environment) for _ in range(self._limits.workers))
        started = await asyncio.gather(*starting, return_exceptions=True)
        workers = [worker for worker in started if isinstance(worker, _Worker)]
        self._slots = [asyncio.create_task(self._serve(w), name=f"worker-{i}") for i, w in enumerate(workers)]
        for failure in started:
            if isinstance(failure, BaseException):
                await self.close()
                raise failure

    async def run(self, line: bytes) -> bytes:
        """A worker's answer to a job.

        Raises: WORKER_FAILED if the worker died or took too long, if too many jobs wait, or if the pool is closed.
        """
        return await self._queued(line, spare=False)

    async def spread(self, line: bytes) -> list[bytes]:
        """Answers of the workers that had time for a job: one that each may do, and none needs to."""
        jobs = (self._queued(line, spare=True) for _ in range(self._limits.workers))
        answers = await asyncio.gather(*jobs, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, bytes)]

    async def _queued(self, line: bytes, *, spare: bool) -> bytes:
        if self._closed:
            raise _closing()
        job = _Job(spare=spare, number=next(self._numbers), line=line)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            raise _failed("too many shards wait for this replica's workers") from None
        metrics.QUEUED.set(self._queue.qsize())
        return await job.answer

    async def close(self) -> None:
        """Ends the workers; jobs that wait or run fail with WORKER_FAILED."""
        self._closed = True
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), _closing())
        metrics.QUEUED.set(0)

    async def _serve(self, worker: "_Worker") -> None:
        """One place in the pool: gives jobs to a worker, and replaces it when it is gone."""
        try:
            while True:
                job = await self._queue.get()
                metrics.QUEUED.set(self._queue.qsize())
                if not worker.alive:
                    worker = await self._replacement(worker)
                await self._exchange(worker, job)
        finally:
            await worker.close()

    async def _exchange(self, worker: "_Worker", job: _Job) -> None:
        """Sends a job and hands on the answer, or the failure."""
        try:
            with metrics.SHARD_SECONDS.time():
                answer = await worker.exchange(job.line, self._limits.job_timeout_s)
        except DomainError as error:
            _log.warning("worker_failed", pid=worker.pid, reason=error.message)
            _fail(job, error)
        except asyncio.CancelledError:
            _fail(job, _closing())
            raise
        else:
            if not job.answer.done():
                job.answer.set_result(answer)

    async def _replacement(self, worker: "_Worker") -> "_Worker":
        """A new worker for one that is gone; tries until one starts."""
        await worker.close()
        metrics.REPLACED.inc()
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await _Worker.start(self._command, self._environment)
            except DomainError as error:
                _log.error("worker_does_not_start", reason=error.message, pause_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Worker:
    """One worker process."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._jobs, self._answers = process.stdin, process.stdout
        self._given_up = False
        metrics.WORKERS.inc()

    @property
    def alive(self) -> bool:
        """False once it has died, as far as is known, or must not get another job."""
        return not (self._given_up or self._answers.at_eof() or self._process.returncode is not None)

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> "_Worker":
        """Starts a process and waits until it is ready. Raises WORKER_FAILED."""
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
        worker = cls(process)
        try:
            await worker._expect(READY)
        except BaseException:
            await worker.close()
            raise
        return worker

    async def _expect(self, line: bytes) -> None:
        """Raises WORKER_FAILED if its next line is another one."""
        if await self._line(START_S) != line:
            raise _failed("the worker did not start")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def exchange(self, line: bytes, timeout_s: float) -> bytes:
        """Its answer to a job. Raises WORKER_FAILED; the worker is not alive then."""
        try:
            self._jobs.write(line)
            await self._jobs.drain()
        except OSError:
            self._given_up = True
            raise _failed("the worker process had died") from None
        return await self._line(timeout_s)

    async def close(self) -> None:
        """Ends the process: it leaves when its input ends, and is killed if it does not."""
        self._given_up = True
        self._jobs.close()
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            self._kill()
            await self._process.wait()
        metrics.WORKERS.dec()

    async def _line(self, timeout_s: float) -> bytes:
        """The next line it writes. Raises WORKER_FAILED; the worker is not alive then."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._answers.readline()
        except TimeoutError:
            self._given_up = True
            self._kill()
            raise _failed(f"the worker took longer than {timeout_s:g} s") from None
        if not line.endswith(b"\n"):
            self._given_up = True
            raise _failed("the worker process died")
        return line

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()


def _failed(message: str) -> DomainError:
    return DomainError(Reason.WORKER_FAILED, f"{message}; try again")


def _closing() -> DomainError:
    return _failed("the service is shutting down")


def _fail(job: _Job, error: DomainError) -> None:
    """Fails a job; nothing if its caller is gone."""
    if not job.answer.done():
        job.answer.set_exception(error)
