"""What a process takes back from the store before it stops, so that others need not wait until it expires."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

PARTING_S: Final = 2.0
"""Seconds for it: a process that stops while Redis is silent has little time left."""


@asynccontextmanager
async def parting() -> AsyncIterator[None]:
    """Ends what is in it after that time: what is not taken back expires."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PARTING_S):
            yield
