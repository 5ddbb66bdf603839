"""Calls between processes, in memory: gRPC's stubs on one side, its servicers on the other, faults between them.

Messages are serialised and read again. What a caller sees of a failure is what grpc.aio shows: a status, or the
cancellation of the handler on the other side.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc

from tests.simulation.faults import Call, Faults
from tests.simulation.processes import Crashed, Process

Heard = Callable[[str, str, bytes, bytes | None, grpc.StatusCode], None]
"""Told of every unary answer that reached its caller: caller, method, request, response, status."""

STREAMS: Final = frozenset(
    {"PutShard", "GetResult", "Watch", "GetPlan", "PublishPlan", "CastBallot", "GetShares"}
)
_NOTHING_MORE: Final = object()


@dataclass(frozen=True)
class _Ended:
    """How a call ended on the server."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailing: tuple[tuple[str, str], ...] = ()

    def raised(self) -> None:
        if self.code is not grpc.StatusCode.OK:
            raise _error(self.code, self.details, self.trailing)


_BROKEN: Final = _Ended(grpc.StatusCode.UNAVAILABLE, "the server is gone")
_CUT: Final = _Ended(grpc.StatusCode.UNAVAILABLE, "the connection broke")


class _Context:
    """A servicer's context. Args: caller: who calls, as certificates would tell."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.ended = _Ended()

    def auth_context(self) -> dict[str, Any]:
        return {}

    def set_compression(self, compression: grpc.Compression) -> None:
        """Nothing is counted here."""

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Nobody looks at it."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self.ended = _Ended(code, details, tuple(trailing_metadata))
        raise grpc.aio.AbortError


@dataclass
class Server:
    """A process that serves."""

    process: Process
    handlers: dict[str, grpc.RpcMethodHandler]

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler]
    ) -> None:
        self.handlers.update({f"/{service}/{name}": handler for name, handler in handlers.items()})


class Network:
    """Who serves at which address, and the channels to them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, faults: Faults, heard: Heard, log: Callable[[str, str], None]
    ) -> None:
        self.loop = loop
        self.faults = faults
        self.heard = heard
        self.log = log
        self._servers: dict[str, list[Server]] = {}

    def serve(self, process: Process, address: str) -> Server:
        """A server for servicers to be added to."""
        here = self._servers.setdefault(address, [])
        here[:] = [server for server in here if not server.process.dead]
        here.append(Server(process, {}))
        return here[-1]

    def some(self, address: str, caller: Process) -> Server | None:
        """A living server at that address, as a load balancer picks it."""
        alive = [server for server in self._servers.get(address, []) if not server.process.dead]
        return caller.rng.choice(alive) if alive else None

    def channel(self, caller: Process, address: str) -> "Channel":
        return Channel(self, caller, address)


class Channel:
    """What stubs need of a channel."""

    def __init__(self, network: Network, caller: Process, address: str) -> None:
        self._network = network
        self._caller = caller
        self._address = address

    async def close(self, grace: float | None = None) -> None:
        pass

    def unary_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        async def once(request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
            data = request_serializer(request)
            return response_deserializer(await self._answer(path, _one(data), timeout, data))

        return once

    def stream_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        async def streamed(requests: Any, timeout: float | None = None) -> Any:
            return response_deserializer(
                await self._answer(path, _each(requests, request_serializer), timeout, b"")
            )

        return streamed

    def unary_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        async def responses(request: Any, timeout: float | None = None) -> AsyncIterator[Any]:
            call = self._begun(path)
            deadline_s = None if timeout is None else self._network.loop.time() + timeout
            try:
                await call.connect(_one(request_serializer(request)))
                while (message := await call.next(deadline_s)) is not None:
                    yield response_deserializer(message)
            except TimeoutError:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "too late") from None
            finally:
                call.leave()

        return responses

    def _begun(self, path: str) -> "_Call":
        method = path.rpartition("/")[2]
        fault = self._network.faults.on("call", self._caller.name, method, streamed=method in STREAMS)
        return _Call(self._network, self._caller, self._address, path, fault)

    async def _answer(
        self, path: str, requests: AsyncIterator[bytes], timeout_s: float | None, sent: bytes
    ) -> bytes:
        """The one response."""
        call = self._begun(path)
        code, response = grpc.StatusCode.CANCELLED, None
        try:
            async with asyncio.timeout(timeout_s):
                await call.connect(requests)
                response = await call.next(None)
                await call.next(None)
            code = grpc.StatusCode.OK
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise _error(code, "too late") from None
        except grpc.aio.AioRpcError as error:
            code = error.code()
            raise
        finally:
            call.leave()
            self._network.log(self._caller.name, f"{call.method} {code.name}")
            self._network.heard(self._caller.name, call.method, sent, response, code)
        assert response is not None
        return response


