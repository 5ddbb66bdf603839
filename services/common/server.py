"""A gRPC server with health, reflection, metrics, supervised background work and a shutdown that drains."""

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.arrival import in_time, parsed
from services.common.guard import Guard, OnDenied, untold
from services.common.observation import RpcObserver
from services.common.rates import RateLimits, Rates
from services.common.readiness import Readiness
from services.common.revocations import Revocations
from services.common.settings import ServerSettings
from shelora.errors import DomainError, Reason
from shelora.stopping import stop_signals
from shelora.telemetry.metrics import start_metrics_server
from shelora.transport.address import HostPort, check_plaintext
from shelora.transport.channel import SERVER_OPTIONS, STRANGER_OPTIONS
from shelora.transport.status import translated
from shelora.transport.tls import Credentials, TlsCredentials

Register = Callable[[grpc.aio.Server], None]
"""Adds the servicers to a server that has not started."""

Announcing = Callable[[str], AbstractAsyncContextManager[None]]
"""Entered with the address once a server serves, left when its drain begins."""

Background = Callable[[], Coroutine[Any, Any, None]]
"""Work beside the calls, until it is cancelled at the end of the drain. Returning early is fine."""

PROBES_AT_ONCE: Final = 256
"""Health checks in progress: each takes a millisecond, or PROBE_S if its caller sends nothing."""
PROBE_S: Final = 1.0

STRANGERS_AT_ONCE: Final = 64
"""Calls in progress of callers without a certificate, all together."""
STRANGERS_CALLS: Final = 8
"""Calls in progress of one host among them."""
STRANGER_ARRIVAL_S: Final = 5.0
"""Seconds in which a request of theirs must have arrived."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StrangersPort:
    """Another port, for callers without a certificate: a server of its own, with limits of its own."""

    listen: str
    """`host:port`; port 0 picks a free one."""

    credentials: Credentials
    """What secures its connections; asks callers for no certificate."""

    register: Register
    """Adds the services that a stranger may call."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a ready file says, as JSON."""

    address: str
    """Where gRPC is served, as a client on this machine reaches it: `host:port`."""

    metrics_port: int
    """Where metrics are served; -1 if they are not."""

    pid: int
    """The serving process."""

    enrolment_address: str = ""
    """Where callers without a certificate are served, on the key authority alone; else empty."""

    @classmethod
    def read(cls, path: Path) -> "Ready | None":
        """The content of a ready file, or None while there is none."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a process serves, and what goes with it."""

    names: Sequence[str]
    """Full names of the gRPC services, for reflection, health and metrics."""

    register: Register
    """Adds their servicers."""

    background: Sequence[Background] = ()
    """Work beside the calls. A crash stops the process."""

    on_drain: Sequence[Callable[[], None]] = ()
    """Told that the drain begins, so that calls without an end (streams of events) end themselves."""

    on_stop: Sequence[Callable[[], Awaitable[None]]] = ()
    """Closes what the servicers used, in this order, after the last call."""

    on_denied: OnDenied = untold
    """Told of every call that is refused for who called."""

    enrolment: StrangersPort | None = None
    """Another port, for callers without a certificate."""

    announcing: Announcing | None = None
    """Tells others that this server serves."""

    readiness: Readiness | None = None
    """Whether probes that ask for its services are to call it; without one, always."""


