"""How a driver behaves."""

from dataclasses import dataclass

from coordinator.liveness import USUAL, Liveness


@dataclass(frozen=True, kw_only=True)
class DriverPolicy:
    """How a driver behaves; times in seconds."""

    liveness: Liveness = USUAL
    """When a silent member counts as gone."""
    tick_s: float = 2.0
    """Longest time between two looks at a federation, for what no notification announces: silence."""
    lease_s: float = 15.0
    """Time after which another driver takes over from one that died."""
    concurrency: int = 4
    """Shards of a round aggregated at once."""
    result_ttl_s: int = 7 * 86_400
    """Time that aggregation keeps a round, its result included, beyond the deadlines of all attempts at the next two.
    A safety net: what is not needed any more is deleted by name."""
