"""A worker process: `python -m services.aggregation.worker`. One job a line on standard input, one answer a line out.

It reads shards from Redis and stores the result there, so that no bulk passes the service. It ends when its standard
input does, even in the middle of a job: the service that started it is gone, and a job can be repeated.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import BinaryIO, Final

import structlog

from services.aggregation.answers import HELP, READY, helped_line, refused_line, stored_line
from services.aggregation.records import AggregationRequest, ShardSlot, StoredResult
from services.aggregation.sharing import helped, led
from services.aggregation.store import WorkerStore, connect_worker
from shelora.errors import DomainError, Reason
from shelora.lora.aggregate import Aggregation
from shelora.telemetry.logs import configure_logs

REDIS_URL: Final = "SHELORA_AGGREGATION_REDIS_URL"
REDIS_TIMEOUT_S: Final = "SHELORA_AGGREGATION_REDIS_TIMEOUT_S"
LOG_LEVEL: Final = "SHELORA_AGGREGATION_LOG_LEVEL"
LOG_JSON: Final = "SHELORA_AGGREGATION_LOG_JSON"
"""The pool sets these from the service's settings. In the environment, not in the arguments, which anyone can read."""

KEPT_BYTES: Final = 64 * 2**20
"""Contributions a worker keeps while it aggregates a shard; memory does not grow with the cohort beyond."""

_log = structlog.get_logger(__name__)


def main() -> None:
    """Serves jobs until standard input ends."""
    # Ctrl-C, closing terminals and service managers signal the whole group; the service drains, then ends our input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    configure_logs(
        "aggregation-worker", os.environ.get(LOG_LEVEL, "INFO"), json=os.environ.get(LOG_JSON) == "true"
    )
    store = connect_worker(os.environ[REDIS_URL], timeout_s=float(os.environ.get(REDIS_TIMEOUT_S, "30")))
    answers = _private_stdout()
    lines = _lines_until_exit(sys.stdin.buffer, os._exit)
    answers.write(READY)
    while True:
        answers.write(answer(store, lines.get()))


def answer(store: WorkerStore, line: bytes) -> bytes:
    """The answer to one job. Every failure is one."""
    try:
        if line.startswith(HELP):
            return helped_line(help_with(store, AggregationRequest.from_line(line[len(HELP) :])))
        return stored_line(run(store, AggregationRequest.from_line(line)))
    except DomainError as error:
        return refused_line(error)
    except MemoryError:
        return refused_line(DomainError(Reason.WORKER_FAILED, "the worker ran out of memory; try again"))
    except Exception:  # noqa: BLE001 - the boundary of the process; the same job would fail in the same way again
        _log.exception("job_failed_unexpectedly")
        return refused_line(DomainError(Reason.INTERNAL, "the shard could not be aggregated"))


def run(store: WorkerStore, request: AggregationRequest) -> StoredResult:
    """Aggregates one shard and stores the result. Raises what AggregateShard names."""
    start_s, helped_s = time.process_time(), 0.0
    work = _work(store, request)
    if work.parts > 1:
        data, helped_s = led(store, request, work)
    else:
        data = work.whole()
    result = store.publish(request, data, time.process_time() - start_s + helped_s)
    if work.parts > 1:
        store.forget_parts(request, work.parts)
    return result


def help_with(store: WorkerStore, request: AggregationRequest) -> int:
    """Makes parts of a shard that another worker aggregates. Returns how many. Raises as `run`."""
    return helped(store, request, _work(store, request)) if store.is_wanted(request) else 0


def _work(store: WorkerStore, request: AggregationRequest) -> Aggregation:
    layout = store.layout(request.round_id)
    contributions = [part.contribution for part in request.contributions]
    return Aggregation(layout, request.shard, contributions, _Updates(store, request).load)


class _Updates:
    """Reads the contributions to a request. Keeps the first that fit KEPT_BYTES: each is read more than once."""

    def __init__(self, store: WorkerStore, request: AggregationRequest) -> None:
        self._store = store
        self._request = request
        self._digests = {part.client_id: part.sha256 for part in request.contributions}
        self._kept: dict[str, bytes] = {}
        self._room = KEPT_BYTES

    def load(self, client_id: str) -> bytes:
        """A client's checked shard. Raises SHARD_MISSING."""
        if client_id in self._kept:
            return self._kept[client_id]
        slot = ShardSlot(self._request.round_id, client_id, self._request.shard)
        data = self._store.update(slot, self._digests[client_id])
        if len(data) <= self._room:
            self._room -= len(data)
            self._kept[client_id] = data
        return data


def _private_stdout() -> BinaryIO:
    """The pipe to the pool, for answers only: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _lines_until_exit(stream: BinaryIO, leave: Callable[[int], object]) -> SimpleQueue[bytes]:
    """The lines of a stream, as a thread reads them; at its end `leave(0)`, whatever the main thread does."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        leave(0)

    threading.Thread(target=read, name="jobs", daemon=True).start()
    return lines


if __name__ == "__main__":
    main()