async def serve(
    settings: ServerSettings, service: Service, *, credentials: Credentials, revocations: Revocations
) -> None:
    """Serves until SIGTERM or SIGINT, or until background work crashes; then drains.

    The drain: `announcing` is left, health says NOT_SERVING, `on_drain` runs, no new call is accepted, calls in
    progress have `shutdown_grace_s` to finish, background work is cancelled, `on_stop` runs.

    Args:
        settings: Addresses, grace, ready file.
        service: What is served.
        credentials: This server's identity, and whose callers it accepts.
        revocations: Which of these it refuses nevertheless; its maker keeps it up to date.

    Raises:
        DomainError: CONFIGURATION_INVALID if it may not or cannot listen where the settings say.
        Exception: What background work crashed with, after the drain.
    """
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(_stop_signals())
        for close in reversed(service.on_stop):
            stack.push_async_callback(close)
        metrics_port = stack.enter_context(_metrics(settings))
        tasks = await stack.enter_async_context(_background(service.background))
        address = await stack.enter_async_context(_listening(settings, service, credentials, revocations))
        enrolling: HostPort | None = None
        if service.enrolment is not None:
            strangers = _open_to_strangers(settings, service, service.enrolment, revocations)
            enrolling = await stack.enter_async_context(strangers)
        ready = Ready(
            address=_reachable(address),
            metrics_port=metrics_port,
            pid=os.getpid(),
            enrolment_address=_reachable(enrolling) if enrolling else "",
        )
        if service.announcing is not None:
            await stack.enter_async_context(service.announcing(ready.address))
        stack.enter_context(_announced(settings.ready_file, ready))
        _log.info(
            "serving",
            listen=str(address),
            enrolment_listen=enrolling and str(enrolling),
            health_listen=settings.health_listen,
            metrics_listen=None if metrics_port < 0 else str(HostPort(settings.metrics_host, metrics_port)),
            certificate_names=list(_names(credentials)),
        )
        await _until(stop, tasks)
        _log.info("draining", grace_s=settings.shutdown_grace_s)


@asynccontextmanager
async def running_server(
    service_names: Sequence[str],
    register: Register,
    settings: ServerSettings | None = None,
    *,
    credentials: Credentials | None = None,
    revocations: Revocations | None = None,
    on_denied: OnDenied = untold,
) -> AsyncIterator[str]:
    """For tests: the same server in this process, on a free port, without signals, metrics or ready file.

    Without credentials it speaks plaintext, on this machine only, and admits everyone to everything. Without
    revocations nobody is revoked.

    Yields: Its address, `127.0.0.1:port`.
    """
    settings = settings or ServerSettings(listen="127.0.0.1:0", shutdown_grace_s=0.0)
    revocations = revocations or Revocations(known=True)
    service = Service(names=service_names, register=register, on_denied=on_denied)
    async with _listening(settings, service, credentials, revocations) as address:
        yield _reachable(address)


