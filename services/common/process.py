"""The outermost frame of a server process: logs, event loop, exit code."""

import asyncio
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import structlog

from services.common.settings import ServerSettings
from shelora.errors import DomainError, Reason
from shelora.exits import EXIT_FAILED, exit_code
from shelora.private_memory import keep_memory_private
from shelora.telemetry.logs import configure_logs
from shelora.terminal import Terminal

_Settings = TypeVar("_Settings", bound=ServerSettings)

OPEN_FILES: Final = 65_536
"""Files, so connections too, that a server asks to have open."""

THREADS_S: Final = 3.0
"""Seconds that threads may take to end after the drain: what they still do is of cancelled work."""
_THREADS: Final = "server-thread"

_log = structlog.get_logger(__name__)


class _Threads(ThreadPoolExecutor):
    """The event loop's threads, for which its end waits THREADS_S at most.

    Resolving a name cannot be cancelled and takes up to half a minute where no name server answers: a server that
    stops while Redis and the key authority are away would be killed.
    """

    def __init__(self) -> None:
        super().__init__(thread_name_prefix=_THREADS)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:  # noqa: FBT001, FBT002 - as its base
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        until_s = time.monotonic() + (THREADS_S if wait else 0.0)
        for thread in _at_work():
            thread.join(max(0.0, until_s - time.monotonic()))


def run_process(
    process: str, load: Callable[[], _Settings], main: Callable[[_Settings], Coroutine[Any, Any, None]]
) -> None:
    """Runs a server to its end. Returns after a drain, exits as `shelora.exits` says otherwise.

    Threads that do not end are left behind: the process exits at once then, after a drain too.

    Args:
        process: Name of the process in its logs.
        load: Reads the settings.
        main: Composes the server and serves.
    """
    try:
        settings = load()
        configure_logs(process, settings.log_level, json=settings.log_json)
        keep_memory_private()
        allow_many_connections()
        asyncio.run(_on_threads(main(settings)))
    except Exception as error:  # noqa: BLE001 - the end of the process: one line or a log record, never silence
        code = _explain(process, error)
    else:
        code = 0
    if left := _at_work():
        _log.warning("threads_left", count=len(left))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


async def _on_threads(main: Coroutine[Any, Any, None]) -> None:
    asyncio.get_running_loop().set_default_executor(_Threads())
    await main


def _at_work() -> list[threading.Thread]:
    """Threads of `_Threads` that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{_THREADS}_")]


def allow_many_connections() -> None:
    """Lets this process open OPEN_FILES, or as many as it may: every agent is a connection; 1024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _explain(process: str, error: Exception) -> int:
    """Tells the operator why the process ends. Returns the exit code."""
    if not isinstance(error, DomainError):
        _log.error("process_failed", exc_info=error)
        return EXIT_FAILED
    if error.reason is Reason.CONFIGURATION_INVALID:
        Terminal(stderr=True).say(f"{process}: {error.message}")  # for the operator, logs or not
    else:
        _log.error("process_failed", reason=error.reason, why=error.message)
    return exit_code(error)
