"""What the key authority keeps of an epoch, and the one form it has on disk."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shelora.errors import DomainError, Reason

KEY_ID_BYTES: Final = 16
OBFUSCATION_SECRET_BYTES: Final = 32

_FEDERATION_ID: Final = re.compile(r"[a-z0-9-]{1,64}")
_MAX_EPOCH: Final = 2**32 - 1


@dataclass(frozen=True)
class EpochId:
    """Names one generation of a federation's keys.

    Raises: DomainError INVALID_ARGUMENT, naming the field.
    """

    federation_id: str
    """1 to 64 characters of [a-z0-9-]."""

    epoch: int
    """From 1."""

    def __post_init__(self) -> None:
        if not _FEDERATION_ID.fullmatch(self.federation_id):
            raise DomainError(
                Reason.INVALID_ARGUMENT, "federation_id must be 1 to 64 characters of [a-z0-9-]"
            )
        if not 1 <= self.epoch <= _MAX_EPOCH:
            raise DomainError(Reason.INVALID_ARGUMENT, "epoch must be 1 or more")

    def __str__(self) -> str:
        return f"epoch {self.epoch} of federation {self.federation_id}"


@dataclass(frozen=True)
class EpochSecrets:
    """The keys of one epoch. The `repr` shows no secret."""

    parameters: str
    """CKKS profile by name."""

    key_id: bytes
    """Public identifier of the CKKS key, 16 bytes."""

    ckks_secret_key: bytes = field(repr=False)
    """`SecretKey.to_bytes()`."""

    obfuscation_secret: bytes = field(repr=False)
    """32 uniformly random bytes."""


class _Record(BaseModel):
    """The body of a file, as JSON with bytes in hexadecimal. A new format gets a new number and its own class."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        hide_input_in_errors=True,
        ser_json_bytes="hex",
        val_json_bytes="hex",
    )

    format: Literal[1]
    federation_id: str
    epoch: int
    parameters: Annotated[str, Field(min_length=1)]
    key_id: Annotated[bytes, Field(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
    ckks_secret_key: Annotated[bytes, Field(min_length=1, repr=False)]
    obfuscation_secret: Annotated[
        bytes, Field(min_length=OBFUSCATION_SECRET_BYTES, max_length=OBFUSCATION_SECRET_BYTES, repr=False)
    ]


def to_file(epoch_id: EpochId, secrets: EpochSecrets) -> bytes:
    """The content of the epoch's file: the SHA-256 of the body in hexadecimal, a line feed, the body."""
    record = _Record(
        format=1,
        federation_id=epoch_id.federation_id,
        epoch=epoch_id.epoch,
        parameters=secrets.parameters,
        key_id=secrets.key_id,
        ckks_secret_key=secrets.ckks_secret_key,
        obfuscation_secret=secrets.obfuscation_secret,
    )
    body = record.model_dump_json().encode()
    return _checksum(body) + b"\n" + body


def from_file(epoch_id: EpochId, content: bytes) -> EpochSecrets:
    """Reads what `to_file` wrote for this epoch.

    Raises: DomainError SECRET_UNAVAILABLE if anything is missing, changed, or of another epoch.
    """
    checksum, _, body = content.partition(b"\n")
    if checksum != _checksum(body):
        raise _damaged(epoch_id)
    try:
        record = _Record.model_validate_json(body)
    except ValidationError:
        raise _damaged(epoch_id) from None  # the cause would carry the secrets
    if (record.federation_id, record.epoch) != (epoch_id.federation_id, epoch_id.epoch):
        raise _damaged(epoch_id)
    return EpochSecrets(record.parameters, record.key_id, record.ckks_secret_key, record.obfuscation_secret)


def _checksum(body: bytes) -> bytes:
    """Finds accidents. It is no protection against someone who can write to the folder."""
    return hashlib.sha256(body).hexdigest().encode("ascii")


def _damaged(epoch_id: EpochId) -> DomainError:
    return DomainError(
        Reason.SECRET_UNAVAILABLE,
        f"the stored keys of {epoch_id} are damaged and were left as they are; "
        "restore their file from a backup, or open a new epoch",
    )
