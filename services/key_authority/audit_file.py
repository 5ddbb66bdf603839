"""The audit log's file: at every moment a sound chain of records on disk, perhaps with the torn tail of a crash."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from services.key_authority import disk
from shelora import files
from shelora.audit import AuditBrokenError, AuditEntry, AuditEvent, AuditRecord, AuditTornError, verified
from shelora.errors import DomainError, Reason

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The time of a record."""
    return datetime.now(UTC)


class AuditFile:
    """The file of a log, checked as a whole before anything is added. Not thread-safe.

    Args:
        path: The log, made by `start_log`.
        identity: Of the vault. A log of another vault is refused.
        clock: Time of records.
        accept: Takes every record that is there. Raises: AuditBrokenError if it refuses one.

    Raises: DomainError CONFIGURATION_INVALID, with the remedy, if the log is missing or does not hold.
    """

    def __init__(
        self, path: Path, identity: str, clock: Clock, accept: Callable[[AuditRecord], None]
    ) -> None:
        self._clock = clock
        self._write_failed = False
        torn = 0
        with _problems_named(path):
            try:
                with path.open("rb") as file:
                    for record in verified(file):
                        _require_vault(record, identity)
                        accept(record)
                        self._head = record
            except AuditTornError as error:
                if error.sequence == 0:
                    raise
                torn = error.count
        self._length = path.stat().st_size - torn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if torn:
            self.write(AuditEntry(event=AuditEvent.TAIL_REPAIRED, count=torn))

    @property
    def head(self) -> AuditRecord:
        """The last record."""
        return self._head

    @property
    def is_open(self) -> bool:
        """Whether records can be written."""
        return self._descriptor >= 0

    def write(self, entry: AuditEntry) -> None:
        """Appends one record and waits until it is on disk. Raises: DomainError STORE_UNAVAILABLE.

        It is written over the torn tail of a crash, if there is one, which has no line feed, and the file is cut behind
        it.
        """
        record = AuditRecord.after(self._head, entry, self._clock())
        line = record.line()
        with disk.failures_named():
            self._require_open()
            self._undo_failed_write()
            self._write_failed = True
            _write_at(self._descriptor, line, self._length)
            os.ftruncate(self._descriptor, self._length + len(line))
            os.fsync(self._descriptor)
            self._write_failed = False
        self._head = record
        self._length += len(line)

    def close(self) -> None:
        """Closes the file. May be repeated."""
        if self.is_open:
            os.close(self._descriptor)
            self._descriptor = -1

    def _undo_failed_write(self) -> None:
        """Cuts off what a failed write left. Nobody was answered for it, and it may hold a line feed."""
        if self._write_failed:
            os.ftruncate(self._descriptor, self._length)
            os.fsync(self._descriptor)

    def _require_open(self) -> None:
        if not self.is_open:
            raise DomainError(Reason.STORE_UNAVAILABLE, "the key authority is stopping")


def start_log(path: Path, identity: str, clock: Clock = utc_now) -> None:
    """Makes a log of one record, in place of the one that is there, if any. Raises: OSError."""
    _start(path, AuditEntry(event=AuditEvent.LOG_STARTED, vault=identity), clock)


def succeed_log(path: Path, identity: str, clock: Clock = utc_now) -> Path:
    """Sets a log aside that does not hold and starts a new one, which names the SHA-256 of the old one.

    Returns: Where the old one lies now.

    Raises: OSError.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    aside = path.with_name(f"{path.name}.{digest[:16]}")
    with suppress(FileExistsError):  # an earlier attempt was interrupted here
        aside.hardlink_to(path)
    _start(path, AuditEntry(event=AuditEvent.LOG_STARTED, vault=identity, follows=digest), clock)
    return aside


def _start(path: Path, entry: AuditEntry, clock: Clock) -> None:
    files.replace(path, AuditRecord.after(None, entry, clock()).line())


def _require_vault(record: AuditRecord, identity: str) -> None:
    if record.event is AuditEvent.LOG_STARTED and record.vault != identity:
        raise AuditBrokenError(record.sequence, f"is of another vault, {record.vault}")


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    """What is wrong with a log becomes an error that names the remedy."""
    try:
        yield
    except AuditBrokenError as error:
        raise _unusable(path, error.message) from None
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror}") from error


def _unusable(path: Path, why: str) -> DomainError:
    return DomainError(
        Reason.CONFIGURATION_INVALID,
        f"the audit log {path} does not hold: {why}. Keep a copy of it and find out what happened. Then restore it "
        "from a backup, or set it aside and start a new one with: shelora-key-authority replace-audit-log",
    )
