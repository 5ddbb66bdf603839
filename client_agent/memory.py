"""What a round's work needs of memory, and what this process may still take: of the machine, of its control groups.

Protecting and restoring go shard by shard, so they need a few times the largest shard, whatever the model; training
needs a few times what it trains. Activations are not in the estimate: `client-agent doctor` measures them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from client_agent.learning import LocalModel, weight_bytes
from shelora.errors import DomainError, Reason
from shelora.lora.kinds import kind_of, largest_update_bytes
from shelora.lora.layout import Layout

WEIGHT_COPIES: Final = 6
"""Times what is trained: its gradient and AdamW's two moments, the state before and after, one set being written."""
MOMENT_SIZES: Final = 3
"""Sizes of a set of weights that holds what AdamW estimated beside each value (`training.optimizer_state: keep`)."""
FIXED_BYTES: Final = 4 * 2**20
"""For what does not grow with shards: pieces on their way, ciphertexts being handled."""

_PROCESS_GROUPS: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")
_FILES: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and of version 1: limit, use, and what of memory.stat the kernel gives back before it kills."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, without swap."""

    total: int
    """Most that this process may ever use."""
    free: int
    """What it may take in addition now."""


def update_bytes(layout: Layout, rank: int) -> int:
    """Bytes of memory that protecting an update of that rank takes at most."""
    own = replace(layout, max_rank=min(layout.max_rank, rank))
    sizes = zip(own.shards, largest_update_bytes(own), strict=True)
    return max((kind_of(shard).protect_copies * size for shard, size in sizes), default=0)


def result_bytes(layout: Layout, shard_bytes: Sequence[int]) -> int:
    """Bytes of memory that restoring a result takes at most, by the bytes of its shards."""
    sizes = zip(layout.shards, shard_bytes, strict=True)
    return max((kind_of(shard).restore_copies * size for shard, size in sizes), default=0)


def round_bytes(
    model: LocalModel, update: Layout | None, restoring: int = 0, *, keeps_moments: bool = False
) -> int:
    """Bytes of memory that a round's work takes at most beside the model that is loaded, and beside activations.

    Args:
        model: What is trained.
        update: Layout of the update that follows; None if none does.
        restoring: `result_bytes` of the result to apply; 0 if there is none.
        keeps_moments: Whether the optimizer goes on from round to round.
    """
    protecting = update_bytes(update, model.rank) if update else 0
    return (
        max(protecting, restoring)
        + weight_copies(keeps_moments=keeps_moments) * weight_bytes(model)
        + FIXED_BYTES
    )


def weight_copies(*, keeps_moments: bool) -> int:
    """Times that what is trained lies in memory; each state, and the set being written, holds moments that are kept."""
    return WEIGHT_COPIES + (3 * (MOMENT_SIZES - 1) if keeps_moments else 0)


def require_memory(needed: int, look: Callable[[], Memory] | None = None) -> None:
    """Raises: DomainError MEMORY_UNAVAILABLE unless `needed` bytes are free: better to wait than to be killed."""
    free = (look or memory_here)().free
    if free < needed:
        raise DomainError(
            Reason.MEMORY_UNAVAILABLE,
            f"{free / 1e6:,.1f} MB of memory are free for this process, and the work at hand may take "
            f"{needed / 1e6:,.1f} MB: end other programs, raise the limit of its service or container (MemoryMax), "
            "lower lora.rank, or ask the operator for fewer target_modules",
        )


def memory_here(process_groups: Path = _PROCESS_GROUPS, groups: Path = _GROUPS) -> Memory:
    """What the machine allows this process, and every control group around it: services and containers have limits."""
    machine = psutil.virtual_memory()
    found = [Memory(machine.total, machine.available), *_limits(process_groups, groups)]
    return Memory(min(memory.total for memory in found), max(0, min(memory.free for memory in found)))


def _limits(process_groups: Path, groups: Path) -> Iterator[Memory]:
    for folder in _folders(process_groups, groups):
        for limit, used, reclaimable in _FILES:
            try:
                total = int((folder / limit).read_text())
                in_use = int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield Memory(total, total - in_use + int(stat.get(reclaimable, 0)))
            except (OSError, ValueError):  # no such file, or no limit: "max"
                continue


def _folders(process_groups: Path, groups: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, and of those around them. In a container some are not there."""
    try:
        lines = process_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = groups / "memory" if controllers else groups
        own = Path(path.lstrip("/"))
        yield from (mount / part for part in (own, *own.parents))
