"""Admits a call if its caller's rate and certificate allow it. On every RPC of every server, before the servicer.

In this order: rate, certificate, role, and only then a request is read, its size checked, its bytes counted, and it is
parsed and its scope checked. So a refused call costs no more than its headers, and a refusal counts like a call. gRPC
itself would read and parse the request of a unary call first; here every handler takes a stream of bytes, which is the
same on the wire.
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

import grpc
import structlog

from services.common.arrival import in_time, parsed
from services.common.rates import Caller, Rates
from services.common.repeats import Repeats
from services.common.revocations import Revocations
from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import counter
from shelora.transport.certificates import Certificate, read_certificate, utc_now
from shelora.transport.identity import SERVERS, Identity
from shelora.transport.permissions import check_role, check_scope, largest_request
from shelora.transport.revocations import RevokedError
from shelora.transport.status import translated

_REASONS: Final = [
    reason.value
    for reason in (
        Reason.UNAUTHENTICATED,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CERTIFICATE_REVOKED,
        Reason.PERMISSION_DENIED,
        Reason.STORE_UNAVAILABLE,
    )
]
DENIALS: Final = counter("rpc_denied_total", "RPCs refused for who called.", {"reason": _REASONS})
TLS_VERSION: Final = b"TLSv1.3"

ARRIVAL_S: Final = 30.0
"""Seconds in which the first request of a call must have arrived: longer than our channels' own deadline."""

PARSED_WEIGHT: Final = 64
"""Bytes of a stream that a byte of a request of its own counts for: it is parsed at once while all others wait."""

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_MaybeHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Denial:
    """A call that was refused for who called."""

    method: str
    """`/service/method`."""

    caller: Identity | None
    """Whom the caller's certificate names, valid or not; None if it showed none of this system."""

    reason: Reason


OnDenied = Callable[[Denial], Awaitable[None]]
"""Told of a refusal before it is answered; must not raise."""


async def untold(denial: Denial) -> None:
    """For servers that keep no record of refusals beyond metrics and logs."""


