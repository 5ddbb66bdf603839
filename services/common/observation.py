"""Counts, times and logs every RPC of a server's own services."""

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pool

from shelora.telemetry.metrics import at_zero, counter, histogram

RPC_TOTAL: Final = counter("rpc_total", "RPCs that ended.", {"service": [], "method": [], "status": []})
RPC_SECONDS: Final = histogram(
    "rpc_duration_seconds",
    "Time from an RPC's arrival to its end; of a stream, its whole life.",
    {"service": [], "method": []},
)

_STATUS_BY_NUMBER: Final = {status.value[0]: status for status in grpc.StatusCode}
_log = structlog.get_logger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_MaybeHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class RpcObserver(grpc.aio.ServerInterceptor):
    """Interceptor: `shelora_rpc_total`, `shelora_rpc_duration_seconds`, an access log at debug level.

    Health and reflection are not observed; their calls would drown the rest.

    Args:
        service_names: Full names of the services to observe. Their generated modules must be imported.

    Raises: KeyError if a service is unknown.
    """

    def __init__(self, service_names: Sequence[str]) -> None:
        self._service_names = frozenset(service_names)
        for service in service_names:
            _start_at_zero(service)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_MaybeHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _MaybeHandler:
        """Wraps the handler of an observed method; an unknown method (None) passes."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or service not in self._service_names:
            return handler
        return _wrapped(handler, service, method)


def _start_at_zero(service: str) -> None:
    descriptor = descriptor_pool.Default().FindServiceByName(service)
    labels = {"service": [service], "method": [method.name for method in descriptor.methods]}
    at_zero(RPC_SECONDS, labels)
    at_zero(RPC_TOTAL, {**labels, "status": [status.name for status in grpc.StatusCode]})


def _wrapped(handler: Any, service: str, method: str) -> _Handler:  # noqa: ANN401 - one type, four shapes
    """`handler` under observation, of the same shape (unary or stream on either side)."""
    sides = (handler.request_streaming, handler.response_streaming)
    shape = "_".join("stream" if streaming else "unary" for streaming in sides)
    observe = _stream_observed if handler.response_streaming else _unary_observed
    wrap = getattr(grpc, f"{shape}_rpc_method_handler")
    wrapped: _Handler = wrap(
        observe(getattr(handler, shape), service, method),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _unary_observed(behavior: Any, service: str, method: str) -> Any:  # noqa: ANN401 - a handler of gRPC
    async def observed(request: Any, context: _Context) -> Any:  # noqa: ANN401 - any message
        with _observation(service, method, context):
            return await behavior(request, context)

    return observed


def _stream_observed(behavior: Any, service: str, method: str) -> Any:  # noqa: ANN401 - a handler of gRPC
    if not inspect.isasyncgenfunction(behavior):  # it writes to the context itself
        return _unary_observed(behavior, service, method)

    async def observed(request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ANN401 - any message
        with _observation(service, method, context):
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response

    return observed


@contextmanager
def _observation(service: str, method: str, context: _Context) -> Iterator[None]:
    start_s = time.perf_counter()
    peer = (
        context.peer()
    )  # now: a cancelled stream may be finalized after its call is freed, and asking it then crashes
    status = grpc.StatusCode.CANCELLED  # what is left when neither of the branches below is reached
    try:
        yield
        status = _status_set(context, otherwise=grpc.StatusCode.OK)
    except Exception:
        status = _status_set(context, otherwise=grpc.StatusCode.UNKNOWN)
        raise
    finally:
        duration_s = time.perf_counter() - start_s
        RPC_TOTAL.labels(service, method, status.name).inc()
        RPC_SECONDS.labels(service, method).observe(duration_s)
        _log.debug(
            "rpc",
            service=service,
            method=method,
            status=status.name,
            duration_s=duration_s,
            peer=peer,
        )


def _status_set(context: _Context, *, otherwise: grpc.StatusCode) -> grpc.StatusCode:
    """The status that the handler set or aborted with; gRPC holds it as a number, 0 while unset."""
    code: Any = context.code()
    status = _STATUS_BY_NUMBER[code] if isinstance(code, int) else code
    return status if status not in {None, grpc.StatusCode.OK} else otherwise
