"""What an agent is doing, and the way to stop it: shared between the event loop and the worker thread."""

import threading
from dataclasses import dataclass

import structlog

from shelora.protocol import Stage

_log = structlog.get_logger(__name__)


class Stopped(Exception):  # noqa: N818 - not an error: the work was no longer wanted
    """Raised inside work that was asked to stop."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage and how far it got, 0 to 1."""

    stage: Stage = Stage.IDLE
    fraction: float = 0.0


class Activity:
    """One assignment's work. Thread-safe: the worker reports, the event loop reads and stops."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._progress = Progress()

    @property
    def progress(self) -> Progress:
        """The latest report."""
        return self._progress

    def stop(self) -> None:
        """Makes the next report raise Stopped. May be called again."""
        self._stop.set()

    def pause(self, seconds: float) -> None:
        """Waits in the worker thread, saying so. Raises: Stopped, at once, if the work is no longer wanted."""
        self.report(Stage.PAUSED, self._progress.fraction)
        if self._stop.wait(seconds):
            raise Stopped

    def await_retry(self) -> None:
        """Notes that the work waits to be tried again."""
        self._progress = Progress(Stage.PAUSED, self._progress.fraction)

    def report(self, stage: Stage, fraction: float) -> None:
        """Notes progress. Raises: Stopped if the work is no longer wanted."""
        if self._stop.is_set():
            raise Stopped
        if stage is not self._progress.stage:
            _log.debug("stage", stage=stage.value)
        self._progress = Progress(stage, min(1.0, max(0.0, fraction)))
