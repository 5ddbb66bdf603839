"""A channel that changes to a renewed certificate without breaking a call.

gRPC's channels show the certificate they were opened with as long as they live. This one opens another when the
identity was replaced: calls that are under way end where they began, new ones go over the new connection.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc


class _Opened:
    """One real channel, the methods made on it, and the calls on their way."""

    def __init__(self, channel: grpc.aio.Channel, generation: int) -> None:
        self.channel = channel
        self.generation = generation
        self.methods: dict[str, Any] = {}
        self.calls = 0


class RenewingChannel(grpc.aio.Channel):
    """See the module.

    Args:
        address: For error messages.
        generation: Grows whenever the identity was replaced.
        connect: Opens a real channel with the identity of the moment.
    """

    def __init__(
        self, address: str, generation: Callable[[], int], connect: Callable[[], grpc.aio.Channel]
    ) -> None:
        self.address = address
        self._generation = generation
        self._connect = connect
        self._opened = _Opened(connect(), generation())
        self._retired: set[_Opened] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def begin(self, shape: str, method: str, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any call
        """Starts a call over the connection of the moment."""
        opened = self._now()
        if method not in opened.methods:
            opened.methods[method] = getattr(opened.channel, shape)(method, **options)
        call = opened.methods[method](*args, **kwargs)
        opened.calls += 1
        call.add_done_callback(lambda _: self._ended(opened))
        return call

    def _now(self) -> _Opened:
        generation = self._generation()
        if generation != self._opened.generation:
            self._retired.add(self._opened)
            idle, self._opened = self._opened, _Opened(self._connect(), generation)
            self._close_if_idle(idle)
        return self._opened

    def _ended(self, opened: _Opened) -> None:
        opened.calls -= 1
        self._close_if_idle(opened)

    def _close_if_idle(self, opened: _Opened) -> None:
        if opened in self._retired and not opened.calls:
            self._retired.discard(opened)
            closing = asyncio.get_running_loop().create_task(opened.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self, grace: float | None = None) -> None:
        """Closes the connection, and those on which calls are still ending."""
        retired, self._retired = self._retired, set()
        for opened in (self._opened, *retired):
            await opened.channel.close(grace)
        await asyncio.gather(*self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's signature
        return self._now().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._opened.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._now().channel.channel_ready()

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> Any:  # noqa: ANN401 - gRPC's signature
        return Method(self, "unary_unary", method, serializers, options)

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> Any:  # noqa: ANN401 - gRPC's signature
        return Method(self, "unary_stream", method, serializers, options)

    def stream_unary(self, method: str, *serializers: Any, **options: Any) -> Any:  # noqa: ANN401 - gRPC's signature
        return Method(self, "stream_unary", method, serializers, options)

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> Any:  # noqa: ANN401 - gRPC's signature
        return Method(self, "stream_stream", method, serializers, options)


class Method:
    """A method of a stub; every call of it goes over the connection of the moment."""

    def __init__(
        self,
        channel: RenewingChannel,
        shape: str,
        method: str,
        serializers: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        names = ("request_serializer", "response_deserializer")
        self._channel = channel
        self._shape = shape
        self._method = method
        self._options = {**dict(zip(names, serializers, strict=False)), **options}

    @property
    def address(self) -> str:
        """Whom it calls, `host:port`."""
        return self._channel.address

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - gRPC's signature
        return self._channel.begin(self._shape, self._method, self._options, *args, **kwargs)
