"""A caller without a certificate: `python -m tests.insiders.stranger KIND HOST:PORT SECONDS`, 200 calls at once.

Prints how its calls ended, as JSON, once it is done. A process of its own, so that it does not slow what measures.
"""

import asyncio
import json
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from shelora.transport.certificates import der_to_pem
from shelora.transport.enrolment import presented_chain
from shelora.v1 import enrolment_pb2 as pb
from shelora.v1.enrolment_pb2_grpc import EnrolmentStub

CONNECTIONS, STREAMS = 10, 20
AT_ONCE = CONNECTIONS * STREAMS

_Made = Callable[[Any, Counter[str]], Coroutine[Any, Any, None]]


def _channel(address: str) -> grpc.aio.Channel:
    """Trusts whom it finds; sends what it likes."""
    pem = b"".join(map(der_to_pem, presented_chain(address)))
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), options=options)


async def _counted(call: Any, ends: Counter[str]) -> None:
    try:
        await call
        ends["OK"] += 1
    except grpc.aio.AioRpcError as error:
        ends[error.code().name] += 1


async def big_messages(stub: Any, ends: Counter[str]) -> None:
    await _counted(stub.Enroll(pb.EnrollRequest(token="A" * 4_000_000), timeout=30), ends)


async def bad_tokens(stub: Any, ends: Counter[str]) -> None:
    await _counted(stub.Enroll(pb.EnrollRequest(token="A"), timeout=30), ends)


async def bad_proofs(stub: Any, ends: Counter[str]) -> None:
    request = pb.EnrollServerRequest(signing_request=b"0" * 8000, proof=bytes(32))
    await _counted(stub.EnrollServer(request, timeout=30), ends)


async def big_metadata(stub: Any, ends: Counter[str]) -> None:
    await _counted(stub.Enroll(pb.EnrollRequest(), metadata=[("x", "y" * 60_000)], timeout=30), ends)


async def over_grpc(address: str, seconds: float, made: _Made) -> Counter[str]:
    """Makes calls of one kind, AT_ONCE at a time."""
    ends: Counter[str] = Counter()
    until_s = time.monotonic() + seconds

    async def again(stub: Any) -> None:
        while time.monotonic() < until_s:
            await made(stub, ends)

    channels = [_channel(address) for _ in range(CONNECTIONS)]
    await asyncio.gather(*(again(EnrolmentStub(channel)) for channel in channels for _ in range(STREAMS)))
    for channel in channels:
        await channel.close()
    return ends


async def silent_calls(address: str, seconds: float) -> Counter[str]:
    """Begins calls whose request never comes."""
    ends: Counter[str] = Counter()

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(seconds)
        return
        yield b""

    channels = [_channel(address) for _ in range(CONNECTIONS)]
    calls = [
        channel.stream_unary("/shelora.v1.Enrolment/Enroll")(nothing())
        for channel in channels
        for _ in range(STREAMS)
    ]
    await asyncio.gather(*(_counted(call, ends) for call in calls))
    for channel in channels:
        await channel.close()
    return ends


async def half_open(address: str, seconds: float) -> Counter[str]:
    """Connections that send half of a ClientHello and wait."""
    host, port = address.rsplit(":", 1)
    ends: Counter[str] = Counter()
    sockets = []
    for _ in range(AT_ONCE):
        sockets.append(socket.create_connection((host, int(port))))
        sockets[-1].sendall(b"\x16\x03\x01\x40\x00" + b"\x01" * 8000)
        ends["opened"] += 1
    await asyncio.sleep(seconds)
    for each in sockets:
        each.close()
    return ends


async def handshakes(address: str, seconds: float) -> Counter[str]:
    """Handshakes without a certificate, one after the other on AT_ONCE connections."""
    host, port = address.rsplit(":", 1)
    ends: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    async def again() -> None:
        while time.monotonic() < until_s:
            try:
                reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
                await asyncio.wait_for(reader.read(1), 2.0)
                writer.close()
                ends["shaken"] += 1
            except (OSError, TimeoutError) as error:
                ends[type(error).__name__] += 1

    await asyncio.gather(*(again() for _ in range(AT_ONCE)))
    return ends


async def slow_readers(address: str, seconds: float) -> Counter[str]:
    """Idle connections over TLS whose window is zero: nothing can be sent to them."""
    host, port = address.rsplit(":", 1)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    no_window = b"\0\0\6\4\0\0\0\0\0" + b"\0\4\0\0\0\0"  # SETTINGS_INITIAL_WINDOW_SIZE = 0
    ends: Counter[str] = Counter()
    writers = []
    for _ in range(AT_ONCE):
        try:
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        except OSError as error:
            ends[type(error).__name__] += 1
            continue
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_window)
        writers.append(writer)
        ends["opened"] += 1
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.close()
    return ends


CALLS: dict[str, _Made] = {
    "big-messages": big_messages,
    "big-metadata": big_metadata,
    "bad-tokens": bad_tokens,
    "bad-proofs": bad_proofs,
}
CONNECTING = {
    "silent-calls": silent_calls,
    "half-open": half_open,
    "handshakes": handshakes,
    "slow-readers": slow_readers,
}
KINDS = (*CALLS, *CONNECTING)


async def attack(kind: str, address: str, seconds: float) -> Counter[str]:
    if kind in CALLS:
        return await over_grpc(address, seconds, CALLS[kind])
    return await CONNECTING[kind](address, seconds)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(attack(sys.argv[1], sys.argv[2], float(sys.argv[3])))))  # noqa: T201
