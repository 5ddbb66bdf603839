"""Runs a schedule: a seed and a list of faults decide everything that happens."""

import asyncio
import gc
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

import structlog

import coordinator.main
from shelora.committee.rules import committee_rule
from tests.simulation.cluster import Cluster, Size
from tests.simulation.faults import Chance, Fault, Faults
from tests.simulation.liars import CHEATS, LIARS, SPOILERS, dishonest
from tests.simulation.loop import Deadlock, VirtualLoop
from tests.simulation.observer import shown
from tests.simulation.parties import PARTIES
from tests.simulation.processes import CURRENT, Crashed
from tests.simulation.witness import witnessed

HORIZON_S: Final = 1200.0
"""Virtual seconds after which a federation that has not ended hangs: all attempts at all rounds take less than half."""
REST_S: Final = 30.0
"""Virtual seconds after the end and the last fault until everything must be cleaned up and every lease given back."""
_SHM: Final = Path("/dev/shm")
_UNREPEATABLE: Final = frozenset({"cpu_s", "fingerprint", "folder", "key_id"})
"""Fields of log records that differ from run to run. SEAL draws keys and errors of its own, agents theirs."""
_DIGEST: Final = re.compile(r"\b[0-9a-f]{64}\b")
"""SHA-256 of ciphertexts, among others."""


@dataclass(frozen=True)
class Schedule:
    """What happens in a run."""

    seed: int
    size: Size
    faults: tuple[Fault, ...] | None = None
    """The only faults; None to draw them from the seed."""
    kinds: tuple[str, ...] = ()
    """Of the faults that are drawn, of `faults.KINDS`; none for what the seed chooses."""

    @classmethod
    def of(cls, seed: int, *kinds: str) -> "Schedule":
        """The schedule of a seed."""
        rng = Random(f"{seed}/size")
        clients = rng.choice((2, 3, 3))
        size = Size(
            clients=clients,
            rounds=rng.choice((1, 2, 2)),
            min_updates=rng.randint(2, clients),
            deadline_s=rng.choice((10, 30, 60)),
            max_attempts=rng.choice((1, 3, 5)),
        )
        size = _protected(size, Random(f"{seed}/protection"))
        return cls(seed, _peopled(size, Random(f"{seed}/people")), kinds=kinds)

    def with_only(self, faults: Sequence[Fault]) -> "Schedule":
        return replace(self, faults=tuple(faults))


def _protected(size: Size, rng: Random) -> Size:
    """Two thirds of the federations are in complete mode; some of the others vote again, or get new keys."""
    if rng.random() < 2 / 3:
        clients = rng.choice((2, 3, 4, 5, 5, 7))
        return replace(
            size,
            complete=True,
            clients=clients,
            min_updates=rng.randint(2, min(3, clients)),
            key_rotation=rng.randint(0, 1),
            committee_s=rng.choice((5, 15)),
        )
    negotiation = rng.choice(("", "", "sealed", "ope"))
    if not negotiation:
        return size
    return replace(
        size, negotiation=negotiation, replan_every=rng.randint(0, 1), key_rotation=rng.randint(0, 1)
    )


def _peopled(size: Size, rng: Random) -> Size:
    """Some federations have a hostile member that the others can do without, or an operator with afterthoughts.

    In half of those in complete mode up to as many clients lie as their committee withstands; in a third, coordinators
    cheat.
    """
    spare = size.clients > size.min_updates
    hostile = rng.choice(("", "", *PARTIES)) if spare else ""
    orders = rng.choice(((), (), ("stop",), ("extend",), ("delete",), ("stop", "extend")))
    size = replace(size, orders=orders)
    if not size.complete:
        return replace(size, hostile=hostile)
    size = replace(size, coordinators=rng.choice((*[""] * 2 * len(CHEATS), *CHEATS)))
    if rng.random() < 0.5:
        return replace(size, hostile=hostile)
    count = rng.randint(1, committee_rule(size.clients).threshold)
    kinds = rng.choices(sorted(LIARS | SPOILERS), k=count)
    return replace(size, liars=tuple(zip(sorted(rng.sample(size.agents, count)), kinds, strict=True)))


@dataclass(frozen=True)
class Report:
    """What came of a run."""

    schedule: Schedule
    violation: str
    """What does not hold; "" if everything does."""
    phase: str
    """Of the federation, at the end."""
    met: tuple[Fault, ...]
    """The faults that took place."""
    virtual_s: float
    trace: list[str] = field(repr=False, default_factory=list)


