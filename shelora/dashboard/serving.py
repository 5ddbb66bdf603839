"""Serves the page on this machine until a signal: one connection to the coordinator, one certificate, kept renewed."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import uvicorn

from shelora.configuration import invalid
from shelora.dashboard.app import AuthorityCalls, Page
from shelora.dashboard.security import Secrets
from shelora.dashboard.watching import Watch
from shelora.levels import Level
from shelora.operator import create_token, operator, own_credentials, promised_level, revoke_holder
from shelora.transport.enrolment import keep_renewed, renewal_at
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import IdentityFolder, TlsCredentials

HOST: Final = "127.0.0.1"
GRACE_S: Final = 2


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The servers that the page calls, and the identity it uses."""

    coordinator: str
    identity: Path
    """Folder of the operator's key and certificate."""
    key_authority: str | None
    """None: no tokens, no revocation, and nobody renews the certificate."""
    enrolment: str = ""
    """Where devices exchange tokens, for the command line that is shown; "" if it is not known."""
    metrics: Mapping[str, str]
    """Prometheus address by server."""


class _Server(uvicorn.Server):
    """Ends the page's streams before it waits for connections to end: they would never end by themselves."""

    def __init__(self, config: uvicorn.Config, end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._end = end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._end()
        await super().shutdown(sockets)


async def serve(reach: Reach, port: int, tell: Callable[[str], None], listen: str = HOST) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        reach: Whom to ask, as whom.
        port: To listen on, and the browser's; 0 for a free one.
        tell: Takes the page's whole address, which admits anyone who has it.
        listen: Address to listen on. Browsers call the page 127.0.0.1 whatever this is.

    Raises: DomainError CONFIGURATION_INVALID if the port is taken, or there is no valid identity.
    """
    with _listening(listen, port) as listener:
        actual = listener.getsockname()[1]
        secrets = Secrets()
        hosts = [f"{name}:{actual}" for name in (HOST, "localhost")]
        async with _page(reach, secrets, hosts) as page:
            config = uvicorn.Config(
                page.app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,  # addresses are secrets
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE_S,
            )
            tell(f"http://{HOST}:{actual}/{secrets.path}/?token={secrets.token}")
            await _Server(config, page.end).serve(sockets=[listener])


@asynccontextmanager
async def _page(reach: Reach, secrets: Secrets, hosts: list[str]) -> AsyncIterator[Page]:
    credentials = await own_credentials(reach.identity, reach.key_authority)
    async with operator(reach.coordinator, credentials) as connection, _renewed(reach, credentials):
        watch = Watch(connection, reach.metrics)
        yield Page(connection, watch, _authority(reach, credentials), secrets, hosts)


@asynccontextmanager
async def _renewed(reach: Reach, credentials: TlsCredentials) -> AsyncIterator[None]:
    if reach.key_authority is None:
        yield
        return
    renewal = renewal_at(reach.key_authority, credentials)
    task = asyncio.create_task(keep_renewed(IdentityFolder(reach.identity), renewal))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _authority(reach: Reach, credentials: TlsCredentials) -> AuthorityCalls | None:
    """The calls of the command line, with this operator's certificate."""
    address = reach.key_authority
    if address is None:
        return None

    async def token(federation: str, client: str, lifetime: timedelta, promise: Level | None) -> str:
        level = promise or await promised_level(reach.coordinator, credentials, federation)
        created = await create_token(
            address,
            credentials,
            Role.CLIENT,
            federation=federation,
            client=client,
            expires_in=lifetime,
            promise=level,
        )
        return created.token

    async def revoke(holder: Identity) -> None:
        await revoke_holder(address, credentials, holder)

    return AuthorityCalls(enrolment=reach.enrolment, token=token, revoke=revoke)


def _listening(listen: str, port: int) -> socket.socket:
    """Raises: CONFIGURATION_INVALID if the port is taken, or the address is none of this machine."""
    try:
        return socket.create_server((listen, port))
    except OSError as error:
        what = f"--port {port}" if listen == HOST else f"--listen {listen} --port {port}"
        raise invalid(f"{what}: {error.strerror}: give another one, or 0 for a free one") from error
