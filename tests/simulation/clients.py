"""redis-py's clients over the simulated server: its builders of commands and readers of answers, another wire."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.client import Pipeline as AsyncPipeline

from tests.simulation.valkey import Command, Valkey

Exchange = Callable[[Sequence[Command]], Awaitable[list[Any]]]
"""Sends commands that take effect together, and brings the answers."""

_ASYNC, _SYNC = redis.asyncio.Redis(protocol=2), redis.Redis(protocol=2)
"""Clients are copies of these, which were never connected: making one takes redis-py a millisecond."""


class AsyncClient(redis.asyncio.Redis):
    """A client of product code. `exchange` is its connection; `subscribe` opens a subscription."""

    def __init__(self, exchange: Exchange, subscribe: Callable[[], Any] | None = None) -> None:
        self.__dict__ |= _ASYNC.__dict__
        self._exchange = exchange
        self._subscribe = subscribe

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        (answer,) = await self._exchange([args])
        return self._read(args[0], answer, options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> "_AsyncPipeline":
        return _AsyncPipeline(self, transaction)

    def pubsub(self, **options: Any) -> Any:
        assert self._subscribe is not None
        return self._subscribe()

    def _read(self, name: str, answer: Any, options: dict[str, Any]) -> Any:
        if isinstance(answer, Exception):
            raise answer
        options.pop("keys", None)
        callback = self.response_callbacks.get(name)
        return callback(answer, **options) if callback else answer


class _AsyncPipeline(AsyncPipeline):
    def __init__(self, client: AsyncClient, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        stack, self.command_stack = self.command_stack, []
        answers = await self._client._exchange([command for command, _ in stack])
        return [
            self._client._read(command[0], answer, dict(options))
            for (command, options), answer in zip(stack, answers, strict=True)
        ]


class SyncClient(redis.Redis):
    """The same for synchronous code."""

    server: Valkey
    """Of clients that reach it at once."""

    def __init__(self, exchange: Callable[[Sequence[Command]], list[Any]]) -> None:
        self.__dict__ |= _SYNC.__dict__
        self._exchange = exchange

    def execute_command(self, *args: Any, **options: Any) -> Any:
        (answer,) = self._exchange([args])
        return self._read(args[0], answer, options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> "_SyncPipeline":
        return _SyncPipeline(self)

    _read = AsyncClient._read


class _SyncPipeline:
    def __init__(self, client: SyncClient) -> None:
        self._client = client
        self._stack: list[Command] = []

    def execute_command(self, *command: Any) -> None:
        self._stack.append(command)

    def execute(self) -> list[Any]:
        return self._client._exchange(self._stack)


def answered(server: Valkey, commands: Sequence[Command]) -> list[Any]:
    """The answers of a server; an error is one."""
    try:
        return [server.execute(*commands[0])] if len(commands) == 1 else server.transaction(commands)
    except redis.ResponseError as error:
        return [error] * len(commands)


def simulated_clients(server: Valkey | None = None) -> tuple[AsyncClient, SyncClient]:
    """Clients that reach a server at once, for tests of the server itself."""
    here = server or Valkey(lambda: time.monotonic_ns() // 1_000_000)

    async def exchange(commands: Sequence[Command]) -> list[Any]:
        await asyncio.sleep(0)
        return answered(here, commands)

    client = SyncClient(lambda commands: answered(here, commands))
    client.server = here
    return AsyncClient(exchange), client
