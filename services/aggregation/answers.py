"""What a worker process says on its standard output: one JSON line when it is ready, then one for each job."""

import json
from typing import Final

from services.aggregation.records import StoredResult
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import Digest

READY: Final = b'{"ready":true}\n'


def stored_line(result: StoredResult) -> bytes:
    """The answer to a job that succeeded."""
    sha256, total = result.digest.sha256.hex(), result.digest.total_bytes
    return _line({"sha256": sha256, "total_bytes": total, "cpu_s": result.cpu_s})


def refused_line(error: DomainError) -> bytes:
    """The answer to a job that was refused."""
    return _line({"reason": error.reason.value, "message": error.message})


def read_answer(line: bytes) -> StoredResult:
    """The result in an answer. Raises the DomainError in it."""
    form = json.loads(line)
    if "reason" in form:
        raise DomainError(Reason(form["reason"]), form["message"])
    return StoredResult(Digest(bytes.fromhex(form["sha256"]), form["total_bytes"]), form["cpu_s"])


def _line(form: dict[str, str | int | float]) -> bytes:
    return json.dumps(form, separators=(",", ":")).encode() + b"\n"