class Guard(grpc.aio.ServerInterceptor):
    """Interceptor: `shelora.transport.permissions` and rates, enforced. Servers may ask one another as they like.

    Args:
        rates: Of this server.
        revocations: What it knows of them.
        on_denied: Told of every refusal.
        clock: What certificates are held against.
        arrival_s: As ARRIVAL_S.
    """

    def __init__(
        self,
        rates: Rates,
        revocations: Revocations,
        on_denied: OnDenied = untold,
        clock: Callable[[], datetime] = utc_now,
        arrival_s: float = ARRIVAL_S,
    ) -> None:
        self._rates = rates
        self._revocations = revocations
        self._on_denied = on_denied
        self._clock = clock
        self._arrival_s = arrival_s
        self._repeats: Repeats[Denial] = Repeats(_log_repeats)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_MaybeHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _MaybeHandler:
        """Wraps every handler; an unknown method (None) passes to its UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        return handler and _wrapped(handler, self, handler_call_details.method)

    def flush(self) -> None:
        """Logs the refusals that are only counted yet."""
        self._repeats.flush()

    @asynccontextmanager
    async def admitted(
        self,
        arriving: AsyncIterator[bytes],
        context: _Context,
        handler: Any,  # noqa: ANN401 - of gRPC
        method: str,
    ) -> AsyncIterator[Any]:
        """The request, or the stream of them, for the servicer while it serves.

        Raises: DomainError RATE_LIMITED; UNAUTHENTICATED, CERTIFICATE_EXPIRED, CERTIFICATE_REVOKED (also of a call
        under way), PERMISSION_DENIED, STORE_UNAVAILABLE, counted, logged and told; TRANSFER_TOO_LARGE,
        TRANSFER_TRUNCATED, INVALID_ARGUMENT for what is not a request.
        """
        with self._rated(_claimed(context), context) as caller:
            async with self._denials_told(method, context):
                certificate = self._certificate(context)
                identity = certificate.identity if certificate else None
                check_role(method, identity)
            call = _Call(method=method, identity=identity, caller=caller, context=context, handler=handler)
            requests = self._requests(arriving, call)
            try:
                async with self._revocations.until_revoked(certificate):
                    yield requests if handler.request_streaming else await anext(requests)
            except RevokedError as error:
                await self._tell(error, method, context)
                raise
            finally:
                await requests.aclose()

    def _rated(self, identity: Identity | None, context: _Context) -> AbstractContextManager[Caller | None]:
        """Counts the call of a client, or of a host that shows no certificate. Raises RATE_LIMITED."""
        if identity is None:
            return self._rates.call(context.peer().rpartition(":")[0])
        return nullcontext() if identity.role in SERVERS else self._rates.call(identity.uri)

    async def _requests(self, arriving: AsyncIterator[bytes], call: "_Call") -> AsyncGenerator[Any, None]:
        """Each request, checked as it arrives, and no faster than its caller may send."""
        async for raw in in_time(arriving, self._arrival_s):
            if len(raw) > (most := largest_request(call.method)):
                raise DomainError(
                    Reason.TRANSFER_TOO_LARGE,
                    f"the request has {len(raw)} bytes, at most {most} are accepted",
                )
            if call.caller is not None:
                weight = 1 if call.handler.request_streaming else PARSED_WEIGHT
                await self._rates.receive(call.caller, weight * len(raw))
            request = parsed(call.handler.request_deserializer, raw)
            async with self._denials_told(call.method, call.context):
                check_scope(request, call.identity)
            yield request

    def _certificate(self, context: _Context) -> Certificate | None:
        """The caller's certificate; None if the port asks for none."""
        if list((context.auth_context() or {}).get("ssl_tls_version", ())) != [TLS_VERSION]:
            raise DomainError(Reason.UNAUTHENTICATED, "the connection is not TLS 1.3")
        try:
            certificate = certificate_of(context)
        except DomainError as error:
            raise DomainError(Reason.UNAUTHENTICATED, error.message) from error
        if certificate is not None and certificate.expires <= self._clock():
            raise DomainError(
                Reason.CERTIFICATE_EXPIRED,
                f"the certificate of {certificate.identity} expired at "
                f"{certificate.expires:%Y-%m-%d %H:%M:%S} UTC",
            )
        if certificate is not None:
            self._revocations.check(certificate)
        return certificate

    @asynccontextmanager
    async def _denials_told(self, method: str, context: _Context) -> AsyncIterator[None]:
        try:
            yield
        except DomainError as error:
            await self._tell(error, method, context)
            raise

    async def _tell(self, error: DomainError, method: str, context: _Context) -> None:
        DENIALS.labels(error.reason).inc()
        denial = Denial(method, _claimed(context), error.reason)
        if self._repeats.is_new(denial):
            _log.warning("rpc_denied", method=method, reason=error.reason, why=error.message)
        await self._on_denied(denial)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call whose caller is known."""

    method: str
    identity: Identity | None
    caller: Caller | None
    context: _Context
    handler: Any


def certificate_of(context: _Context) -> Certificate | None:
    """The caller's certificate as TLS verified it; None if it showed none."""
    shown = list((context.auth_context() or {}).get("x509_pem_cert", ()))
    return read_certificate(shown[0]) if shown else None


def _claimed(context: _Context) -> Identity | None:
    try:
        certificate = certificate_of(context)
    except DomainError:
        return None
    return certificate.identity if certificate else None


def _log_repeats(denial: Denial, count: int) -> None:
    identity = denial.caller.uri if denial.caller else ""
    _log.warning(
        "rpc_denied_again", method=denial.method, reason=denial.reason, identity=identity, count=count
    )


def _wrapped(handler: Any, guard: Guard, method: str) -> _Handler:  # noqa: ANN401 - one type, four shapes
    """`handler` behind the guard. It takes a stream of serialized requests, whatever it took before."""
    sides = (handler.request_streaming, handler.response_streaming)
    behavior = getattr(handler, "_".join("stream" if streaming else "unary" for streaming in sides))
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _answering_stream(behavior, handler, guard, method), None, handler.response_serializer
        )
    return grpc.stream_unary_rpc_method_handler(
        _answering_once(behavior, handler, guard, method), None, handler.response_serializer
    )


def _answering_once(behavior: Any, handler: Any, guard: Guard, method: str) -> Any:  # noqa: ANN401 - of gRPC
    async def guarded(arriving: AsyncIterator[bytes], context: _Context) -> Any:  # noqa: ANN401 - any message
        async with (
            translated(context),
            guard.admitted(arriving, context, handler, method) as admitted,
        ):
            return await behavior(admitted, context)

    return guarded


def _answering_stream(behavior: Any, handler: Any, guard: Guard, method: str) -> Any:  # noqa: ANN401 - of gRPC
    if not inspect.isasyncgenfunction(behavior):  # it writes to the context itself
        return _answering_once(behavior, handler, guard, method)

    async def guarded(arriving: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
        async with (
            translated(context),
            guard.admitted(arriving, context, handler, method) as admitted,
            aclosing(behavior(admitted, context)) as responses,
        ):
            async for response in responses:
                yield response

    return guarded
