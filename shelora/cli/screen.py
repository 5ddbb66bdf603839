"""A federation while it runs: redrawn in one place on a terminal, a line for every change elsewhere."""

import time
from types import TracebackType
from typing import Final, Self

from rich.live import Live

from shelora.cli.render import federation_view
from shelora.terminal import Terminal
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import status_line

PAUSE_S: Final = 10.0
"""Seconds between two lines that differ in how far a stage is."""


class FederationScreen:
    """Shows a federation again and again. A context manager.

    Args:
        console: Where.
        transient: Removes the last view from a terminal at the end.
    """

    def __init__(self, console: Terminal, *, transient: bool = False) -> None:
        self._console = console
        self._live = Live(console=console, transient=transient) if console.is_terminal else None
        self._told = ""
        self._stage: tuple[int, ...] = ()
        self._due_s = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, federation: pb.Federation) -> None:
        """Its present state."""
        if self._live is not None:
            self._live.update(federation_view(federation))
            return
        line, stage, now_s = status_line(federation), _stage(federation), time.monotonic()
        if line != self._told and (stage != self._stage or now_s >= self._due_s):
            self._console.say(line)
            self._told, self._stage, self._due_s = line, stage, now_s + PAUSE_S


def _stage(federation: pb.Federation) -> tuple[int, ...]:
    """Differs from one stage to the next, not within one."""
    current = federation.current
    return (federation.phase, federation.epoch, current.kind, current.number, current.attempt, current.state)
