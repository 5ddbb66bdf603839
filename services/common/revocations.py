"""What a server knows of revoked certificates: refused at every call, and calls in progress are ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import grpc
import structlog

from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import gauge
from shelora.transport.certificates import Certificate
from shelora.transport.channel import call
from shelora.transport.revocations import Revocation, RevocationList, RevokedError
from shelora.v1 import enrolment_pb2 as pb
from shelora.v1.enrolment_pb2_grpc import EnrolmentStub

if TYPE_CHECKING:  # a class of the stub file only
    from shelora.v1.enrolment_pb2_grpc import EnrolmentAsyncStub

POLL_S: Final = 2.0
"""Seconds between two questions for new revocations: less than a heartbeat of an agent."""

REVOKED: Final = gauge(
    "revoked_holders_count", "Clients and roles whose certificates this server knows to be revoked."
)
_log = structlog.get_logger(__name__)


class Revocations:
    """The known revocations, and the calls that end with one.

    Args:
        known: Whether the list is complete from the start. A server that asks the key authority begins without:
            until the first answer it admits nobody, as it cannot tell who is revoked.
    """

    def __init__(self, *, known: bool = False) -> None:
        self._known = known
        self._list = RevocationList()
        self._calls: dict[asyncio.Timeout, Certificate] = {}

    @property
    def newest_ms(self) -> int:
        """Time of the newest revocation, Unix milliseconds; 0 without any."""
        return self._list.newest_ms

    def learn(self, revocations: Iterable[Revocation], *, complete: bool = False) -> None:
        """Takes in revocations and ends the calls they end. `complete`: no older one is missing any more."""
        self.refuse(revocations)
        self._known = self._known or complete
        self.end_calls()

    def doubt(self) -> None:
        """The list may lack some, and the server cannot ask for them: it admits nobody until it is complete."""
        self._known = False

    def refuse(self, revocations: Iterable[Revocation]) -> None:
        """Takes in revocations: from now on new calls are refused. Those under way are left to `end_calls`."""
        self._list.add(revocations)
        REVOKED.set(len(self._list))

    def end_calls(self) -> None:
        """Ends the calls under way whose certificate is revoked, one that returns without waiting excepted."""
        now = asyncio.get_running_loop().time()
        for scope, certificate in list(self._calls.items()):
            if self._list.covers(certificate):
                scope.reschedule(now)

    def clients_of(self, federation_id: str) -> Mapping[str, int]:
        """Revoked clients of a federation, each with the time up to which its certificates are, Unix milliseconds."""
        return self._list.clients_of(federation_id)

    def check(self, certificate: Certificate) -> None:
        """Raises: RevokedError; DomainError STORE_UNAVAILABLE while the list is not known."""
        if self._list.covers(certificate):
            raise RevokedError(certificate.identity)
        if not self._known:
            raise DomainError(
                Reason.STORE_UNAVAILABLE,
                "this server does not know yet which certificates are revoked: it waits for the key authority",
            )

    @asynccontextmanager
    async def until_revoked(self, certificate: Certificate | None) -> AsyncIterator[None]:
        """Cancels what runs inside once the certificate is revoked, and raises RevokedError then."""
        if certificate is None:
            yield
            return
        scope = asyncio.timeout(None)  # no time to end at, but a cancellation that differs from any other
        self._calls[scope] = certificate
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise RevokedError(certificate.identity) from None
            raise
        finally:
            del self._calls[scope]


async def follow(
    revocations: Revocations,
    authority: grpc.aio.Channel,
    poll_s: float = POLL_S,
    on_news: Callable[[], None] = lambda: None,
    on_own: Callable[[], None] = lambda: None,
) -> None:
    """Asks the key authority for new revocations again and again. Never returns.

    While it does not answer, what is known stays in force, which is logged once. While it refuses this server's own
    certificate as revoked, the server admits nobody.

    Args:
        revocations: Learns them.
        authority: The key authority.
        poll_s: Seconds between two questions.
        on_news: Called when there is something new.
        on_own: Called while it refuses this server's own certificate as revoked.
    """
    answers = True
    stub: EnrolmentAsyncStub = EnrolmentStub(authority)
    while True:
        try:
            while await _learn_more(revocations, stub):
                on_news()
            answers = True
        except DomainError as error:
            if answers:
                _log.warning("revocations_not_answered", reason=error.reason, why=error.message)
            answers = False
            if error.reason is Reason.CERTIFICATE_REVOKED:
                revocations.doubt()
                on_own()
        await asyncio.sleep(poll_s)


async def _learn_more(revocations: Revocations, stub: "EnrolmentAsyncStub") -> bool:
    """Asks once. Returns whether there was something new, and so perhaps more."""
    request = pb.ListRevocationsRequest(after_unix_ms=revocations.newest_ms)
    answer = await call(stub.ListRevocations, request, timeout_s=5, retry_s=0)
    found = [Revocation.from_proto(message) for message in answer.revocations]
    revocations.learn(found, complete=not found)
    for revocation in found:
        _log.warning("revoked", identity=revocation.identity.uri, at_unix_ms=revocation.at_ms)
    return bool(found)
