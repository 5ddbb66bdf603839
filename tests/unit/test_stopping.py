"""Signals that stop a process in order, and the lock of a cluster's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shelora.cli.folder import ADDRESSES, LOCK, MARK
from shelora.cli.supervision import clear, interruptible, locked
from shelora.errors import DomainError, Reason
from shelora.stopping import stop_signals

pytestmark = pytest.mark.usefixtures("hangup_is_heard")


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


_MEMBER = """
import os, signal, sys, time
def stop(*_):
    with open(sys.argv[1], "a") as log:
        log.write(sys.argv[2] + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_the_end_of_a_supervisor_ends_agents_then_servers_in_reverse_and_what_nobody_told_of(tmp_path):
    log = tmp_path / "log"

    def member(name: str, folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _MEMBER, str(log), name]
        started = subprocess.Popen(command, env={**os.environ, MARK: str(folder)}, stdout=subprocess.PIPE)
        assert started.stdout.readline() == b"ready\n"
        return started

    names = ["redis", "coordinator", "agent", "untold"]
    members = {name: member(name, tmp_path) for name in names}
    stranger = member("stranger", tmp_path / "elsewhere")
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "shelora.cli.guardian", str(tmp_path)], stdin=subprocess.PIPE, text=True
    )
    (tmp_path / ADDRESSES).touch()
    told = [("server", "redis"), ("agent", "agent"), ("server", "coordinator")]
    supervisor.communicate("".join(f"{kind} {members[name].pid}\n" for kind, name in told), timeout=60)
    assert log.read_text().split() == ["agent", "coordinator", "redis", "untold"]
    assert not (tmp_path / ADDRESSES).exists()
    assert stranger.poll() is None
    for process in (*members.values(), stranger):
        process.kill()
        process.communicate()