class _Call:
    """One call: what its caller does, and the task that serves it."""

    def __init__(
        self, network: Network, caller: Process, address: str, path: str, fault: Call | None
    ) -> None:
        self._network = network
        self._caller = caller
        self._address = address
        self._path = path
        self._fault = fault
        self.method = path.rpartition("/")[2]
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._serving: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._broken = False
        """Whether the connection broke: what the server says from then on is not heard."""
        self._passed = 0
        """Messages that went through, in either direction."""

    async def connect(self, requests: AsyncIterator[bytes]) -> None:
        """Sends the request on its way."""
        await self._caller.operate()
        if self._is("drop-request"):
            await self._fail()
        server = self._network.some(self._address, self._caller)
        if server is None:
            await self._caller.latency()
            raise _error(grpc.StatusCode.UNAVAILABLE, "nobody listens")
        handler = server.handlers[self._path]
        if self._is("duplicate"):
            requests = self._doubled([request async for request in requests], server, handler)
        self._serving = self._served(server, handler, self._inbox, self._outbox)
        self._pump = asyncio.get_running_loop().create_task(self._send(requests))

    async def next(self, deadline_s: float | None) -> bytes | None:
        """The next response, None after the last. Raises AioRpcError, TimeoutError."""
        async with asyncio.timeout_at(deadline_s):
            message = await self._outbox.get()
            while self._broken and message is not _CUT:
                message = await self._outbox.get()
            await self._caller.latency()
        if isinstance(message, _Ended):
            message.raised()
            return None
        if self._is("drop-response") or self._breaks_here():
            await self._fail()
        self._passed += 1
        return message

    def leave(self) -> None:
        """The caller is gone or done. A handler that is still busy hears of it a moment later."""
        for task in (self._pump, self._serving):
            if task is not None and not task.done():
                self._network.loop.call_later(self._caller.step_s(), task.cancel)

    def _is(self, kind: str) -> bool:
        return self._fault is not None and self._fault.kind == kind

    def _breaks_here(self) -> bool:
        return self._is("break") and self._fault.position == self._passed

    async def _fail(self) -> None:
        await asyncio.sleep(self._fault.seconds)
        raise _error(grpc.StatusCode.UNAVAILABLE, f"simulated {self._fault.kind}")

    async def _send(self, requests: AsyncIterator[bytes]) -> None:
        """Passes requests on, until the stream breaks."""
        async for request in requests:
            if self._breaks_here():
                return self._break_upload()
            self._passed += 1
            await self._caller.latency()
            self._inbox.put_nowait(request)
        self._inbox.put_nowait(_NOTHING_MORE)
        return None

    def _break_upload(self) -> None:
        """The server sees the end of the stream, as gRPC shows it, and a moment later that the call is cancelled."""
        self._broken = True
        if self._caller.rng.random() < 0.5:
            self._inbox.put_nowait(_NOTHING_MORE)
        self._network.loop.call_later(0.5 * self._caller.rng.random(), self._serving.cancel)
        self._network.loop.call_later(self._fault.seconds, self._outbox.put_nowait, _CUT)

    def _doubled(self, requests: Sequence[bytes], server: Server, handler: Any) -> AsyncIterator[bytes]:
        """The requests; a copy of them arrives a while later, and nobody waits for its answer."""

        def again() -> None:
            if not server.process.dead:
                inbox: asyncio.Queue[Any] = asyncio.Queue()
                for item in (*requests, _NOTHING_MORE):
                    inbox.put_nowait(item)
                self._served(server, handler, inbox, asyncio.Queue())

        self._network.loop.call_later(self._fault.seconds, again)
        return _of(requests)

    def _served(
        self, server: Server, handler: Any, inbox: "asyncio.Queue[Any]", outbox: "asyncio.Queue[Any]"
    ) -> "asyncio.Task[None]":
        work = _serve(server.process, self._caller.name, handler, inbox, outbox)
        serving = server.process.spawn(work, f"serve-{self.method}")
        serving.add_done_callback(lambda _: outbox.put_nowait(_BROKEN))
        return serving


async def _serve(
    process: Process, caller: str, handler: Any, inbox: "asyncio.Queue[Any]", outbox: "asyncio.Queue[Any]"
) -> None:
    """One call on the server."""
    context = _Context(caller)
    try:
        await process.latency()
        requests = _received(inbox, handler.request_deserializer)
        argument = requests if handler.request_streaming else await anext(requests)
        if handler.response_streaming:
            async with aclosing(handler.unary_stream(argument, context)) as responses:
                async for response in responses:
                    outbox.put_nowait(handler.response_serializer(response))
        else:
            method = handler.stream_unary if handler.request_streaming else handler.unary_unary
            outbox.put_nowait(handler.response_serializer(await method(argument, context)))
        outbox.put_nowait(_Ended())
    except grpc.aio.AbortError:
        outbox.put_nowait(context.ended)
    except Exception as error:  # noqa: BLE001 - as grpc.aio does
        outbox.put_nowait(_Ended(grpc.StatusCode.UNKNOWN, repr(error)))
    except Crashed:
        pass


async def _received(inbox: "asyncio.Queue[Any]", deserialize: Any) -> AsyncIterator[Any]:
    while (item := await inbox.get()) is not _NOTHING_MORE:
        yield deserialize(item)


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _of(items: Sequence[bytes]) -> AsyncIterator[bytes]:
    for item in items:
        yield item


async def _each(requests: Any, serialize: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield serialize(request)


def _error(
    code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)
