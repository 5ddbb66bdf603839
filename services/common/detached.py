"""Work that is done wholly once it has begun, whatever becomes of the call that asked for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import structlog

from shelora.errors import DomainError

_Value = TypeVar("_Value")
_UNDER_WAY: Final[set[asyncio.Task[Any]]] = set()
"""The event loop itself holds no task."""
_log = structlog.get_logger(__name__)


def detached(work: Coroutine[Any, Any, _Value]) -> asyncio.Task[_Value]:
    """Starts work of several steps; `await asyncio.shield(detached(...))` waits for it and may be cancelled without it.

    An error that nobody waits for any more is logged.
    """
    task = asyncio.ensure_future(work)
    _UNDER_WAY.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _UNDER_WAY.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is not None:
        reason = error.reason if isinstance(error, DomainError) else type(error).__name__
        _log.debug("work_failed", reason=reason, why=str(error))
