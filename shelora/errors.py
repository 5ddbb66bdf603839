"""Every reason the system can refuse something, and the errors that carry them.

A reason is part of the protocol: it travels in the RPC status, in metrics labels and in round summaries.
Messages are public. They name the field and the remedy, never a payload, a secret or another client.
The table from reason to gRPC status lives in `shelora.transport.status`.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a request, an update or a round was refused."""

    # Requests
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INTERNAL = "INTERNAL"
    VERSION_REFUSED = "VERSION_REFUSED"
    # Identities
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    CERTIFICATE_REVOKED = "CERTIFICATE_REVOKED"
    CLIENT_EXISTS = "CLIENT_EXISTS"
    SERVER_UNTRUSTED = "SERVER_UNTRUSTED"
    TOKEN_REFUSED = "TOKEN_REFUSED"  # noqa: S105 - a reason, not a password
    # Federations, members, plans
    FEDERATION_UNKNOWN = "FEDERATION_UNKNOWN"
    FEDERATION_EXISTS = "FEDERATION_EXISTS"
    FEDERATION_CLOSED = "FEDERATION_CLOSED"
    EPOCH_RETIRED = "EPOCH_RETIRED"
    CLIENT_UNKNOWN = "CLIENT_UNKNOWN"
    CLIENT_REPLACED = "CLIENT_REPLACED"
    MODEL_MISMATCH = "MODEL_MISMATCH"
    PLAN_UNKNOWN = "PLAN_UNKNOWN"
    PLAN_REFUSED = "PLAN_REFUSED"
    NOT_LEADER = "NOT_LEADER"
    BALLOT_REFUSED = "BALLOT_REFUSED"
    PROTECTION_REFUSED = "PROTECTION_REFUSED"
    # Rounds
    ROUND_UNKNOWN = "ROUND_UNKNOWN"
    ROUND_NOT_COLLECTING = "ROUND_NOT_COLLECTING"
    INVALID_TRANSITION = "INVALID_TRANSITION"
    NOT_IN_COHORT = "NOT_IN_COHORT"
    UPDATE_REWRITTEN = "UPDATE_REWRITTEN"
    TOO_FEW_UPDATES = "TOO_FEW_UPDATES"
    EXAMPLES_MISMATCH = "EXAMPLES_MISMATCH"
    NORM_TOO_LARGE = "NORM_TOO_LARGE"
    NORM_OUTLIER = "NORM_OUTLIER"
    RESULT_UNKNOWN = "RESULT_UNKNOWN"
    RESULT_REFUSED = "RESULT_REFUSED"
    # Shards and transfers
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    SHARD_UNKNOWN = "SHARD_UNKNOWN"
    SHARD_MISSING = "SHARD_MISSING"
    SHARD_REWRITTEN = "SHARD_REWRITTEN"
    SHARD_MALFORMED = "SHARD_MALFORMED"
    TRANSFER_TOO_LARGE = "TRANSFER_TOO_LARGE"
    TRANSFER_TRUNCATED = "TRANSFER_TRUNCATED"
    TRANSFER_OFFSET = "TRANSFER_OFFSET"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    VALUE_NOT_FINITE = "VALUE_NOT_FINITE"
    VALUE_OUT_OF_RANGE = "VALUE_OUT_OF_RANGE"
    # Ciphertexts
    CIPHERTEXT_TRUNCATED = "CIPHERTEXT_TRUNCATED"
    CIPHERTEXT_MALFORMED = "CIPHERTEXT_MALFORMED"
    CIPHERTEXT_FOREIGN_KEY = "CIPHERTEXT_FOREIGN_KEY"
    CIPHERTEXT_FOREIGN_PARAMETERS = "CIPHERTEXT_FOREIGN_PARAMETERS"
    CIPHERTEXT_WRONG_SCALE = "CIPHERTEXT_WRONG_SCALE"
    CIPHERTEXT_WRONG_SHAPE = "CIPHERTEXT_WRONG_SHAPE"
    CIPHERTEXT_COEFFICIENT_RANGE = "CIPHERTEXT_COEFFICIENT_RANGE"
    # Sums that a committee opens
    SIGNATURE_REFUSED = "SIGNATURE_REFUSED"
    COMMITTEE_REFUSED = "COMMITTEE_REFUSED"
    DEALING_REFUSED = "DEALING_REFUSED"
    SET_REFUSED = "SET_REFUSED"
    ROUND_SPENT = "ROUND_SPENT"
    QUORUM_MISSING = "QUORUM_MISSING"
    ANSWERS_REFUSED = "ANSWERS_REFUSED"
    SUM_UNREADABLE = "SUM_UNREADABLE"
    COMMITTEE_INCOMPLETE = "COMMITTEE_INCOMPLETE"
    STATEMENT_REWRITTEN = "STATEMENT_REWRITTEN"
    STEP_OVER = "STEP_OVER"
    ANSWERS_MISSING = "ANSWERS_MISSING"
    # Agents
    DISK_UNAVAILABLE = "DISK_UNAVAILABLE"
    MEMORY_UNAVAILABLE = "MEMORY_UNAVAILABLE"
    PACKAGE_UNUSABLE = "PACKAGE_UNUSABLE"
    PRIVACY_EXHAUSTED = "PRIVACY_EXHAUSTED"
    TOO_FEW_CONTRIBUTORS = "TOO_FEW_CONTRIBUTORS"
    SECRET_UNAVAILABLE = "SECRET_UNAVAILABLE"  # noqa: S105 - a reason, not a password
    CONFIGURATION_INVALID = "CONFIGURATION_INVALID"
    DATA_INVALID = "DATA_INVALID"
    MODEL_INVALID = "MODEL_INVALID"
    # Key authority
    AUDIT_BROKEN = "AUDIT_BROKEN"
    # Resources
    LIMIT_REACHED = "LIMIT_REACHED"
    RATE_LIMITED = "RATE_LIMITED"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    STORE_FULL = "STORE_FULL"
    WORKER_FAILED = "WORKER_FAILED"
    RECORD_UNREADABLE = "RECORD_UNREADABLE"


class DomainError(Exception):
    """A refusal with a named reason. `str(error)` is safe to show to anyone."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __repr__(self) -> str:
        return f"DomainError({self.reason}, {self.message!r})"

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, ...]]:
        """Kinds of it are made from other arguments than an exception keeps: without this none survives a copy, and a
        pool whose worker raises one waits for ever.
        """
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[BaseException], arguments: tuple[Any, ...], fields: Mapping[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class RetryLaterError(DomainError):
    """The same call may succeed after `retry_after_s` seconds."""

    def __init__(self, reason: Reason, message: str, retry_after_s: float) -> None:
        super().__init__(reason, message)
        self.retry_after_s = retry_after_s
