"""The one table from reasons to gRPC status codes, and both directions of the translation.

The code of a reason decides whether callers try again (`shelora.transport.channel.is_transient`): only
reasons that pass by themselves map to UNAVAILABLE or RESOURCE_EXHAUSTED.
"""

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any, Final

import grpc
import structlog

from shelora.errors import DomainError, Reason, RetryLaterError
from shelora.text import printable
from shelora.transport.proxy import named

REASON_METADATA: Final = "shelora-reason"
"""Key of the trailing metadata that carries the reason."""

RETRY_AFTER_METADATA: Final = "shelora-retry-after-ms"
"""Key of the trailing metadata that says after how many milliseconds a call that came too soon may come again."""

INTERNAL_MESSAGE: Final = "internal error"

MAX_DETAILS: Final = 500
"""Characters of a message that travel. Encoded they take at most 12 bytes each, and peers accept 8 KiB of trailers."""

_Code = grpc.StatusCode
_log = structlog.get_logger(__name__)

STATUS_BY_REASON: Final[Mapping[Reason, grpc.StatusCode]] = MappingProxyType(
    {
        # Requests
        Reason.INVALID_ARGUMENT: _Code.INVALID_ARGUMENT,
        Reason.UNAUTHENTICATED: _Code.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED: _Code.PERMISSION_DENIED,
        Reason.INTERNAL: _Code.INTERNAL,
        Reason.VERSION_REFUSED: _Code.FAILED_PRECONDITION,
        # Identities
        Reason.CERTIFICATE_EXPIRED: _Code.UNAUTHENTICATED,
        Reason.CERTIFICATE_REVOKED: _Code.UNAUTHENTICATED,
        Reason.CLIENT_EXISTS: _Code.ALREADY_EXISTS,
        Reason.SERVER_UNTRUSTED: _Code.FAILED_PRECONDITION,
        Reason.TOKEN_REFUSED: _Code.UNAUTHENTICATED,
        # Federations, members, plans
        Reason.FEDERATION_UNKNOWN: _Code.NOT_FOUND,
        Reason.FEDERATION_EXISTS: _Code.ALREADY_EXISTS,
        Reason.FEDERATION_CLOSED: _Code.FAILED_PRECONDITION,
        Reason.EPOCH_RETIRED: _Code.FAILED_PRECONDITION,
        Reason.CLIENT_UNKNOWN: _Code.NOT_FOUND,
        Reason.CLIENT_REPLACED: _Code.FAILED_PRECONDITION,
        Reason.MODEL_MISMATCH: _Code.FAILED_PRECONDITION,
        Reason.PLAN_UNKNOWN: _Code.NOT_FOUND,
        Reason.PLAN_REFUSED: _Code.FAILED_PRECONDITION,
        Reason.NOT_LEADER: _Code.PERMISSION_DENIED,
        Reason.BALLOT_REFUSED: _Code.INVALID_ARGUMENT,
        Reason.PROTECTION_REFUSED: _Code.FAILED_PRECONDITION,
        # Rounds
        Reason.ROUND_UNKNOWN: _Code.NOT_FOUND,
        Reason.ROUND_NOT_COLLECTING: _Code.FAILED_PRECONDITION,
        Reason.INVALID_TRANSITION: _Code.FAILED_PRECONDITION,
        Reason.NOT_IN_COHORT: _Code.PERMISSION_DENIED,
        Reason.UPDATE_REWRITTEN: _Code.ALREADY_EXISTS,
        Reason.TOO_FEW_UPDATES: _Code.FAILED_PRECONDITION,
        Reason.EXAMPLES_MISMATCH: _Code.INVALID_ARGUMENT,
        Reason.NORM_TOO_LARGE: _Code.INVALID_ARGUMENT,
        Reason.NORM_OUTLIER: _Code.FAILED_PRECONDITION,
        Reason.RESULT_UNKNOWN: _Code.NOT_FOUND,
        Reason.RESULT_REFUSED: _Code.FAILED_PRECONDITION,
        # Shards and transfers
        Reason.LAYOUT_MISMATCH: _Code.FAILED_PRECONDITION,
        Reason.SHARD_UNKNOWN: _Code.NOT_FOUND,
        Reason.SHARD_MISSING: _Code.FAILED_PRECONDITION,
        Reason.SHARD_REWRITTEN: _Code.ALREADY_EXISTS,
        Reason.SHARD_MALFORMED: _Code.INVALID_ARGUMENT,
        Reason.TRANSFER_TOO_LARGE: _Code.OUT_OF_RANGE,
        Reason.TRANSFER_TRUNCATED: _Code.DATA_LOSS,
        Reason.TRANSFER_OFFSET: _Code.OUT_OF_RANGE,
        Reason.DIGEST_MISMATCH: _Code.DATA_LOSS,
        Reason.SHAPE_MISMATCH: _Code.INVALID_ARGUMENT,
        Reason.VALUE_NOT_FINITE: _Code.INVALID_ARGUMENT,
        Reason.VALUE_OUT_OF_RANGE: _Code.INVALID_ARGUMENT,
        # Ciphertexts
        Reason.CIPHERTEXT_TRUNCATED: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_MALFORMED: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_FOREIGN_KEY: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_FOREIGN_PARAMETERS: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_WRONG_SCALE: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_WRONG_SHAPE: _Code.INVALID_ARGUMENT,
        Reason.CIPHERTEXT_COEFFICIENT_RANGE: _Code.INVALID_ARGUMENT,
        # Sums that a committee opens
        Reason.SIGNATURE_REFUSED: _Code.INVALID_ARGUMENT,
        Reason.COMMITTEE_REFUSED: _Code.FAILED_PRECONDITION,
        Reason.DEALING_REFUSED: _Code.INVALID_ARGUMENT,
        Reason.SET_REFUSED: _Code.FAILED_PRECONDITION,
        Reason.ROUND_SPENT: _Code.FAILED_PRECONDITION,
        Reason.QUORUM_MISSING: _Code.FAILED_PRECONDITION,
        Reason.ANSWERS_REFUSED: _Code.FAILED_PRECONDITION,
        Reason.SUM_UNREADABLE: _Code.FAILED_PRECONDITION,
        Reason.COMMITTEE_INCOMPLETE: _Code.FAILED_PRECONDITION,
        Reason.STATEMENT_REWRITTEN: _Code.ALREADY_EXISTS,
        Reason.STEP_OVER: _Code.FAILED_PRECONDITION,
        Reason.ANSWERS_MISSING: _Code.FAILED_PRECONDITION,
        # Agents
        Reason.DISK_UNAVAILABLE: _Code.FAILED_PRECONDITION,
        Reason.MEMORY_UNAVAILABLE: _Code.RESOURCE_EXHAUSTED,
        Reason.PACKAGE_UNUSABLE: _Code.FAILED_PRECONDITION,
        Reason.PRIVACY_EXHAUSTED: _Code.FAILED_PRECONDITION,
        Reason.TOO_FEW_CONTRIBUTORS: _Code.FAILED_PRECONDITION,
        Reason.SECRET_UNAVAILABLE: _Code.FAILED_PRECONDITION,
        Reason.CONFIGURATION_INVALID: _Code.FAILED_PRECONDITION,
        Reason.DATA_INVALID: _Code.FAILED_PRECONDITION,
        Reason.MODEL_INVALID: _Code.FAILED_PRECONDITION,
        # Key authority
        Reason.AUDIT_BROKEN: _Code.DATA_LOSS,
        # Resources: all but limits pass, so callers try again
        Reason.LIMIT_REACHED: _Code.FAILED_PRECONDITION,
        Reason.RATE_LIMITED: _Code.RESOURCE_EXHAUSTED,
        Reason.STORE_FULL: _Code.RESOURCE_EXHAUSTED,
        Reason.STORE_UNAVAILABLE: _Code.UNAVAILABLE,
        Reason.WORKER_FAILED: _Code.UNAVAILABLE,
        # During an upgrade a newer replica reads it
        Reason.RECORD_UNREADABLE: _Code.UNAVAILABLE,
    }
)

