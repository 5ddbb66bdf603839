"""Writes the audit log: nothing is released that is not on disk in it first."""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from services.key_authority.audit_file import AuditFile, Clock, utc_now
from services.key_authority.audit_listing import Listing
from services.key_authority.epochs import EpochId
from shelora.audit import AuditBrokenError, AuditEntry, AuditEvent, AuditRecord
from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import Revocation


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
        self._lock = threading.Lock()
        self._history = _History()
        self._file = AuditFile(path, identity, clock, self._history.accept)
        self._listing = Listing(self._file.write, monotonic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> str:
        """Hash of the last record. Noted elsewhere, it proves later that nothing before it was changed."""
        return self._file.head.hash

    def epoch_opened(self, epoch_id: EpochId, key_id: bytes) -> None:
        """Writes down that an epoch was opened, once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._ensure_opened(epoch_id, key_id)

    def epochs_retired(self, epoch_ids: Iterable[EpochId]) -> None:
        """Writes down that epochs were retired, each once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            for epoch_id in epoch_ids:
                if epoch_id not in self._history.retired:
                    self._listing.append(
                        AuditEntry(
                            event=AuditEvent.EPOCH_RETIRED,
                            federation_id=epoch_id.federation_id,
                            epoch=epoch_id.epoch,
                        )
                    )
                    self._history.retired.add(epoch_id)

    def secrets_released(self, epoch_id: EpochId, client_id: str, key_id: bytes) -> None:
        """Writes down a release, durably, before it is answered; the same to the same client again is counted.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        with self._lock:
            self._ensure_opened(epoch_id, key_id)
            self._listing.note(
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
            client_id: What the caller called itself; None if it is not a valid name.
            reason: Why it was refused.
        """
        with self._lock:
            self._listing.note(
                AuditEntry(
                    event=AuditEvent.RELEASE_REFUSED,
                    federation_id=epoch_id.federation_id,
                    epoch=epoch_id.epoch,
                    client_id=client_id,
                    reason=reason.value,
                ),
                self._listing.refusals,
            )

    def call_denied(self, method: str, caller: Identity, reason: Reason) -> None:
        """Writes down a call that was refused for the caller's certificate, or counts it as `release_refused` does.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        with self._lock:
            self._listing.note(
                AuditEntry(
                    event=AuditEvent.CALL_DENIED,
                    federation_id=caller.federation_id or None,
                    client_id=caller.client_id or None,
                    role=caller.role.value,
                    method=method,
                    reason=reason.value,
                ),
                self._listing.denials,
            )

    def list_repeats(self) -> None:
        """Writes down how often what was listed an hour ago came again. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._listing.list_repeats()

    @property
    def revocations(self) -> frozenset[Revocation]:
        """All that were ever written down."""
        return frozenset(self._history.revocations)

    def revoked(self, revocation: Revocation) -> None:
        """Writes down a revocation, once. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            if revocation not in self._history.revocations:
                self._listing.append(_revocation_entry(revocation))
                self._history.revocations.add(revocation)

    def resealed(self, key_id: bytes) -> None:
        """Writes down that the sealing key was changed. Raises: DomainError STORE_UNAVAILABLE."""
        with self._lock:
            self._listing.append(AuditEntry(event=AuditEvent.RESEALED, key_id=key_id.hex()))

    def close(self) -> None:
        """Writes down what is only counted yet, and closes the file. May be repeated."""
        with self._lock:
            try:
                if self._file.is_open:
                    with suppress(
                        DomainError
                    ):  # the disk has failed; there is nobody left to tell but the log
                        self._listing.list_all()
            finally:
                self._file.close()

    def _ensure_opened(self, epoch_id: EpochId, key_id: bytes) -> None:
        """A crash may have come between making an epoch and writing it down; then it is written down now."""
        if epoch_id in self._history.opened:
            return
        self._listing.append(
            AuditEntry(
                event=AuditEvent.EPOCH_OPENED,
                federation_id=epoch_id.federation_id,
                epoch=epoch_id.epoch,
                key_id=key_id.hex(),
            )
        )
        self._history.opened.add(epoch_id)


class _History:
    """What a log says has happened."""

    def __init__(self) -> None:
        self.opened: set[EpochId] = set()
        self.retired: set[EpochId] = set()
        self.revocations: set[Revocation] = set()

    def accept(self, record: AuditRecord) -> None:
        """Raises: AuditBrokenError if it makes no sense."""
        if record.event is AuditEvent.EPOCH_OPENED and record.federation_id and record.epoch:
            self.opened.add(EpochId(record.federation_id, record.epoch))
        if record.event is AuditEvent.EPOCH_RETIRED and record.federation_id and record.epoch:
            self.retired.add(EpochId(record.federation_id, record.epoch))
        if record.event in {AuditEvent.CLIENT_REVOKED, AuditEvent.ROLE_REVOKED}:
            self.revocations.add(_written_revocation(record))


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
