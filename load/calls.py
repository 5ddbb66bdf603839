"""Measures every call of simulated agents where they make it: seconds, bytes of messages and, if it failed, why."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, cast

import grpc

from shelora.transport.channel import open_channel
from shelora.transport.status import REASON_METADATA
from shelora.transport.tls import Credentials
from shelora.v1 import coordinator_pb2 as pb

WATCH: Final = "Watch"
"""The one call without an end: what counts of it is when assignments arrive."""


class Calls:
    """What the calls of one process took.

    Args: deadline_s: Seconds that rounds collect, to tell from an assignment's deadline when its round opened.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._noting: set[asyncio.Task[None]] = set()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """Of calls that ended well, by RPC; under "assignment" from the opening of a round until an agent knew."""
        self.failures: Counter[str] = Counter()
        """Failed attempts, by RPC and reason."""
        self.sent: Counter[str] = Counter()
        """Bytes of serialized messages, by RPC: what gRPC and TLS add is not in it."""
        self.received: Counter[str] = Counter()

    def connect(self, address: str, credentials: Credentials | None) -> grpc.aio.Channel:
        """As `shelora.transport.channel.open_channel`, measured."""
        return cast(
            "grpc.aio.Channel", _Measured(open_channel(address, credentials), self)
        )  # all that stubs use

    def begun(self, rpc: str, call: Any) -> Any:  # noqa: ANN401 - any call of gRPC
        """Measures a call that has just begun. Returns what stands for it."""
        started = time.monotonic()

        def ended(_: object) -> None:
            task = asyncio.get_running_loop().create_task(self._note(rpc, call, time.monotonic() - started))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)

        call.add_done_callback(ended)
        return _Watched(call, self._assigned) if rpc == WATCH else call

    async def _note(self, rpc: str, call: Any, seconds: float) -> None:  # noqa: ANN401 - any call of gRPC
        code = await call.code()
        if code is grpc.StatusCode.OK:
            if rpc != WATCH:
                self.seconds[rpc].append(seconds)
        elif not call.cancelled():
            metadata = dict(await call.trailing_metadata() or ())
            self.failures[f"{rpc}: {metadata.get(REASON_METADATA, code.name)}"] += 1

    def _assigned(self, assignment: pb.Assignment) -> None:
        kind = assignment.WhichOneof("work")
        if kind in {"vote", "train"}:
            opened_s = getattr(assignment, kind).round.deadline_unix_ms / 1000 - self._deadline_s
            self.seconds["assignment"].append(max(0.0, time.time() - opened_s))


class _Measured:
    """A channel whose calls are measured."""

    def __init__(self, channel: grpc.aio.Channel, calls: Calls) -> None:
        self._channel = channel
        self._calls = calls

    def __getattr__(self, shape: str) -> Any:  # noqa: ANN401 - a method of a channel
        found = getattr(self._channel, shape)
        if shape not in {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}:
            return found
        return lambda method, **options: self._method(method, found(method, **self._sized(method, options)))

    def _sized(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """A stub's options, with a serializer and a deserializer that count."""
        rpc = method.rpartition("/")[2]

        def serialize(message: Any) -> bytes:  # noqa: ANN401 - any message
            data: bytes = options["request_serializer"](message)
            self._calls.sent[rpc] += len(data)
            return data

        def deserialize(data: bytes) -> Any:  # noqa: ANN401 - any message
            self._calls.received[rpc] += len(data)
            return options["response_deserializer"](data)

        return {**options, "request_serializer": serialize, "response_deserializer": deserialize}

    def _method(self, method: str, begin: Callable[..., Any]) -> Callable[..., Any]:
        rpc = method.rpartition("/")[2]
        return lambda *args, **kwargs: self._calls.begun(rpc, begin(*args, **kwargs))


class _Watched:
    """A stream of assignments, each noted as it arrives."""

    def __init__(self, call: Any, note: Callable[[pb.Assignment], None]) -> None:  # noqa: ANN401 - a call of gRPC
        self._call = call
        self._note = note

    async def __aiter__(self) -> AsyncIterator[pb.Assignment]:
        async for assignment in self._call:
            self._note(assignment)
            yield assignment
