"""What the page's process remembers of members since it watches: nobody else keeps a history of connections."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shelora.v1 import coordinator_pb2 as pb
from shelora.view import SILENT_MS

SAMPLES: Final = 48
"""Samples of a connection that are kept, the newest."""
SAMPLE_S: Final = 10.0
"""Seconds between two of them."""
MAX_MEMBERS: Final = 20_000
"""Members remembered at most, in all federations; those heard of longest ago are forgotten."""


@dataclass(kw_only=True)
class _Remembered:
    heard: deque[bool] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    sampled_s: float = -1e9
    worst: bool = True
    """Whether it was heard of all the time since the last sample."""
    round_id: str = ""
    sent_s: float | None = None
    """When its update of that round was first seen; None if it was there before the page watched."""


class PresenceHistory:
    """Connection samples and times of updates, by federation and member. Bounded."""

    def __init__(self) -> None:
        self._members: OrderedDict[tuple[str, str], _Remembered] = OrderedDict()
        self._watched: dict[str, str] = {}

    def note(self, federation: pb.Federation, now_s: float) -> None:
        """Takes what the coordinator says now.

        Args:
            federation: With its members and its current round.
            now_s: Of a clock that only goes forward.
        """
        name, current = federation.federation_id, federation.current
        seen_before = self._watched.get(name) == current.round_id
        sent = {report.client_id for report in current.updates}
        for member in federation.members:
            one = self._member(name, member.client_id)
            one.worst &= member.idle_ms <= SILENT_MS
            if now_s - one.sampled_s >= SAMPLE_S:
                one.heard.append(one.worst)
                one.sampled_s, one.worst = now_s, True
            if member.client_id in sent and one.round_id != current.round_id:
                one.round_id, one.sent_s = current.round_id, now_s if seen_before else None
        self._watched[name] = current.round_id

    def heard(self, federation: str, client: str) -> Sequence[bool]:
        """Whether it was connected, sample by sample, oldest first."""
        one = self._members.get((federation, client))
        return tuple(one.heard) if one else ()

    def sent_s(self, federation: str, client: str, round_id: str) -> float | None:
        """When its update of that round arrived; None if that was before the page watched the round."""
        one = self._members.get((federation, client))
        return one.sent_s if one and one.round_id == round_id else None

    def keep(self, federations: Sequence[str]) -> None:
        """Forgets all other federations."""
        for gone in self._watched.keys() - set(federations):
            del self._watched[gone]
            for key in [key for key in self._members if key[0] == gone]:
                del self._members[key]

    def _member(self, federation: str, client: str) -> _Remembered:
        key = (federation, client)
        one = self._members.setdefault(key, _Remembered())
        self._members.move_to_end(key)
        while len(self._members) > MAX_MEMBERS:
            self._members.popitem(last=False)
        return one
