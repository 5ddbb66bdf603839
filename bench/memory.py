"""Memory that the complete mode takes by role: growth of the peak of resident memory, in a process of its own. Linux.

Factors are made as they are read, shards go to disk and come from it, so what grows is what the role itself holds.
What the roles before it freed is given back to the system first.
"""

import ctypes
import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

from bench.complete import LazyFactors, Round, Trained
from bench.workload import Workload

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes."""

    protecting: int
    """A client that sketches, encrypts and deals."""
    aggregating: int
    """A server that adds the shards."""
    restoring: int
    """A client that opens the sum and restores, without what it keeps of each matrix."""
    largest_shard: int


def measure(workload: Workload) -> Memory:
    """Runs a round in a new process, role after role."""
    return in_new_process(_measured, workload)


def in_new_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Its result, computed where nothing else has taken memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _measured(workload: Workload) -> Memory:
    with TemporaryDirectory() as name:
        folder, round_ = Path(name), Round(workload, 1)

        def protect(client: int) -> None:
            trained = Trained(factors=LazyFactors(workload, client))
            for index, data in enumerate(round_.protected(client, trained)):
                _update(folder, index, str(client)).write_bytes(data)

        def load(index: int, client: str) -> bytes:
            return _update(folder, index, client).read_bytes()

        def aggregate() -> None:
            for index, data in enumerate(round_.aggregated(load)):
                _result(folder, index).write_bytes(data)

        def restore() -> None:
            results = (_result(folder, index).read_bytes() for index in range(len(round_.layout.shards)))
            for _ in round_.restored(results, opening):
                pass

        protecting = max(grown(partial(protect, client)) for client in range(workload.clients))
        opening = round_.decided()
        return Memory(
            protecting=protecting,
            aggregating=grown(aggregate),
            restoring=grown(restore),
            largest_shard=max(path.stat().st_size for path in folder.iterdir()),
        )


def grown(action: Callable[[], None]) -> int:
    """By how much the peak of resident memory passes what is resident before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    peak = Path("/proc/self/clear_refs")
    if os.access(peak, os.W_OK):
        peak.write_text("5", encoding="ascii")  # the peak starts anew, from what is resident now
    before = _resident()
    action()
    return max(0, _peak() - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _peak() -> int:
    """Of this process, since `clear_refs` was written."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _update(folder: Path, index: int, client: str) -> Path:
    return folder / f"update-{index}-{client}"


def _result(folder: Path, index: int) -> Path:
    return folder / f"result-{index}"
