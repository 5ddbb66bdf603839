"""One supervisor a folder, and no process of a cluster without its supervisor."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Literal, NoReturn, Self

from shelora.cli.folder import LOCK
from shelora.errors import DomainError, Reason
from shelora.stopping import stop_signals

ENDING_S: Final = 60.0
"""Seconds to wait for the processes of a supervisor that was killed."""
_POLL_S: Final = 0.1


class Supervision:
    """Holds a folder, and has the cluster's processes ended if this one dies. A context manager.

    Args:
        folder: Of the cluster.
        tell: Takes what is waited for.

    Raises: DomainError CONFIGURATION_INVALID if a cluster runs in the folder, naming its supervisor.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        require_local("psutil")
        from shelora.cli.guardian import end, marked  # noqa: PLC0415 - needs psutil, which is optional

        with ExitStack() as starting:
            lock = starting.enter_context(locked(self._folder, self._tell))
            end([*marked(self._folder)])  # left by a supervisor and a guardian that were both killed
            self._guardian = starting.enter_context(self._started(lock))
            self._stack = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def covers(self, kind: Literal["agent", "server"], pid: int) -> None:
        """From now on the process ends with this one."""
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(f"{kind} {pid}\n")
        self._guardian.stdin.flush()

    def _started(self, lock: IO[str]) -> subprocess.Popen[str]:
        """The guardian. On leaving, its input ends, and it is waited for."""
        with (self._folder / "guardian.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", "shelora.cli.guardian", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )


@contextmanager
def locked(folder: Path, tell: Callable[[str], None] = lambda _: None) -> Iterator[IO[str]]:
    """The lock of a cluster's folder, which is made if missing. One that is only being given up is waited for.

    Raises: DomainError CONFIGURATION_INVALID if a cluster runs there, naming the process.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        deadline_s = time.monotonic() + ENDING_S
        while not _taken(file):
            pid = _supervisor(file)
            if pid is not None:
                raise _invalid(
                    f"a cluster runs in {folder} already, started by process {pid}: stop that one "
                    f"(Ctrl-C in its terminal, or kill {pid}), or give another --folder"
                )
            if time.monotonic() > deadline_s:
                raise _invalid(
                    f"a process of an earlier cluster holds {folder / LOCK}: see `fuser {folder / LOCK}`"
                )
            tell("waiting for the processes of a cluster that was killed")
            time.sleep(_POLL_S)
        _sign(file)
        yield file


def clear(folder: Path) -> None:
    """Deletes a folder and what is below, unless a cluster runs there.

    Raises: DomainError CONFIGURATION_INVALID if one does, naming the process.
    """
    require_local("psutil")
    with ExitStack() as stack:
        for lock in folder.rglob(LOCK):
            stack.enter_context(locked(lock.parent))
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes the signals to stop raise KeyboardInterrupt, so that all is stopped in order; once.

    Closing a terminal sends SIGHUP, often twice; the second must not break off what the first began.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            _raise_interrupt()

    previous = {number: signal.signal(number, interrupt) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def require_local(package: str) -> None:
    """Raises: DomainError CONFIGURATION_INVALID if a package of the extra `local` is missing."""
    try:
        __import__(package)
    except ImportError:
        raise _invalid(f"a local cluster needs the package {package}: pip install 'shelora[local]'") from None


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _invalid(f"{file.name} cannot be locked: {error.strerror}") from error
    return True


def _sign(file: IO[str]) -> None:
    """Names this process."""
    file.truncate(0)
    file.write(json.dumps(_signature(os.getpid())))
    file.flush()


def _supervisor(file: IO[str]) -> int | None:
    """The process that holds the lock; None if it has ended, or has not signed yet."""
    file.seek(0)
    try:
        signed = json.loads(file.read())
        return int(signed["pid"]) if signed == _signature(signed["pid"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _signature(pid: int) -> dict[str, float] | None:
    """Of a process, as long as it lives: numbers are given again."""
    import psutil  # noqa: PLC0415 - optional

    try:
        process = psutil.Process(pid)
        return (
            None if process.status() == psutil.STATUS_ZOMBIE else {"pid": pid, "since": process.create_time()}
        )
    except psutil.NoSuchProcess:
        return None


def _raise_interrupt() -> NoReturn:
    raise KeyboardInterrupt


def _invalid(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
