"""Ends the processes of a local cluster whose supervisor is gone: `python -m shelora.cli.guardian FOLDER`.

The supervisor starts it before anything else and tells it of every process, a line each: `server PID` or `agent PID`.
The end of its input is the end of the supervisor, whatever ended it, SIGKILL included. What is left then is stopped as
Ctrl-C would stop it. It shares the lock of the folder, so nobody starts there before that is done.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from shelora.cli.folder import ADDRESSES, MARK, STOP_TIMEOUT_S

_POLL_S: Final = 0.05


def main() -> None:
    """Waits for the end of standard input, then ends what is left."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    agents, servers = _told()
    end(agents)
    for server in reversed(servers):
        end([server])
    end([*marked(folder)])
    (folder / ADDRESSES).unlink(missing_ok=True)


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGTERM to all, then SIGKILL to those that are left after a while."""
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()  # psutil sees a number that was given to another process
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while any(map(_lives, processes)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def marked(folder: Path) -> Iterator[psutil.Process]:
    """Processes of the cluster in a folder, workers of servers and what nobody told of included."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                yield process


def _told() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Agents and servers, in the order they were started, once there will be no more."""
    told: dict[str, list[psutil.Process]] = {"agent": [], "server": []}
    for line in sys.stdin:
        kind, pid = line.split()
        with suppress(psutil.NoSuchProcess):
            told[kind].append(psutil.Process(int(pid)))
    return told["agent"], told["server"]


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


if __name__ == "__main__":
    main()
