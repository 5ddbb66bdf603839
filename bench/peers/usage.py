"""Memory and CPU of trees of processes, read from /proc while they run. Linux."""

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PERIOD_S: Final = 0.5
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_Key = tuple[int, int]
"""A process: its number and when it started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    """What /proc/PID/stat says of a process."""

    key: _Key
    parent: int
    cpu_s: float
    """Its own, and that of children that it has waited for."""
    rss_bytes: int


@dataclass
class Tree:
    """A process that was started here, and all that came of it, also what has lost its parent since."""

    root: int
    known: set[_Key] = field(default_factory=set)
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What the trees of a role used."""

    peak_bytes: int
    """Resident, of all of them at one moment."""
    cpu_s: float


class Usage:
    """Samples by role."""

    def __init__(self) -> None:
        self._trees: defaultdict[str, list[Tree]] = defaultdict(list)
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, role: str, pid: int) -> None:
        """A process that was just started."""
        with self._lock:
            self._trees[role].append(Tree(pid))

    def spent(self, role: str) -> Spent:
        """So far."""
        with self._lock:
            return Spent(self._peaks[role], sum(tree.cpu_s for tree in self._trees[role]))

    def sample(self) -> None:
        """Looks at all processes of the machine once."""
        found = {stat.key[0]: stat for stat in _stats()}
        with self._lock:
            for role, trees in self._trees.items():
                self._peaks[role] = max(self._peaks[role], sum(_look(tree, found) for tree in trees))


def _look(tree: Tree, found: dict[int, _Stat]) -> int:
    """Notes a tree's CPU. Returns its resident bytes."""
    living = [stat for stat in found.values() if stat.key in tree.known or _descends(stat, tree, found)]
    tree.known.update(stat.key for stat in living)
    tree.cpu_s = max(tree.cpu_s, sum(stat.cpu_s for stat in living))
    return sum(stat.rss_bytes for stat in living)


def _descends(stat: _Stat, tree: Tree, found: dict[int, _Stat]) -> bool:
    current: _Stat | None = stat
    while current is not None:
        if current.key[0] == tree.root or current.key in tree.known:
            return True
        current = found.get(current.parent)
    return False


def _stats() -> Iterator[_Stat]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            continue  # it has ended
        fields = text.rpartition(")")[2].split()
        pid = int(path.parent.name)
        yield _Stat(
            key=(pid, int(fields[19])),
            parent=int(fields[1]),
            cpu_s=sum(map(int, fields[11:15])) / _TICKS,
            rss_bytes=int(fields[21]) * _PAGE,
        )


@contextmanager
def sampled(period_s: float = PERIOD_S) -> Iterator[Usage]:
    """Samples from a thread of its own until the block ends."""
    usage, stop = Usage(), threading.Event()

    def work() -> None:
        while not stop.wait(period_s):
            usage.sample()

    thread = threading.Thread(target=work, name="usage", daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        stop.set()
        thread.join()
