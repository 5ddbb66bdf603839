"""Channels to servers, and calls that survive a server's restart."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import tenacity

from shelora.errors import DomainError
from shelora.transport.address import HostPort, check_plaintext
from shelora.transport.proxy import channel_options
from shelora.transport.renewing import RenewingChannel
from shelora.transport.status import (
    STATUS_BY_REASON,
    distrusts,
    error_from_rpc,
    lost_status,
    retry_after_s,
)
from shelora.transport.tls import Credentials

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

OpenChannel: TypeAlias = Callable[[str, Credentials | None], grpc.aio.Channel]
"""`open_channel`, or what stands in for it."""

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Largest message in either direction. Bulk travels in pieces of 256 KiB; the largest single messages are a
federation's history and the layout of a model with thousands of matrices, which reach 1 MiB."""

KEEPALIVE_MS: Final = 30_000
"""Idle time after which a connection is probed; NATs and load balancers forget one after minutes."""

MAX_CONNECTIONS: Final = 30_000
"""Connections of one server: more than a federation has members, less than the files that a process may open."""

TIMEOUT_S: Final = 20.0
"""Default deadline of one attempt at a unary call."""

RETRY_S: Final = 60.0
"""Default time during which a call is tried again: longer than a rolling restart of one replica."""

_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 5.0

_LONGEST_RETRY_AFTER_S: Final = 30.0
"""Longest that a server can make its callers wait."""

_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Cancelled by the server, which is shutting down: our own cancellation is an asyncio.CancelledError.
        grpc.StatusCode.CANCELLED,
    }
)

_SIZE_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

_KEEPALIVE_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

_CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_SIZE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    # The time that connecting may take, whatever its name says: a handshake with a busy or far server takes seconds.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A name server that is silent must not hold a caller for the two minutes of the default.
    ("grpc.dns_ares_query_timeout", 5_000),
    # A headless Kubernetes service resolves to every replica; the default policy would use only one.
    ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
)

SERVER_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_SIZE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    # Accept the keepalive probes of our own channels, which the default would answer with "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 3),
    # A connection shows the certificate it began with. Ending it after a while holds long streams to expiry, too, and
    # lets callers look up the server's name again: that is how they find new replicas behind it.
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    # A second process on the same port is a mistake; the default would share the port between both.
    ("grpc.so_reuseport", 0),
    # Before its handshake is done a connection is a stranger's; the default waits for two minutes.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
)
"""Options of every server, the counterpart of those that `open_channel` sets."""

STRANGER_MESSAGE_BYTES: Final = 16 * 1024
"""Largest message where callers show no certificate: a token and a signing request have 1 KiB."""

STRANGER_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_send_message_length", STRANGER_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", STRANGER_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 4096),
    ("grpc.absolute_max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_allowed_incoming_connections", 256),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Enrolling and probing are one short call each.
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    # Without probes of the bandwidth no more is buffered of a stream than the 64 KiB of HTTP/2.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.so_reuseport", 0),
)
"""Options of a port where anybody may call. gRPC has resource quotas for that, but not in Python: these bound what each
connection may hold, and how many there are."""


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to `address` (`host:port`); it connects when first used and reconnects by itself.

    Close it, or use it as an async context manager. Renewed credentials are used from the next call on.

    Args:
        address: Whom to call; the server's certificate must be for this name or address.
        credentials: Both sides' identities. None is for tests: plaintext, on this machine only.

    Raises: DomainError CONFIGURATION_INVALID if the address is malformed, or would be plaintext to another machine.
    """
    if credentials is None:
        check_plaintext(address)
        return grpc.aio.insecure_channel(address, options=(*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)))
    target = HostPort.parse(address)
    options = (*_CHANNEL_OPTIONS, *channel_options(target))
    return RenewingChannel(
        address,
        credentials.generation,
        lambda: grpc.aio.secure_channel(address, credentials.channel_credentials(), options=options),
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: by the status of an RPC, or by the reason of a DomainError."""
    if isinstance(error, DomainError):
        return STATUS_BY_REASON[error.reason] in _TRANSIENT
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    return lost_status(error) or (error.code() in _TRANSIENT and not distrusts(error))


def retrying(
    *,
    retry_s: float = RETRY_S,
    attempts: int | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tenacity.AsyncRetrying:
    """Attempts at an idempotent call, with random waits of exponentially growing bound between them.

        async for attempt in retrying():
            with attempt:
                response = await stub.Call(request)

    Only transient errors (`is_transient`) are retried; the last error is raised as it is. A server that says when to
    come again is obeyed.

    Args:
        retry_s: No attempt starts later than this after the first. 0 for a single attempt.
        attempts: Most attempts; None for no limit but the time.
        sleep: Waits the given seconds; for tests.
    """
    stop = tenacity.stop_before_delay(retry_s)
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=_wait_s,
        stop=stop if attempts is None else stop | tenacity.stop_after_attempt(attempts),
        reraise=True,
        sleep=sleep,
    )


_random_wait = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: random, and what the server asks for besides, up to a bound."""
    error = state.outcome.exception() if state.outcome else None
    return min(retry_after_s(error), _LONGEST_RETRY_AFTER_S) + _random_wait(state)


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    *,
    timeout_s: float = TIMEOUT_S,
    retry_s: float = RETRY_S,
    metadata: Sequence[tuple[str, str | bytes]] = (),
) -> _Response:
    """The response to an idempotent unary call, tried again while it fails for a reason that may pass.

    Args:
        method: Method of an asynchronous stub.
        request: Sent anew in every attempt.
        timeout_s: Deadline of one attempt.
        retry_s: No attempt starts later than this after the first. 0 for a single attempt.
        metadata: Sent with every attempt.

    Raises: DomainError with the server's reason, or STORE_UNAVAILABLE if no server could be reached.
    """
    try:
        return await retrying(retry_s=retry_s)(_attempt, method, request, timeout_s, tuple(metadata))
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, getattr(method, "address", "")) from error


async def _attempt(
    method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout_s: float,
    metadata: tuple[tuple[str, str | bytes], ...],
) -> _Response:
    return await method(request, timeout=timeout_s, metadata=metadata)


async def call_with_stream(
    method: grpc.aio.StreamUnaryMultiCallable[_Request, _Response],
    requests: Callable[[], AsyncIterator[_Request] | Iterator[_Request]],
    *,
    timeout_s: float = TIMEOUT_S,
    retry_s: float = RETRY_S,
) -> _Response:
    """As `call`, for an idempotent RPC that takes a stream.

    Args:
        method: Method of an asynchronous stub.
        requests: Begins the stream anew in every attempt.
        timeout_s: Deadline of one attempt.
        retry_s: No attempt starts later than this after the first. 0 for a single attempt.

    Raises: as `call`.
    """

    async def attempt() -> _Response:
        return await method(requests(), timeout=timeout_s)

    try:
        return await retrying(retry_s=retry_s)(attempt)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, getattr(method, "address", "")) from error
