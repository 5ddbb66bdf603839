"""What a worker process says on its standard output: one JSON line when it is ready, then one for each job."""

import json
from typing import Any, Final

from services.aggregation.records import StoredResult
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import Digest

READY: Final = b'{"ready":true}\n'


HELP: Final = b"help "
"""What a job begins with that makes parts of a shard which another worker aggregates; the request follows."""


def helped_line(parts: int) -> bytes:
    """The answer to a job that helped."""
    return _line({"parts": parts})


def read_help(line: bytes) -> int:
    """Parts that a job made; 0 if it failed: nobody depends on it."""
    try:
        return int(json.loads(line)["parts"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def stored_line(result: StoredResult) -> bytes:
    """The answer to a job that succeeded."""
    sha256, total = result.digest.sha256.hex(), result.digest.total_bytes
    return _line({"sha256": sha256, "total_bytes": total, "cpu_s": result.cpu_s})


def refused_line(error: DomainError) -> bytes:
    """The answer to a job that was refused."""
    return _line({"reason": error.reason.value, "message": error.message})


def read_answer(line: bytes) -> StoredResult:
    """The result in an answer. Raises the DomainError in it, WORKER_FAILED if it is not an answer."""
    try:
        answer = _parsed(json.loads(line))
    except (ValueError, KeyError, TypeError, RecursionError, DomainError) as error:
        raise DomainError(Reason.WORKER_FAILED, "the worker's answer cannot be read") from error
    if isinstance(answer, DomainError):
        raise answer
    return answer


def _parsed(form: dict[str, Any]) -> StoredResult | DomainError:
    if "reason" in form:
        return DomainError(Reason(form["reason"]), str(form["message"]))
    return StoredResult(Digest(bytes.fromhex(form["sha256"]), int(form["total_bytes"])), float(form["cpu_s"]))


def _line(form: dict[str, str | int | float]) -> bytes:
    return json.dumps(form, separators=(",", ":")).encode() + b"\n"
