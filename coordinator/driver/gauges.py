"""Gauges of the federations that this process drives: members, newest epoch."""

from coordinator.metrics import KEY_EPOCH, MEMBERS


class Gauges:
    """Each is a sum, or the largest, over the driven federations."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[int, int]] = {}
        self._epochs: dict[str, int] = {}

    def members(self, federation_id: str, alive: int, silent: int) -> None:
        """Counts the members of a federation."""
        self._members[federation_id] = alive, silent
        self._show_members()

    def epoch(self, federation_id: str, epoch: int) -> None:
        """Counts the epoch of a federation; 0: it has no keys yet, or is not driven here any more."""
        self._epochs[federation_id] = epoch
        KEY_EPOCH.set(max(self._epochs.values()))
        if not epoch:
            del self._epochs[federation_id]

    def forget(self, federation_id: str) -> None:
        """A federation is not driven here any more."""
        self._members.pop(federation_id, None)
        self._show_members()
        self.epoch(federation_id, 0)

    def _show_members(self) -> None:
        MEMBERS.labels("alive").set(sum(alive for alive, _ in self._members.values()))
        MEMBERS.labels("silent").set(sum(silent for _, silent in self._members.values()))
