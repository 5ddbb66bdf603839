"""Admits a call if its caller's certificate and rate allow it. On every RPC of every server, before the servicer."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

import grpc
import structlog

from services.shell.rates import Caller, Rates
from services.shell.revocations import Revocations
from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import counter
from shelora.transport.certificates import Certificate, read_certificate, utc_now
from shelora.transport.identity import SERVERS, Identity
from shelora.transport.permissions import check_role, check_scope
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
    """

    def __init__(
        self,
        rates: Rates,
        revocations: Revocations,
        on_denied: OnDenied = untold,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._rates = rates
        self._revocations = revocations
        self._on_denied = on_denied
        self._clock = clock

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_MaybeHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _MaybeHandler:
        """Wraps every handler; an unknown method (None) passes to its UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        admission = _Admission(method, self._rates, self._revocations, self._on_denied, self._clock)
        return _wrapped(handler, admission)


def certificate_of(context: _Context) -> Certificate | None:
    """The caller's certificate as TLS verified it; None if it showed none."""
    shown = list((context.auth_context() or {}).get("x509_pem_cert", ()))
    return read_certificate(shown[0]) if shown else None


class _Admission:
    """The checks of one method."""

    def __init__(
        self,
        method: str,
        rates: Rates,
        revocations: Revocations,
        on_denied: OnDenied,
        clock: Callable[[], datetime],
    ) -> None:
        self._method = method
        self._rates = rates
        self._revocations = revocations
        self._on_denied = on_denied
        self._clock = clock

    @asynccontextmanager
    async def admitted(self, request: Any, context: _Context, *, streaming: bool) -> AsyncIterator[Any]:  # noqa: ANN401 - any message
        """The request, or the stream of them, for the servicer while it serves.

        Raises: DomainError UNAUTHENTICATED, CERTIFICATE_EXPIRED, CERTIFICATE_REVOKED (also of a call under way),
        PERMISSION_DENIED, STORE_UNAVAILABLE, counted, logged and told; RATE_LIMITED.
        """
        async with self._denials_told(context):
            certificate = self._caller(context)
            identity = certificate.identity if certificate else None
            check_role(self._method, identity)
            if not streaming:
                check_scope(request, identity)
        try:
            with self._rated(identity, context) as caller:
                async with self._revocations.until_revoked(certificate):
                    yield self._requests(request, identity, caller, context) if streaming else request
        except RevokedError as error:
            await self._tell(error, context)
            raise

    def _rated(self, identity: Identity | None, context: _Context) -> AbstractContextManager[Caller | None]:
        """Counts the call of a client, or of a host that shows no certificate. Raises RATE_LIMITED."""
        if identity is None:
            return self._rates.call(context.peer().rpartition(":")[0])
        return nullcontext() if identity.role in SERVERS else self._rates.call(identity.uri)

    async def _requests(
        self,
        requests: AsyncIterator[Any],
        identity: Identity | None,
        caller: Caller | None,
        context: _Context,
    ) -> AsyncIterator[Any]:
        """Each request of a stream, checked as it arrives, and no faster than its caller may send."""
        async for request in requests:
            async with self._denials_told(context):
                check_scope(request, identity)
            if caller is not None:
                await self._rates.receive(caller, request.ByteSize())
            yield request

    def _caller(self, context: _Context) -> Certificate | None:
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
    async def _denials_told(self, context: _Context) -> AsyncIterator[None]:
        try:
            yield
        except DomainError as error:
            await self._tell(error, context)
            raise

    async def _tell(self, error: DomainError, context: _Context) -> None:
        DENIALS.labels(error.reason).inc()
        _log.warning("rpc_denied", method=self._method, reason=error.reason, why=error.message)
        await self._on_denied(Denial(self._method, _claimed(context), error.reason))


def _claimed(context: _Context) -> Identity | None:
    try:
        certificate = certificate_of(context)
    except DomainError:
        return None
    return certificate.identity if certificate else None


def _wrapped(handler: Any, admission: _Admission) -> _Handler:  # noqa: ANN401 - one type, four shapes
    """`handler` behind the admission, of the same shape (unary or stream on either side)."""
    sides = (handler.request_streaming, handler.response_streaming)
    shape = "_".join("stream" if streaming else "unary" for streaming in sides)
    admit = _answering_stream if handler.response_streaming else _answering_once
    wrap = getattr(grpc, f"{shape}_rpc_method_handler")
    wrapped: _Handler = wrap(
        admit(getattr(handler, shape), admission, streaming=handler.request_streaming),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _answering_once(behavior: Any, admission: _Admission, *, streaming: bool) -> Any:  # noqa: ANN401 - a handler of gRPC
    async def guarded(request: Any, context: _Context) -> Any:  # noqa: ANN401 - any message
        async with (
            translated(context),
            admission.admitted(request, context, streaming=streaming) as admitted,
        ):
            return await behavior(admitted, context)

    return guarded


def _answering_stream(behavior: Any, admission: _Admission, *, streaming: bool) -> Any:  # noqa: ANN401 - a handler of gRPC
    if not inspect.isasyncgenfunction(behavior):  # it writes to the context itself
        return _answering_once(behavior, admission, streaming=streaming)

    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ANN401 - any message
        async with (
            translated(context),
            admission.admitted(request, context, streaming=streaming) as admitted,
            aclosing(behavior(admitted, context)) as responses,
        ):
            async for response in responses:
                yield response

    return guarded