@asynccontextmanager
async def _listening(
    settings: ServerSettings, service: Service, credentials: Credentials | None, revocations: Revocations
) -> AsyncIterator[HostPort]:
    """A started server; drains on exit. Yields its address."""

    async def publish(ready: bool) -> None:  # noqa: FBT001 - as Readiness tells it
        for name in service.names:
            await health_servicer.set(name, _SERVING if ready else _NOT_SERVING)

    guards = [Guard(Rates(settings.rate_limits), revocations, service.on_denied)] if credentials else []
    server = grpc.aio.server(interceptors=[RpcObserver(service.names), *guards], options=SERVER_OPTIONS)
    service.register(server)
    reflection.enable_server_reflection(
        (*service.names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    address = _bind(server, settings.listen, credentials)
    async with _probed(settings.health_listen, health_servicer):
        await server.start()
        await (service.readiness or Readiness()).publish(publish)
        try:
            yield address
        finally:
            await health_servicer.enter_graceful_shutdown()
            for announce in service.on_drain:
                announce()
            await server.stop(settings.shutdown_grace_s)
            for guard in guards:
                guard.flush()


@asynccontextmanager
async def _open_to_strangers(
    settings: ServerSettings,
    service: Service,
    port: StrangersPort,
    revocations: Revocations,
) -> AsyncIterator[HostPort]:
    """A started server for strangers. Yields its address."""
    guard = Guard(
        Rates(_strangers_limits(settings.rate_limits)),
        revocations,
        service.on_denied,
        arrival_s=STRANGER_ARRIVAL_S,
    )
    server = grpc.aio.server(
        interceptors=[RpcObserver(service.names), guard],
        options=STRANGER_OPTIONS,
        maximum_concurrent_rpcs=STRANGERS_AT_ONCE,
    )
    port.register(server)
    address = _bind(server, port.listen, port.credentials)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(settings.shutdown_grace_s)
        guard.flush()


def _strangers_limits(limits: RateLimits) -> RateLimits:
    """The same rates, fewer calls at once."""
    return replace(limits, concurrent=min(limits.concurrent or STRANGERS_CALLS, STRANGERS_CALLS))


@asynccontextmanager
async def _probed(listen: str | None, health_servicer: health.aio.HealthServicer) -> AsyncIterator[None]:
    """Answers health checks, and nothing else, to anyone."""
    if listen is None:
        yield
        return
    server = grpc.aio.server(options=STRANGER_OPTIONS, maximum_concurrent_rpcs=PROBES_AT_ONCE)
    server.add_generic_rpc_handlers((_check_alone(health_servicer),))
    _bound(listen, lambda: server.add_insecure_port(listen))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def _check_alone(health_servicer: health.aio.HealthServicer) -> grpc.GenericRpcHandler:
    """`Check` of the health service without its streams: a caller that holds some of those open blinds the probes."""

    async def check(arriving: AsyncIterator[bytes], context: Any) -> Any:  # noqa: ANN401 - of gRPC
        async with translated(context):
            raw = await anext(in_time(arriving, PROBE_S))
            return await health_servicer.Check(parsed(health_pb2.HealthCheckRequest.FromString, raw), context)

    answer = health_pb2.HealthCheckResponse.SerializeToString
    handler: Any = grpc.stream_unary_rpc_method_handler(check, None, answer)
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": handler})


def _names(credentials: Credentials) -> tuple[str, ...]:
    """What callers may call this server by: others than these they do not trust."""
    return credentials.held.facts.names if isinstance(credentials, TlsCredentials) else ()


def _bind(server: grpc.aio.Server, listen: str, credentials: Credentials | None) -> HostPort:
    """Binds a port. Returns what it is bound to."""
    target = HostPort.parse(listen, listening=True)
    if credentials is None:
        check_plaintext(listen)
        number = _bound(listen, lambda: server.add_insecure_port(listen))
    else:
        secured = credentials.server_credentials()
        number = _bound(listen, lambda: server.add_secure_port(listen, secured))
    return HostPort(target.host, number)


def _bound(listen: str, bind: Callable[[], int]) -> int:
    """The port that was bound. Raises: DomainError CONFIGURATION_INVALID."""
    try:
        return bind()
    except RuntimeError as error:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"cannot listen on {listen}: is the port in use?"
        ) from error


def _reachable(bound: HostPort) -> str:
    """The address that reaches a server from this machine."""
    with suppress(ValueError):
        address = ip_address(bound.host)
        if address.is_unspecified:
            return str(HostPort("127.0.0.1" if address.version == 4 else "::1", bound.port))
    return str(bound)


@contextmanager
def _metrics(settings: ServerSettings) -> Iterator[int]:
    """Serves metrics. Yields the port, or -1 if the settings turn it off."""
    if settings.metrics_port < 0:
        yield -1
        return
    server = start_metrics_server(settings.metrics_port, settings.metrics_host)
    try:
        yield server.port
    finally:
        server.stop()


@asynccontextmanager
async def _background(work: Sequence[Background]) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    """Runs background work; cancels it on exit and waits for it."""
    tasks = [
        asyncio.create_task(start(), name=getattr(getattr(start, "func", start), "__name__", "background"))
        for start in work
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that the signals to stop set. A repeated signal changes nothing: the grace bounds the drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = stop_signals()
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _announced(path: Path | None, ready: Ready) -> Iterator[None]:
    """Writes the ready file, whole or not at all; on exit removes it unless another process replaced it."""
    if path is None:
        yield
        return
    _replace(path, json.dumps(asdict(ready)).encode())
    try:
        yield
    finally:
        if Ready.read(path) == ready:
            path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


async def _until(stop: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits for the stop event. Raises what a task crashed with, if one does first."""
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    pending: set[asyncio.Task[Any]] = {stopping, *tasks}
    try:
        while not stopping.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                _raise_crash(task)
    finally:
        stopping.cancel()


def _raise_crash(task: asyncio.Task[Any]) -> None:
    error = task.exception()
    if error is not None:
        _log.error("background_work_crashed", work=task.get_name(), exc_info=error)
        raise error
