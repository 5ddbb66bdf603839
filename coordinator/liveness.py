"""How often members say that they are alive, and when one that is silent counts as gone."""

from dataclasses import dataclass
from typing import Final

BEATS: Final = 6
"""Heartbeats that a member may miss before it counts as gone."""


@dataclass(frozen=True)
class Liveness:
    """The pace of heartbeats, slower for large federations, so that they never are what a coordinator does most.

    Attributes:
        alive_s: Seconds of silence after which a member counts as gone, in a federation that is not large.
        heartbeats_per_s: Heartbeats a second of one federation beyond which its members are slowed down.
    """

    alive_s: float = 30.0
    heartbeats_per_s: float = 50.0

    def interval_s(self, members: int) -> float:
        """Seconds from a heartbeat to the next."""
        return max(self.alive_s / BEATS, members / self.heartbeats_per_s)

    def patience_s(self, members: int) -> float:
        """Seconds of silence after which a member counts as gone."""
        return BEATS * self.interval_s(members)


USUAL: Final = Liveness()
