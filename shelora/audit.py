"""The audit log as data: JSON lines, each of which carries the hash of the one before.

A line is the record as JSON with sorted keys and no spaces; absent fields are left out. `hash` is the SHA-256 of that
JSON without the field `hash`. So no record can be changed, removed, added or moved without changing every hash after
it. Anyone who can write the whole file can compute those anew: the chain proves something only against a head (the
last hash) that was noted elsewhere.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, BinaryIO, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shelora.errors import DomainError, Reason

LOG_NAME: Final = "audit.log"
"""Of the log in the key authority's data folder."""

NOTHING_BEFORE: Final = "0" * 64
"""`previous` of the first record."""

MAX_LINE_BYTES: Final = 4096
"""No record is as long; a longer line is damage."""

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Count = Annotated[int, Field(ge=0)]


class AuditEvent(StrEnum):
    """What happened."""

    LOG_STARTED = "log_started"
    """The first record. `vault`; `follows` if it takes the place of a log that was set aside."""
    EPOCH_OPENED = "epoch_opened"
    EPOCH_RETIRED = "epoch_retired"
    """Its keys are deleted from the folder; backups may still hold them."""
    SECRETS_RELEASED = "secrets_released"
    """Written before the secrets are answered; a caller that hung up may not have received them. With `count`: how
    often the same client was given them again in the hour after the record without."""
    RELEASE_REFUSED = "release_refused"
    """`client_id` is what the caller called itself, proven or not. `count` as above."""
    CALL_DENIED = "call_denied"
    """A call of `method` was refused for the caller's certificate, which names `role` and, of a client, the rest.
    `count` as above."""
    REFUSALS_NOT_LISTED = "refusals_not_listed"
    """`count` refusals since the last record came too fast to have one each."""
    TAIL_REPAIRED = "tail_repaired"
    """A crash left `count` bytes of a record that nobody was answered for."""
    CLIENT_REVOKED = "client_revoked"
    """The client's certificates issued up to `until_ms` are refused."""
    ROLE_REVOKED = "role_revoked"
    """Everyone's certificates of `role` issued up to `until_ms` are refused."""
    RESEALED = "resealed"
    """Everything is now sealed under the sealing key `key_id`."""


class AuditEntry(BaseModel):
    """What is written down about an event."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    event: AuditEvent
    vault: _Hex128 | None = None
    """Identity of the vault, in the first record."""
    federation_id: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    epoch: _Count | None = None
    client_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    key_id: _Hex128 | None = None
    """Public identifier: of the epoch's CKKS key, or of a sealing key."""
    reason: Annotated[str, Field(pattern=r"^[A-Z_]{1,64}$")] | None = None
    """Why a release or a call was refused, from `shelora.errors.Reason`."""
    role: Annotated[str, Field(pattern=r"^[a-z-]{1,32}$")] | None = None
    """From `shelora.transport.identity.Role`: the caller's, or the revoked one."""
    method: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./]{1,200}$")] | None = None
    """`/service/method`."""
    count: _Count | None = None
    until_ms: _Count | None = None
    """Unix milliseconds."""
    follows: _Hash | None = None
    """SHA-256 of the whole log that this one takes the place of."""


class AuditRecord(AuditEntry):
    """An entry with its place in the chain."""

    format: Literal[1] = 1
    sequence: _Count
    """0, 1, 2 and so on."""
    time: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
    """UTC, from the clock of the key authority's machine."""
    previous: _Hash
    hash: _Hash

    @classmethod
    def after(cls, head: "AuditRecord | None", entry: AuditEntry, now: datetime) -> Self:
        """The record that follows `head`, or the first one."""
        stamp = now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        draft = cls(
            **entry.model_dump(),
            sequence=0 if head is None else head.sequence + 1,
            time=stamp,
            previous=NOTHING_BEFORE if head is None else head.hash,
            hash=NOTHING_BEFORE,
        )
        return draft.model_copy(update={"hash": draft.computed_hash()})

    def computed_hash(self) -> str:
        """What `hash` must be."""
        return hashlib.sha256(_canonical(self.model_dump(exclude_none=True, exclude={"hash"}))).hexdigest()

    def line(self) -> bytes:
        """The record as it stands in the file, line feed included."""
        return _canonical(self.model_dump(exclude_none=True)) + b"\n"


class AuditBrokenError(DomainError):
    """The chain does not hold."""

    def __init__(self, sequence: int, why: str) -> None:
        super().__init__(Reason.AUDIT_BROKEN, f"record {sequence} (line {sequence + 1}) {why}")
        self.sequence = sequence
        """Of the first record that is wrong; all before it are sound."""


class AuditTornError(AuditBrokenError):
    """The last line has no end, as a crash in the middle of a write leaves it."""

    def __init__(self, sequence: int, count: int) -> None:
        super().__init__(
            sequence,
            f"is incomplete, {count} bytes: the key authority repairs this when it starts; "
            "if it is running, look again",
        )
        self.count = count
        """Bytes after the last sound record."""


def verified(file: BinaryIO) -> Iterator[AuditRecord]:
    """The records of a log from its start, each checked against all before it. Memory is bounded.

    Raises: AuditBrokenError at the first record that is wrong, AuditTornError if only the last line is incomplete.
    """
    head: AuditRecord | None = None
    while line := file.readline(MAX_LINE_BYTES):
        sequence = 0 if head is None else head.sequence + 1
        if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            raise AuditTornError(sequence, len(line))
        head = _checked(line, sequence, head)
        yield head
    if head is None:
        raise AuditBrokenError(0, "is missing: the log is empty")


def _checked(line: bytes, sequence: int, head: AuditRecord | None) -> AuditRecord:
    try:
        record = AuditRecord.model_validate_json(line)
    except ValidationError:
        raise AuditBrokenError(sequence, "is not a record") from None
    if not _is_canonical(line) or record.hash != _hash_without(record.hash, line):
        raise AuditBrokenError(sequence, "was changed: its hash is not that of its content")
    if record.sequence != sequence or record.previous != (NOTHING_BEFORE if head is None else head.hash):
        raise AuditBrokenError(
            sequence, "does not follow the one before: records were removed, added or moved"
        )
    if (record.event is AuditEvent.LOG_STARTED) != (head is None):
        raise AuditBrokenError(sequence, f"is out of place: {record.event}")
    return record


def _is_canonical(line: bytes) -> bool:
    """Whether this is the one way to write the record: no other bytes say the same."""
    fields = json.loads(line)
    return None not in fields.values() and _canonical(fields) + b"\n" == line


def _hash_without(claimed: str, line: bytes) -> str:
    """SHA-256 of a canonical line without its field `hash` and its line feed."""
    return hashlib.sha256(line[:-1].replace(b'"hash":"%s",' % claimed.encode(), b"", 1)).hexdigest()


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
