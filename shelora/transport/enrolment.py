"""Becoming a member: a token and a signing request for a certificate, and a new one before that expires.

A token carries the SHA-256 of the authority's certificate. The newcomer fetches that certificate from the server's
TLS handshake, holds it against the pin, and only then opens the connection over which it sends the token; that
connection trusts the pinned authority and nothing else. So the first contact is not trust on first use.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import structlog

from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import gauge
from shelora.telemetry.outages import Outage
from shelora.transport.address import HostPort
from shelora.transport.certificates import (
    PrivateKey,
    der_to_pem,
    new_key,
    pem_to_der,
    same_key,
    signing_request,
    utc_now,
)
from shelora.transport.channel import RETRY_S, call, open_channel, retrying
from shelora.transport.proxy import Proxy, named, proxy_for
from shelora.transport.sockets import reached
from shelora.transport.tls import Held, IdentityFolder, IdentityKeeper, TlsCredentials
from shelora.transport.workload import WorkloadKey
from shelora.v1 import enrolment_pb2 as pb
from shelora.v1.enrolment_pb2_grpc import EnrolmentStub

PIN_BYTES: Final = 32
SECRET_BYTES: Final = 32
_PREFIX: Final = "shelora-token-"
_LONGEST_RETRY_S: Final = 60.0
MAX_TOKEN_S: Final = 30 * 24 * 3600
"""Seconds for which a token can be used, at most."""

CERTIFICATE_EXPIRY: Final = gauge(
    "certificate_expiry_timestamp_seconds",
    "Unix time at which the certificate of this process expires; 0 if it keeps none renewed.",
)
_log = structlog.get_logger(__name__)

Obtain = Callable[[bytes], Awaitable[bytes]]
"""Exchanges a signing request (DER) for a certificate (DER)."""


@dataclass(frozen=True)
class Token:
    """What an operator hands to a newcomer. The `repr` shows no secret; `encoded` does."""

    pin: bytes
    """SHA-256 of the authority's certificate in DER."""
    secret: bytes = field(repr=False)
    """32 uniformly random bytes."""

    @property
    def encoded(self) -> str:
        """The form people pass on."""
        return _PREFIX + base64.urlsafe_b64encode(self.pin + self.secret).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Reads what `encoded` wrote. Raises: DomainError TOKEN_REFUSED, which does not show it."""
        body = text.strip().removeprefix(_PREFIX)
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != PIN_BYTES + SECRET_BYTES or not text.strip().startswith(_PREFIX):
            raise DomainError(Reason.TOKEN_REFUSED, "this is not a token: it was cut or changed on its way")
        return cls(raw[:PIN_BYTES], raw[PIN_BYTES:])


class _Pinned:
    """Credentials of a newcomer: trusts one authority, shows nothing."""

    def __init__(self, authority: bytes) -> None:
        self._authority = authority

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self._authority)

    def server_credentials(self) -> grpc.ServerCredentials:
        raise NotImplementedError("a newcomer serves nobody")

    def generation(self) -> int:
        return 0


async def enroll(
    token_text: str, address: str, folder: Path, *, client_id: str = "", retry_s: float = RETRY_S
) -> Held:
    """Makes a key, exchanges the token for a certificate, and stores both in `folder`.

    Args:
        token_text: The token.
        address: The key authority's enrolment port, host:port.
        folder: Gets the identity; an identity that is there is replaced.
        client_id: Name to take, if the token leaves it open.
        retry_s: Seconds during which a failure that may pass is tried again.

    Raises: DomainError SERVER_UNTRUSTED if the authority is not the one the token was issued by, TOKEN_REFUSED,
    CLIENT_EXISTS, INVALID_ARGUMENT, STORE_UNAVAILABLE if it cannot be reached.
    """
    token, key = Token.parse(token_text), new_key()
    authority = await _pinned_authority(token, address)
    request = pb.EnrollRequest(token=token.encoded, signing_request=signing_request(key), client_id=client_id)
    async with open_channel(address, _Pinned(authority)) as channel:
        response = await call(EnrolmentStub(channel).Enroll, request, retry_s=retry_s)
    held = _held(key, response.certificate, authority)
    IdentityFolder(folder).write(held)
    return held


async def _pinned_authority(token: Token, address: str) -> bytes:
    """The authority's certificate in PEM, held against the pin."""
    chain = await asyncio.to_thread(presented_chain, address)
    for certificate in chain:
        if hmac.compare_digest(hashlib.sha256(certificate).digest(), token.pin):
            return der_to_pem(certificate)
    raise DomainError(
        Reason.SERVER_UNTRUSTED,
        f"the server at {address} is not the authority that issued this token: expected the certificate "
        f"SHA-256 {token.pin.hex()}. The token was not sent",
    )


def presented_chain(address: str) -> list[bytes]:
    """The certificates in DER that a TLS server sends, not checked in any way. Sends nothing but the handshake.

    Raises: DomainError STORE_UNAVAILABLE if it cannot be reached or does not speak TLS 1.3.
    """
    target = HostPort.parse(address)
    proxy = proxy_for(target)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the caller holds what comes against its pin
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            reached(proxy.address if proxy else target) as raw,
            _through(proxy, raw, target),
            context.wrap_socket(raw, server_hostname=target.host) as secured,
        ):
            # Public from Python 3.13 on as SSLSocket.get_unverified_chain.
            chain = secured._sslobj.get_unverified_chain()  # type: ignore[attr-defined]  # noqa: SLF001
            return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in chain or ()]
    except OSError as error:
        raise DomainError(
            Reason.STORE_UNAVAILABLE,
            f"no TLS connection to the authority at {address}{named(address)}: {error}",
        ) from error


