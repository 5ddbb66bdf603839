"""Metrics of an agent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shelora.protocol import Stage
from shelora.telemetry.metrics import counter

TRAINING_STEPS: Final = counter("agent_training_steps_total", "Optimizer steps done.")
STAGE_SECONDS: Final = counter(
    "agent_stage_seconds_total",
    "Seconds spent in a stage.",
    {"stage": tuple(stage for stage in Stage if stage not in {Stage.IDLE, Stage.PAUSED})},
)
BYTES: Final = counter("agent_transfer_bytes_total", "Bytes of shards moved.", {"direction": ("up", "down")})
ROUNDS: Final = counter(
    "agent_updates_total", "Updates, by what became of them.", {"outcome": ("committed", "dropped")}
)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._started


@contextmanager
def timed(stage: Stage) -> Iterator[Stopwatch]:
    """Counts the seconds of the block for its stage, also if it fails."""
    watch = Stopwatch()
    try:
        yield watch
    finally:
        STAGE_SECONDS.labels(stage=stage.value).inc(watch.seconds)
