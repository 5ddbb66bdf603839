"""Requests as they arrive: serialized, the first of a call in time."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from shelora.errors import DomainError, Reason


async def in_time(arriving: AsyncIterable[bytes], first_s: float) -> AsyncIterator[bytes]:
    """The serialized requests of a call.

    Raises: DomainError TRANSFER_TRUNCATED if the first takes longer than `first_s`, INVALID_ARGUMENT if there is none.
    """
    messages = aiter(arriving)
    try:
        async with asyncio.timeout(first_s):
            first = await anext(messages, None)
    except TimeoutError:
        raise DomainError(Reason.TRANSFER_TRUNCATED, f"no request arrived in {first_s:g} s") from None
    if first is None:
        raise DomainError(Reason.INVALID_ARGUMENT, "the call holds no request")
    yield first
    async for raw in messages:
        yield raw


def parsed(parse: Callable[[bytes], Any], raw: bytes) -> Any:  # noqa: ANN401 - any message
    """A request. Raises: DomainError INVALID_ARGUMENT."""
    try:
        return parse(raw)
    except DecodeError:
        raise DomainError(Reason.INVALID_ARGUMENT, "the request is not a message of this call") from None
