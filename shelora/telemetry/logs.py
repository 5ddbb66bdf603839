"""Structured logs on standard error, for our own events and for those of libraries.

No payload gets into a log by accident: field values that are bytes, arrays or messages are replaced by their
type or size, and fields named like secrets are masked. This catches mistakes; it does not make it safe to log
a secret.
"""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, timedelta
from enum import Enum
from pathlib import PurePath
from typing import Final, get_args
from uuid import UUID

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from shelora.telemetry.metrics import counter
from shelora.text import printable

MASK: Final = "***"

MAX_TEXT: Final = 4096
"""Characters of a field that are kept: no identifier or message is longer, an encoded payload is."""

_SECRET_NAME: Final = re.compile(
    r"secret|passw|credential|authorization|bearer|private|(^|_)(key|keys|token|tokens|seed|seeds)$",
    re.IGNORECASE,
)
_HARMLESS_NAME: Final = re.compile(r"_(file|path|folder|id|count)$", re.IGNORECASE)

_Plain = bool | int | float | None
_Printed = date | timedelta | PurePath | UUID | BaseException

_STRUCTURE: Final = frozenset(
    {"timestamp", "level", "logger", "exc_info", "exception", "stack", "stack_info"}
)
"""Fields that structlog makes itself. A traceback is as long as it is, and holds no local variables."""


def configure_logs(process: str, level: str = "INFO", *, json: bool = False) -> None:
    """Sends every log record of this process to standard error. May be called again.

    Args:
        process: Name of the process, a field of every record.
        level: "DEBUG", "INFO", "WARNING" or "ERROR", in any case.
        json: One JSON object a line; otherwise lines for people.

    Raises: ValueError if the level is unknown.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(process),
        guard_fields,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # tests and the CLI configure more than once
    )
    _install(_formatter(shared, json=json), level.upper())


def guard_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: masks secrets by name and refuses payloads by type, at any depth."""
    return {name: value if name in _STRUCTURE else guarded(name, value) for name, value in event.items()}


def guarded(name: str, value: object) -> object:
    """`value` as a log may show it under the field `name`."""
    if _SECRET_NAME.search(name) and not _HARMLESS_NAME.search(name):
        return MASK
    if isinstance(value, Mapping):
        return {str(key): guarded(str(key), item) for key, item in value.items()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes refused>"
    if isinstance(value, Sequence | AbstractSet) and not isinstance(value, str):
        return [guarded(name, item) for item in value]
    return _scalar(value)


def _scalar(value: object) -> object:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, get_args(_Printed)):
        value = str(value)
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}... <{len(value)} characters>"
    return value if isinstance(value, _Plain) else f"<{type(value).__name__} refused>"


RECORDS_LOST: Final = counter(
    "log_records_lost_total", "Log records that could not be written: a full disk, a closed pipe."
)


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time: a test or a progress bar may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - a log must not break what it reports on, and has nowhere else to tell it
            RECORDS_LOST.inc()


class _GuardArguments(logging.Filter):
    """Guards the arguments of printf-style records, which are formatted before any processor sees them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_guarded_argument(argument) for argument in record.args)
        elif isinstance(record.args, Mapping):
            record.args = {name: _guarded_argument(argument) for name, argument in record.args.items()}
        return True


def _guarded_argument(argument: object) -> object:
    return guarded("", argument) if isinstance(argument, (bytes, bytearray, memoryview)) else argument


def _named(process: str) -> Processor:
    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    return add_process


def _shown(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The text of a library as a terminal may show it; fields, and JSON, are escaped by who renders them."""
    return {**event, "event": printable(str(event["event"]), lines=True)}


def _formatter(shared: Sequence[Processor], *, json: bool) -> logging.Formatter:
    # Tracebacks without local variables, which hold payloads: structlog's defaults would show them.
    rendered: Sequence[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [
            _shown,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=list(shared),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
    )


def _install(formatter: logging.Formatter, level: str) -> None:
    """Makes one handler, on standard error, the only one of the root logger."""
    handler = _StandardError()
    handler.setFormatter(formatter)
    handler.addFilter(_GuardArguments())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    logging.getLogger("asyncio").setLevel(
        max(root.level, logging.INFO)
    )  # its debug records name every selector
