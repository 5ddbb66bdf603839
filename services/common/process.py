"""The outermost frame of a server process: logs, event loop, exit code."""

import asyncio
import resource
import sys
from collections.abc import Callable, Coroutine
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

_log = structlog.get_logger(__name__)


def run_process(
    process: str, load: Callable[[], _Settings], main: Callable[[_Settings], Coroutine[Any, Any, None]]
) -> None:
    """Runs a server to its end. Returns after a drain, exits as `shelora.exits` says otherwise.

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
        asyncio.run(main(settings))
    except Exception as error:  # noqa: BLE001 - the end of the process: one line or a log record, never silence
        sys.exit(_explain(process, error))


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