def run(schedule: Schedule, *, traced: bool = False) -> Report:
    """Runs a schedule to its end. The same schedule gives the same report; `traced` fills its trace."""
    trace: list[str] = []
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="shelora-simulation-", dir=_SHM if _SHM.is_dir() else None))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        loop = stack.enter_context(_loop())
        chance = (
            Chance(Random(f"{schedule.seed}/faults"), schedule.kinds) if schedule.faults is None else None
        )
        faults = Faults(schedule.faults or (), chance, loop.time)

        def log(who: str, what: str) -> None:
            if traced:
                trace.append(f"{loop.now_s:10.4f}  {who:<14} {_DIGEST.sub('...', what)}")

        cluster = Cluster(loop, str(schedule.seed), faults, schedule.size, folder, log)
        stack.callback(cluster.close)
        stack.enter_context(witnessed(cluster.witness))
        stack.enter_context(dishonest(dict(schedule.size.liars), schedule.size.coordinators))
        stack.enter_context(_surroundings(loop, schedule.seed, cluster, log, 20 if traced else 40))
        try:
            loop.run_until_complete(_play(loop, cluster, faults))
        except Deadlock:
            cluster.violated("nobody will ever do anything again")
        violation = cluster.violation.result() if cluster.violation.done() else ""
        met = tuple(faults.met)
        federation = cluster.observer.federation
        return Report(schedule, violation, federation.phase if federation else "", met, loop.now_s, trace)


async def _play(loop: VirtualLoop, cluster: Cluster, faults: Faults) -> None:
    cluster.start()
    while not cluster.ended and loop.now_s < HORIZON_S and not cluster.violation.done():
        await asyncio.wait([cluster.violation], timeout=1.0)
    if cluster.violation.done():
        return
    if not cluster.ended:
        cluster.violated(
            f"after {HORIZON_S:g} s the federation has not ended everywhere: {shown(cluster.observer.federation)}; "
            f"agents: {cluster.outcomes}"
        )
        return
    ended_s = loop.now_s
    while (left_s := max(ended_s, faults.over_s) + REST_S - loop.now_s) > 0 and not cluster.violation.done():
        await asyncio.wait([cluster.violation], timeout=left_s)
    cluster.observer.at_the_end(cluster.epochs)


@contextmanager
def _loop() -> Iterator[VirtualLoop]:
    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        process = CURRENT.get(None)

        def alive(*args: Any) -> Any:
            if process is not None and process.dead:
                raise Crashed
            return call(*args)

        return alive

    def thread_s() -> float:
        process = CURRENT.get(None)
        return process.thread_s() if process else 0.001

    def owned(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=loop, **options)
        context = options.get("context")
        process = context.get(CURRENT) if context is not None else CURRENT.get(None)
        if process is not None:
            process.owns(task)
        return task

    loop = VirtualLoop(thread_s, guarded)
    loop.set_task_factory(owned)
    collecting = gc.isenabled()
    gc.disable()  # a collection would end abandoned generators at a time of its own
    try:
        yield loop
    finally:
        _end(loop)
        if collecting:
            gc.enable()


def _end(loop: VirtualLoop) -> None:
    """Ends what is still running. Nothing it does on its way out is looked at."""
    loop.set_exception_handler(lambda _loop, _context: None)
    for _ in range(20):
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=0.1))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@contextmanager
def _surroundings(
    loop: VirtualLoop, seed: int, cluster: Cluster, log: Callable[[str, str], None], level: int
) -> Iterator[None]:
    """Clock, chance, connections and logs of product code."""

    def unhandled(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        if not _is_crash(error):
            cluster.violated(f"unhandled: {context.get('message')}: {error!r}")

    def traced(_logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        process = CURRENT.get(None)
        if event.pop("exc_info", None):
            cluster.violated(f"{process.name if process else ''}: unexpected error: {event}")
        name = event.pop("event")
        details = " ".join(f"{key}={value}" for key, value in event.items() if key not in _UNREPEATABLE)
        log(process.name if process else "", f"{method} {name} {details}")
        raise structlog.DropEvent

    before, state = structlog.get_config(), random.getstate()
    random.seed(seed)
    loop.set_exception_handler(unhandled)
    structlog.configure(
        processors=[traced],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    try:
        with (
            mock.patch.object(time, "monotonic", loop.time),
            mock.patch.object(secrets, "token_hex", lambda size: _token(size).hex()),
            mock.patch.object(secrets, "token_bytes", new=_token),
            mock.patch.object(coordinator.main, "now_ms", new=_now_ms),
        ):
            yield
    finally:
        structlog.configure(**before)
        random.setstate(state)


def _now_ms() -> int:
    return CURRENT.get().clock_ms()


def _token(size: int) -> bytes:
    return CURRENT.get().rng.randbytes(size)


def _is_crash(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_crash(part) for part in error.exceptions)
    return isinstance(error, Crashed)
