import threading

import pytest

from client_agent.conditions import SAMPLE_S, Conditions, CpuTimes, ThisDevice
from client_agent.config import ResourcesConfig
from client_agent.progress import Activity, Progress, Stopped
from shelora.protocol import Stage

ASKED = ResourcesConfig(only_charging=True, max_other_cpu=0.25)


class Laptop:
    """A device whose state the test sets."""

    def __init__(self, *, plugged: bool = True, used: float = 0.0) -> None:
        self.plugged = plugged
        self.used = used

    def charging(self) -> bool:
        return self.plugged

    def other_cpu(self) -> float:
        return self.used


@pytest.mark.parametrize(
    ("config", "device", "words"),
    [
        (ASKED, Laptop(), ""),
        (ASKED, Laptop(plugged=False), "only_charging"),
        (ASKED, Laptop(used=0.25), ""),
        (ASKED, Laptop(used=0.5), "other processes use 50% of the CPU"),
        (ResourcesConfig(), Laptop(plugged=False, used=1.0), ""),
    ],
)
def test_a_device_may_compute_unless_a_configured_condition_forbids_it(config, device, words):
    obstacle = Conditions(config, device).obstacle()
    assert words in obstacle
    assert bool(obstacle) == bool(words)


def test_work_waits_until_the_device_is_plugged_in_and_says_that_it_is_paused():
    laptop, activity = Laptop(plugged=False), Activity()
    conditions = Conditions(ASKED, laptop, poll_s=0.01)
    work = threading.Thread(target=lambda: conditions.report(activity, Stage.TRAINING, 0.5))
    work.start()
    while activity.progress != Progress(Stage.PAUSED, 0.5):
        pass
    laptop.plugged = True
    work.join()
    assert activity.progress == Progress(Stage.TRAINING, 0.5)


def test_paused_work_that_is_no_longer_wanted_ends_at_once():
    activity, ended = Activity(), []

    def work() -> None:
        try:
            Conditions(ASKED, Laptop(plugged=False), poll_s=3600).report(activity, Stage.TRAINING, 0.5)
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    while activity.progress.stage is not Stage.PAUSED:
        pass
    activity.stop()
    thread.join()
    assert ended


def test_the_cpu_that_others_use_is_what_is_busy_less_what_this_process_used():
    before = CpuTimes(all=1000, busy=100, own=50)
    assert CpuTimes(all=1100, busy=160, own=90).others_since(before) == pytest.approx(0.2)
    assert CpuTimes(all=1100, busy=140, own=95).others_since(before) == 0.0
    assert before.others_since(before) == 0.0


def test_the_use_of_the_cpu_is_measured_over_long_enough_a_time():
    now, times = [0.0], [CpuTimes(0, 0, 0)]
    device = ThisDevice(lambda: now[0], lambda: times[0])
    now[0], times[0] = SAMPLE_S / 2, CpuTimes(10, 10, 0)
    assert device.other_cpu() == 0.0
    now[0], times[0] = SAMPLE_S, CpuTimes(20, 10, 0)
    assert device.other_cpu() == 0.5


def test_this_machine_can_be_asked():
    device = ThisDevice()
    assert device.charging() in {True, False}
    assert 0 <= device.other_cpu() <= 1