_REASON_BY_BARE_STATUS: Final[Mapping[grpc.StatusCode, Reason]] = MappingProxyType(
    {
        _Code.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
        _Code.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
        _Code.UNAVAILABLE: Reason.STORE_UNAVAILABLE,
        _Code.DEADLINE_EXCEEDED: Reason.STORE_UNAVAILABLE,
        _Code.CANCELLED: Reason.STORE_UNAVAILABLE,
        _Code.ABORTED: Reason.STORE_UNAVAILABLE,
        _Code.RESOURCE_EXHAUSTED: Reason.STORE_UNAVAILABLE,
    }
)
"""Reasons for failures that gRPC itself reports: no server, no answer in time, no room."""

_FAILED_WRITE: Final = "SendMessageOperation"
"""How grpc.aio says that a message of a stream could not be sent."""

_WRONG_NAME: Final = "Hostname Verification Check failed"
"""How gRPC says that a certificate does not name the host that was called."""

_HINTS: Final = {
    "Connection refused": "nothing listens there: see that the server runs, and that the address is right",
    "address lookup failed": "no such host is known here: see the address",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS: see the address and the port",
}
"""What to do, by part of what gRPC says."""

_WRONG_SIGNER: Final = (
    "certificate signature failure",
    "unable to get local issuer certificate",
    "self signed certificate",
    "self-signed certificate",
    "unsupported certificate purpose",
)
"""How it says that a certificate is of another authority, or its holder no server."""


@contextmanager
def for_callers() -> Iterator[None]:
    """Around calls that a server makes for its callers: a refusal of its own certificate passes, and is none of theirs.

    Raises: DomainError STORE_UNAVAILABLE in place of CERTIFICATE_EXPIRED and CERTIFICATE_REVOKED.
    """
    try:
        yield
    except DomainError as error:
        if error.reason not in {Reason.CERTIFICATE_EXPIRED, Reason.CERTIFICATE_REVOKED}:
            raise
        message = f"this server waits for another certificate: {error.message}"
        raise DomainError(Reason.STORE_UNAVAILABLE, message) from error


@asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the RPC with the status of a DomainError raised inside, its message and `shelora-reason`.

    Anything else unexpected is logged with its traceback and ends the RPC with INTERNAL and no detail.
    Cancellation and `context.abort` pass.
    """
    try:
        yield
    except DomainError as error:
        retry_after_s = error.retry_after_s if isinstance(error, RetryLaterError) else None
        await _abort(context, error.reason, error.message, retry_after_s)
    except grpc.aio.AbortError:
        raise
    except Exception:  # noqa: BLE001 - the boundary of the process: whatever it is, the caller must not see it
        _log.exception("rpc_failed_unexpectedly")
        await _abort(context, Reason.INTERNAL, INTERNAL_MESSAGE)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any],
    reason: Reason,
    message: str,
    retry_after_s: float | None = None,
) -> None:
    metadata = [(REASON_METADATA, reason.value)]
    if retry_after_s is not None:
        metadata.append((RETRY_AFTER_METADATA, str(math.ceil(1000 * retry_after_s))))
    try:
        await context.abort(STATUS_BY_REASON[reason], message[:MAX_DETAILS], tuple(metadata))
    except grpc.aio.InternalError as error:  # the caller is gone: there is nobody to tell
        raise grpc.aio.AbortError from error


def retry_after_s(error: BaseException | None) -> float:
    """Seconds that the server asks to wait before the next attempt; 0 if it asks for none."""
    metadata = error.trailing_metadata() or () if isinstance(error, grpc.aio.AioRpcError) else ()
    for key, value in metadata:
        if key == RETRY_AFTER_METADATA and str(value).isdecimal():
            return int(value) / 1000
    return 0.0


def error_from_rpc(error: grpc.RpcError, address: str = "") -> DomainError:
    """The DomainError that the server raised, or the nearest one for a failure of gRPC itself.

    Without a (known) reason, a failure that may pass becomes STORE_UNAVAILABLE, any other INTERNAL; then the
    message starts with the name of the status. A server that is not who it should be becomes SERVER_UNTRUSTED.
    What the server says is made printable.

    Args:
        error: What gRPC raised.
        address: Who was called, `host:port`, for messages about a server that is absent or someone else.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return DomainError(Reason.INTERNAL, "the RPC failed without a status")
    details = printable(error.details() or "")
    reason = _reason_of(error)
    if reason is not None:
        return DomainError(reason, details)
    if distrusts(error):
        return DomainError(Reason.SERVER_UNTRUSTED, _why_distrusted(details, address))
    if lost_status(error):
        return DomainError(Reason.STORE_UNAVAILABLE, "the server ended the call; why did not arrive")
    fallback = _REASON_BY_BARE_STATUS.get(error.code(), Reason.INTERNAL)
    where = f" at {address}{named(address)}" if address else ""
    return DomainError(
        fallback, f"{error.code().name}{where}: {details}{_hint(error.code(), details) if address else ''}"
    )


def _hint(code: grpc.StatusCode, details: str) -> str:
    """What a person can do about a failure of gRPC itself, if it says why."""
    if code is _Code.UNIMPLEMENTED:
        return "; the server there is of another kind or version: see the address"
    if code is _Code.DEADLINE_EXCEEDED:
        return "; see that the server runs, and that the address and port are those of it"
    return next((f"; {hint}" for sign, hint in _HINTS.items() if sign in details), "")


def lost_status(error: grpc.aio.AioRpcError) -> bool:
    """Whether grpc.aio overwrote the server's status, so that only another attempt can tell it.

    It does so when a server refuses a stream while the client still writes it (grpc/grpc#36066).
    """
    return (
        error.code() is _Code.INTERNAL
        and _reason_of(error) is None
        and _FAILED_WRITE in (error.debug_error_string() or "")
    )


def distrusts(error: grpc.aio.AioRpcError) -> bool:
    """Whether this side refused the server's certificate for a reason that does not pass by itself."""
    details = error.details() or ""
    return error.code() is _Code.UNAVAILABLE and any(
        sign in details for sign in (_WRONG_NAME, *_WRONG_SIGNER)
    )


def _why_distrusted(details: str, address: str) -> str:
    host = address.rpartition(":")[0] or "the name that was called"
    if _WRONG_NAME in details:
        return (
            f"the server at {address or 'this address'} is not {host}: expected a certificate that names {host}. "
            "Call it by a name in its certificate, or enrol it with this name (shelora token create --name)"
        )
    return (
        f"the certificate of the server at {address or 'this address'} is not of the authority that signed ours: "
        f"expected {host} in this cluster"
    )


def _reason_of(error: grpc.aio.AioRpcError) -> Reason | None:
    """The reason in the trailing metadata, or None if there is none that this version knows."""
    for key, value in error.trailing_metadata() or ():
        if key == REASON_METADATA and value in Reason.__members__:
            return Reason[str(value)]
    return None
