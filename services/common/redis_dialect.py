"""Whether a server that gives no Redis reply speaks TLS where none is asked for, or none where it is.

A Redis without TLS takes a ClientHello for the beginning of a command and waits for the rest; one with TLS hangs up on
a command. Both look like a server that is away, so a caller that misses a reply asks once in the other way.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from typing import Any, Final

from redis.asyncio import SSLConnection
from redis.exceptions import InvalidResponse

from services.common.redis_client import RedisClient

PROBE_S: Final = 2.0
"""Seconds for the server to say what it speaks."""
_HANDSHAKE_FAILED: Final = re.compile(r"\[SSL: \w+\] (?P<why>.*?)(?: \(_ssl|$)")
"""OpenSSL's words, in the message of redis-py's error."""
_REPLIES: Final = (b"+", b"-")
"""First bytes of what Redis says to PING: PONG, or that it must be authenticated first."""


async def misdialled(redis: RedisClient, error: BaseException | None = None) -> str:
    """What is wrong with the way in which a client speaks to its server, with the remedy; "" if nothing can be told.

    Args:
        redis: The client.
        error: What it raised; None while it waits.
    """
    pool: Any = redis.connection_pool
    address, secure = pool.connection_kwargs, issubclass(pool.connection_class, SSLConnection)
    if "host" not in address:  # a Unix socket
        return ""
    at = f"{address['host']}:{address['port']}"
    if isinstance(error, InvalidResponse):
        return f"what answers at {at} is not Redis: {error}"
    if secure:
        return await _without_tls(address, at, str(error or ""))
    if await _shakes_hands(address["host"], address["port"]):
        return f"asks for no TLS, and {at} speaks it: write rediss://"
    return ""


async def _without_tls(address: Mapping[str, Any], at: str, said: str) -> str:
    """Why TLS does not come about with that server; "" if that cannot be told."""
    if "[SSL: WRONG_VERSION_NUMBER]" in said or await _answers_ping(address["host"], address["port"]):
        return f"asks for TLS, and {at} speaks none: write redis://, or have Redis serve TLS (tls-port)"
    if failure := _HANDSHAKE_FAILED.search(said):
        return (
            f"the TLS handshake with {at} fails: {failure['why']}; its certificate must name this host, and the "
            "authority that signed it must be known: rediss://...?ssl_ca_certs=/path/to/ca.pem"
        )
    return ""


async def _answers_ping(host: str, port: int) -> bool:
    """Whether it replies as Redis does, without TLS."""
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                return (await reader.read(1)) in _REPLIES
            finally:
                writer.close()
    except OSError:  # the time-out, too
        return False


async def _shakes_hands(host: str, port: int) -> bool:
    """Whether it answers a ClientHello; whose certificate it shows does not matter, as nothing is sent."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.close()
    except OSError:
        return False
    return True