@contextmanager
def _through(proxy: Proxy | None, raw: socket.socket, target: HostPort) -> Iterator[None]:
    if proxy is not None:
        proxy.connect(raw, target)
    yield


async def enroll_server(
    key: WorkloadKey, address: str, folder: IdentityFolder, *, retry_s: float = RETRY_S
) -> Held:
    """Puts the identity into `folder` that a workload key is good for.

    Args:
        key: Shared with the authority; it is not sent.
        address: The key authority's enrolment port, host:port.
        folder: Gets the identity; an identity that is there is replaced.
        retry_s: Seconds during which a failure that may pass is tried again.

    Raises: DomainError TOKEN_REFUSED if the authority knows no such key, SERVER_UNTRUSTED if it is not the one that
    shares it, STORE_UNAVAILABLE if it cannot be reached.
    """

    async def attempt() -> Held:
        authority = der_to_pem((await asyncio.to_thread(presented_chain, address))[-1])
        return await certify(folder, authority, certified_by(key, address, authority))

    return await retrying(retry_s=retry_s)(attempt)


def certified_by(key: WorkloadKey, address: str, authority: bytes) -> Obtain:
    """Certification by a key that the authority (PEM) at `address` shares; it is believed once it has proved that."""
    seen = pem_to_der(authority)

    async def obtain(request: bytes) -> bytes:
        asked = pb.EnrollServerRequest(signing_request=request, proof=key.request_proof(seen, request))
        async with open_channel(address, _Pinned(authority)) as channel:
            response = await call(EnrolmentStub(channel).EnrollServer, asked, retry_s=0)
        if not hmac.compare_digest(response.proof, key.answer_proof(seen, response.certificate)):
            raise DomainError(
                Reason.SERVER_UNTRUSTED,
                f"the authority at {address} did not prove that it holds the workload key",
            )
        return response.certificate

    return obtain


async def certify(keeper: IdentityKeeper, authority: bytes, obtain: Obtain) -> Held:
    """Gives `keeper` an identity of a new key. `authority`: the certificate that signs it, PEM."""
    key = new_key()
    held = _held(key, await obtain(signing_request(key)), authority)
    keeper.write(held)
    return held


async def renew(keeper: IdentityKeeper, obtain: Obtain) -> Held:
    """Replaces the identity by one of a new key, for the same holder."""
    held = await certify(keeper, keeper.read().authority, obtain)
    _log.info("certificate_renewed", identity=held.facts.identity.uri, expires=held.facts.expires.isoformat())
    return held


async def keep_renewed(keeper: IdentityKeeper, obtain: Obtain, void: asyncio.Event | None = None) -> None:
    """Renews the identity after two thirds of its life, again and again. Never returns.

    A failure is logged, more and more rarely, and tried again soon: a third of the life is left for the authority to
    come back.

    Args:
        keeper: Where the identity is kept.
        obtain: Certifies the next one.
        void: Set when the identity is worth nothing any more, to have another at once; cleared then.
    """
    void = void or asyncio.Event()
    wait_s, outage = 1.0, Outage(_log, "renewal_failed")
    while True:
        facts = keeper.read().facts
        CERTIFICATE_EXPIRY.set(facts.expires.timestamp())
        remaining_s = (facts.renewal_due - utc_now()).total_seconds()
        if remaining_s > 0 and not void.is_set():
            # In slices, because a laptop that slept must notice that time has passed.
            with suppress(TimeoutError):  # not wait_for, which can lose a cancellation
                async with asyncio.timeout(min(remaining_s, _LONGEST_RETRY_S)):
                    await void.wait()
            continue
        try:
            await renew(keeper, obtain)
            void.clear()
            outage.ended()
            wait_s = 1.0
        except DomainError as error:
            outage.failed(error, certificate_valid_until=facts.expires.isoformat(timespec="minutes"))
            await asyncio.sleep(random.uniform(wait_s / 2, wait_s))  # noqa: S311 - spreads load, guards nothing
            wait_s = min(2 * wait_s, _LONGEST_RETRY_S)


def renewal_at(address: str, credentials: TlsCredentials) -> Obtain:
    """Renewal by the key authority at `address`, in the name of these credentials."""

    async def obtain(request: bytes) -> bytes:
        async with open_channel(address, credentials) as channel:
            stub = EnrolmentStub(channel)
            return (await call(stub.Renew, pb.RenewRequest(signing_request=request), retry_s=0)).certificate

    return obtain


def _held(key: PrivateKey, certificate: bytes, authority: bytes) -> Held:
    pem = der_to_pem(certificate)
    if not same_key(key, pem):
        raise DomainError(Reason.SERVER_UNTRUSTED, "the authority sent a certificate for another key")
    held = Held(key, pem, authority)
    held.facts  # noqa: B018 - raises if it names nobody
    return held
