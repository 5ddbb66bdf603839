"""What the key authority keeps of an epoch, and the one form it has below its seal."""

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


@dataclass(frozen=True, kw_only=True)
class EpochKeys:
    """The keys of one epoch. The `repr` shows no secret."""

    parameters: str
    """CKKS profile by name; "" if the epoch has no CKKS key."""

    key_id: bytes
    """Public identifier, 16 bytes: of the CKKS key, or without one of the obfuscation secret."""

    ckks_secret_key: bytes = field(repr=False)
    """`SecretKey.to_bytes()`; empty if there is none."""

    obfuscation_secret: bytes = field(repr=False)
    """32 uniformly random bytes."""


class _Record(BaseModel):
    """What is sealed: JSON with bytes in hexadecimal. The seal says of which epoch it is and that nothing was changed.

    A new format gets a new number and its own class.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        hide_input_in_errors=True,
        ser_json_bytes="hex",
        val_json_bytes="hex",
    )

    format: Literal[1]
    parameters: str
    key_id: Annotated[bytes, Field(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
    ckks_secret_key: Annotated[bytes, Field(repr=False)]
    obfuscation_secret: Annotated[
        bytes, Field(min_length=OBFUSCATION_SECRET_BYTES, max_length=OBFUSCATION_SECRET_BYTES, repr=False)
    ]


def to_bytes(secrets: EpochKeys) -> bytes:
    """What is sealed of an epoch."""
    record = _Record(
        format=1,
        parameters=secrets.parameters,
        key_id=secrets.key_id,
        ckks_secret_key=secrets.ckks_secret_key,
        obfuscation_secret=secrets.obfuscation_secret,
    )
    return record.model_dump_json().encode()


def from_bytes(content: bytes) -> EpochKeys:
    """Reads what `to_bytes` made.

    Raises: DomainError SECRET_UNAVAILABLE if it is of a newer format.
    """
    try:
        record = _Record.model_validate_json(content)
    except ValidationError:  # the cause would carry the secrets
        raise DomainError(Reason.SECRET_UNAVAILABLE, "of a format which this version does not read") from None
    return EpochKeys(
        parameters=record.parameters,
        key_id=record.key_id,
        ckks_secret_key=record.ckks_secret_key,
        obfuscation_secret=record.obfuscation_secret,
    )
