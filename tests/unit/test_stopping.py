"""Signals that stop a process in order, and the lock of a cluster's folder."""

import os
import signal
import subprocess
import sys

import pytest

from shelora.cli.supervision import LOCK, clear, interruptible, locked
from shelora.errors import DomainError, Reason
from shelora.stopping import stop_signals


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_interrupts_and_the_next_does_not_break_off_the_stop(number):
    stopped = []

    def work():
        with interruptible():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)
                stopped.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stopped


def test_nohup_is_obeyed():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert signal.SIGHUP in stop_signals()


def test_a_folder_in_use_is_neither_taken_nor_cleared_and_its_user_is_named(tmp_path):
    folder = tmp_path / "run" / "cluster"
    with locked(folder):
        for attempt in (lambda: locked(folder).__enter__(), lambda: clear(tmp_path / "run")):
            with pytest.raises(DomainError, match=f"process {os.getpid()}") as refused:
                attempt()
            assert refused.value.reason is Reason.CONFIGURATION_INVALID
    assert folder.exists()
    with locked(folder):
        pass
    clear(tmp_path / "run")
    assert not folder.exists()


def test_a_lock_that_only_a_guardian_holds_is_waited_for(tmp_path):
    with locked(tmp_path) as lock:
        guardian = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]
        )
    (tmp_path / LOCK).write_text('{"pid": 1, "since": 0}')  # of a process that has ended
    told = []

    def tell(what: str) -> None:
        told.append(what)
        guardian.communicate(b"\n")

    with locked(tmp_path, tell):
        assert told == ["waiting for the processes of a cluster that was killed"]
