"""How a server becomes a member and stays one."""

import asyncio
from dataclasses import dataclass
from functools import partial

from services.common.server import Background
from services.common.settings import MemberSettings
from shelora.errors import DomainError
from shelora.transport.enrolment import certified_by, enroll_server, keep_renewed, renewal_at
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.transport.workload import WorkloadKey


@dataclass(frozen=True)
class Membership:
    """A server's identity."""

    credentials: TlsCredentials
    keep_renewed: Background
    """Replaces the certificate before it expires, and when it is void, for as long as the server runs."""
    void: asyncio.Event
    """To be set when the certificate was revoked: with a workload key, or enrolled anew, the server gets another."""


async def join(settings: MemberSettings) -> Membership:
    """The membership of a server that was enrolled by hand, or that enrols itself with its workload's key.

    Raises: DomainError CONFIGURATION_INVALID without a valid identity or a usable key, and as `enroll_server`.
    """
    folder, void = IdentityFolder(settings.identity), asyncio.Event()
    if settings.workload is None:
        credentials = TlsCredentials(folder)
        obtain = renewal_at(settings.key_authority_address, credentials)
        return Membership(credentials, partial(keep_renewed, folder, obtain, void), void)
    key_file, enrolment = settings.workload
    key = WorkloadKey.from_file(key_file)
    if not _valid(folder):
        await enroll_server(key, enrolment, folder)
    credentials = TlsCredentials(folder)
    obtain = certified_by(key, enrolment, credentials.held.authority)
    return Membership(credentials, partial(keep_renewed, folder, obtain, void), void)


def _valid(folder: IdentityFolder) -> bool:
    try:
        folder.read_valid()
    except DomainError:
        return False
    return True
