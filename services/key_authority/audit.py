"""Writes the audit log: nothing is released that is not on disk in it first."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import structlog

from services.key_authority import disk
from services.key_authority.epochs import EpochId
from shelora import files
from shelora.audit import AuditBrokenError, AuditEntry, AuditEvent, AuditRecord, AuditTornError, verified
from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import Revocation

REFUSALS_PER_MINUTE: Final = 30
"""Refusals, of releases and of calls each, that get a record of their own; the others are counted. Nobody may fill the
disk by being refused."""

REPEATS_S: Final = 3600.0
"""Seconds in which a release or a refusal like one before is counted, not listed: what it tells is on disk already."""

MAX_REPEATED: Final = 10_000
"""Different ones that are counted at once."""

_MINUTE_S: Final = 60.0
_log = structlog.get_logger(__name__)

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The time of a record."""
    return datetime.now(UTC)


class AuditLog:
    """The one writer of a log. Threads may share it; a lock on the data folder keeps other processes out.

    Args:
        path: The log, made by `start`.
        identity: Of the vault. A log of another vault is refused.
        clock: Time of records.
        monotonic: Seconds, to count refusals a minute.

    Raises: DomainError CONFIGURATION_INVALID, with the remedy, if the log is missing or does not hold.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._lately: OrderedDict[AuditEntry, _Repeated] = OrderedDict()
        self._refusals = _Budget(REFUSALS_PER_MINUTE, monotonic)
        self._denials = _Budget(REFUSALS_PER_MINUTE, monotonic)
        self._opened: set[EpochId] = set()
        self._retired: set[EpochId] = set()
        self._revocations: set[Revocation] = set()
        self._write_failed = False
        torn = self._read(identity)
        self._length = path.stat().st_size - torn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if torn:
            self._append(AuditEntry(event=AuditEvent.TAIL_REPAIRED, count=torn))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> str:
        """Hash of the last record. Noted elsewhere, it proves later that nothing before it was changed."""
        return self._head.hash

    def epoch_opened(self, epoch_id: EpochId, key_id: bytes) -> None:
        """Writes down that an epoch was opened, once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._ensure_opened(epoch_id, key_id)

    def epochs_retired(self, epoch_ids: Iterable[EpochId]) -> None:
        """Writes down that epochs were retired, each once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            for epoch_id in epoch_ids:
                if epoch_id not in self._retired:
                    self._append(
                        AuditEntry(
                            event=AuditEvent.EPOCH_RETIRED,
                            federation_id=epoch_id.federation_id,
                            epoch=epoch_id.epoch,
                        )
                    )
                    self._retired.add(epoch_id)

    def secrets_released(self, epoch_id: EpochId, client_id: str, key_id: bytes) -> None:
        """Writes down a release, durably, before it is answered; the same to the same client again is counted.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        with self._lock:
            self._ensure_opened(epoch_id, key_id)
            self._note(
                AuditEntry(
                    event=AuditEvent.SECRETS_RELEASED,
                    federation_id=epoch_id.federation_id,
                    epoch=epoch_id.epoch,
                    client_id=client_id,
                    key_id=key_id.hex(),
                )
            )

    def release_refused(self, epoch_id: EpochId, client_id: str | None, reason: Reason) -> None:
        """Writes down a refusal, or counts it if it is a repeat, or there are too many.

        Raises: DomainError STORE_UNAVAILABLE.

        Args:
            epoch_id: What was asked for.
            client_id: What the caller called itself; None if it is no valid name.
            reason: Why it was refused.
        """
        with self._lock:
            self._note(
                AuditEntry(
                    event=AuditEvent.RELEASE_REFUSED,
                    federation_id=epoch_id.federation_id,
                    epoch=epoch_id.epoch,
                    client_id=client_id,
                    reason=reason.value,
                ),
                self._refusals,
            )

    def call_denied(self, method: str, caller: Identity, reason: Reason) -> None:
        """Writes down a call that was refused for the caller's certificate, or counts it as `release_refused` does.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        with self._lock:
            self._note(
                AuditEntry(
                    event=AuditEvent.CALL_DENIED,
                    federation_id=caller.federation_id or None,
                    client_id=caller.client_id or None,
                    role=caller.role.value,
                    method=method,
                    reason=reason.value,
                ),
                self._denials,
            )

    def list_repeats(self) -> None:
        """Writes down how often what was listed an hour ago came again. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._list_repeats(self._monotonic() - REPEATS_S)

    @property
    def revocations(self) -> frozenset[Revocation]:
        """All that were ever written down."""
        return frozenset(self._revocations)

    def revoked(self, revocation: Revocation) -> None:
        """Writes down a revocation, once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            if revocation not in self._revocations:
                self._append(_revocation_entry(revocation))
                self._revocations.add(revocation)

    def resealed(self, key_id: bytes) -> None:
        """Writes down that the sealing key was changed. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._append(AuditEntry(event=AuditEvent.RESEALED, key_id=key_id.hex()))

    def close(self) -> None:
        """Writes down what is only counted yet, and closes the file. May be repeated."""
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                with suppress(DomainError):  # the disk has failed; there is nobody left to tell but the log
                    self._list_repeats(self._monotonic())
                    self._append_unlisted()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _read(self, identity: str) -> int:
        """Checks the whole log and finds its head. Returns how many bytes of a torn last line follow it."""
        try:
            with self._path.open("rb") as file:
                for record in verified(file):
                    self._accept(record, identity)
        except AuditTornError as torn:
            if torn.sequence > 0:
                return torn.count
            raise _unusable(self._path, torn.message) from None
        except AuditBrokenError as error:
            raise _unusable(self._path, error.message) from None
        except OSError as error:
            raise _unusable(self._path, f"it cannot be read: {error.strerror}") from error
        return 0

    def _accept(self, record: AuditRecord, identity: str) -> None:
        if record.event is AuditEvent.LOG_STARTED and record.vault != identity:
            raise AuditBrokenError(record.sequence, f"is of another vault, {record.vault}")
        if record.event is AuditEvent.EPOCH_OPENED and record.federation_id and record.epoch:
            self._opened.add(EpochId(record.federation_id, record.epoch))
        if record.event is AuditEvent.EPOCH_RETIRED and record.federation_id and record.epoch:
            self._retired.add(EpochId(record.federation_id, record.epoch))
        if record.event in {AuditEvent.CLIENT_REVOKED, AuditEvent.ROLE_REVOKED}:
            self._revocations.add(_written_revocation(record))
        self._head = record

    def _ensure_opened(self, epoch_id: EpochId, key_id: bytes) -> None:
        """A crash may have come between making an epoch and writing it down; then it is written down now."""
        if epoch_id in self._opened:
            return
        self._append(
            AuditEntry(
                event=AuditEvent.EPOCH_OPENED,
                federation_id=epoch_id.federation_id,
                epoch=epoch_id.epoch,
                key_id=key_id.hex(),
            )
        )
        self._opened.add(epoch_id)

    def _note(self, entry: AuditEntry, budget: "_Budget | None" = None) -> None:
        """Writes an entry, or counts it if one like it was written lately, or the budget is spent."""
        now = self._monotonic()
        self._list_repeats(now - REPEATS_S)
        if entry in self._lately:
            self._lately[entry].count += 1
            return
        if budget is not None and not budget.spend():
            return
        self._append(entry)
        self._lately[entry] = _Repeated(now)
        if len(self._lately) > MAX_REPEATED:
            self._list_oldest()

    def _list_repeats(self, until: float) -> None:
        while self._lately and next(iter(self._lately.values())).since <= until:
            self._list_oldest()

    def _list_oldest(self) -> None:
        """The entry again with how often it came since; not forgotten before it is on disk."""
        entry, repeated = next(iter(self._lately.items()))
        if repeated.count:
            self._append(entry.model_copy(update={"count": repeated.count}))
        del self._lately[entry]

    def _append(self, entry: AuditEntry) -> None:
        self._append_unlisted()
        self._write(entry)

    def _append_unlisted(self) -> None:
        budgets = (self._refusals, self._denials)
        if count := sum(budget.overspent for budget in budgets):
            self._write(AuditEntry(event=AuditEvent.REFUSALS_NOT_LISTED, count=count))
            for budget in budgets:
                budget.overspent = 0

    def _write(self, entry: AuditEntry) -> None:
        """Appends one record and waits until it is on disk.

        It is written over the torn tail of a crash, if there is one, which has no line feed, and the file is cut behind
        it: at every moment the file is a sound log, perhaps with a torn tail.
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

    def _undo_failed_write(self) -> None:
        """Cuts off what a failed write left. Nobody was answered for it, and it may hold a line feed."""
        if self._write_failed:
            os.ftruncate(self._descriptor, self._length)
            os.fsync(self._descriptor)

    def _require_open(self) -> None:
        if self._descriptor < 0:
            raise DomainError(Reason.STORE_UNAVAILABLE, "the key authority is stopping")


def _revocation_entry(revocation: Revocation) -> AuditEntry:
    holder, until_ms = revocation.identity, revocation.at_ms
    if holder.role is not Role.CLIENT:
        return AuditEntry(event=AuditEvent.ROLE_REVOKED, role=holder.role.value, until_ms=until_ms)
    return AuditEntry(
        event=AuditEvent.CLIENT_REVOKED,
        federation_id=holder.federation_id,
        client_id=holder.client_id,
        until_ms=until_ms,
    )


def _written_revocation(record: AuditRecord) -> Revocation:
    try:
        role = Role.named(record.role or Role.CLIENT)
        holder = Identity(role, record.federation_id or "", record.client_id or "")
    except DomainError as error:
        raise AuditBrokenError(record.sequence, f"revokes nobody: {error.message}") from None
    return Revocation(holder, record.until_ms or 0)


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


@dataclass
class _Repeated:
    """When an entry was written, and how often it came since."""

    since: float
    count: int = 0


class _Budget:
    """So many a minute. What goes beyond is counted in `overspent`."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._monotonic = monotonic
        self._minute_began = monotonic()
        self._spent = 0
        self.overspent = 0

    def spend(self) -> bool:
        now = self._monotonic()
        if now - self._minute_began >= _MINUTE_S:
            self._minute_began, self._spent = now, 0
        if self._spent >= self._per_minute:
            self.overspent += 1
            return False
        self._spent += 1
        return True


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _unusable(path: Path, why: str) -> DomainError:
    return DomainError(
        Reason.CONFIGURATION_INVALID,
        f"the audit log {path} does not hold: {why}. Keep a copy of it and find out what happened. Then restore it "
        "from a backup, or set it aside and start a new one with: shelora-key-authority replace-audit-log",
    )
