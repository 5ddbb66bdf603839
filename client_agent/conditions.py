"""When a device may compute. It can be configured to compute only while it is plugged in, or while its CPU is free."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import psutil
import structlog

from client_agent.config import ResourcesConfig
from client_agent.progress import Activity
from shelora.protocol import Stage

POLL_S: Final = 10.0
"""Seconds between two looks while the work is paused."""
SAMPLE_S: Final = 5.0
"""Least seconds over which the use of the CPU is measured."""

_log = structlog.get_logger(__name__)


class Device(Protocol):
    """What is asked of a device."""

    def charging(self) -> bool:
        """Whether it is plugged in, or has no battery."""

    def other_cpu(self) -> float:
        """Share of the CPU, 0 to 1, that other processes lately used."""


class Conditions:
    """Holds work back while the device is needed otherwise. For one worker thread."""

    def __init__(self, config: ResourcesConfig, device: Device | None = None, poll_s: float = POLL_S) -> None:
        self._config = config
        self._device = device or ThisDevice()
        self._poll_s = poll_s

    def report(self, activity: Activity, stage: Stage, fraction: float) -> None:
        """Notes progress, then waits as long as the device may not compute. Raises: Stopped."""
        activity.report(stage, fraction)
        if not (why := self.obstacle()):
            return
        _log.info("paused", why=why)
        while self.obstacle():
            activity.pause(self._poll_s)
        _log.info("resumed")
        activity.report(stage, fraction)

    def obstacle(self) -> str:
        """Why the device may not compute now; "" if it may."""
        if self._config.only_charging and not self._device.charging():
            return "the device runs on its battery (resources.only_charging)"
        limit = self._config.max_other_cpu
        if limit < 1 and (used := self._device.other_cpu()) > limit:
            return f"other processes use {used:.0%} of the CPU (resources.max_other_cpu is {limit:.0%})"
        return ""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds since the machine started."""

    all: float
    """Of all cores, idle or not."""
    busy: float
    own: float
    """Of this process."""

    def others_since(self, before: "CpuTimes") -> float:
        """Share of the CPU that other processes used in between, 0 to 1."""
        passed = self.all - before.all
        others = (self.busy - before.busy) - (self.own - before.own)
        return min(1.0, max(0.0, others / passed)) if passed > 0 else 0.0


class ThisDevice:
    """The machine that this process runs on."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, times: Callable[[], CpuTimes] | None = None
    ) -> None:
        self._clock = clock
        self._times = times or cpu_times
        self._seen_s = clock()
        self._seen = self._times()
        self._others = 0.0

    def charging(self) -> bool:
        battery = psutil.sensors_battery()
        return battery is None or battery.power_plugged is not False

    def other_cpu(self) -> float:
        """As measured over the last SAMPLE_S seconds or longer; 0 before anything was measured."""
        now = self._clock()
        if now - self._seen_s >= SAMPLE_S:
            times = self._times()
            self._others = times.others_since(self._seen)
            self._seen_s, self._seen = now, times
        return self._others


def cpu_times() -> CpuTimes:
    """What the operating system counts now."""
    system, own = psutil.cpu_times(), psutil.Process().cpu_times()
    everything = float(sum(system))
    waiting = float(system.idle + getattr(system, "iowait", 0.0))
    return CpuTimes(everything, everything - waiting, float(own.user + own.system))
