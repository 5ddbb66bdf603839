"""The rules of enrolment: who gets a token, and who a certificate for it."""

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import structlog
from cryptography.hazmat.primitives import serialization

from services.key_authority.ca import Issuer
from services.key_authority.register import Grant, Register
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.telemetry.metrics import counter
from shelora.transport.certificates import Certificate, requested_key
from shelora.transport.enrolment import MAX_TOKEN_S, SECRET_BYTES, Token
from shelora.transport.identity import Identity, Role, checked_names
from shelora.transport.revocations import RevokedError, issued_ms
from shelora.transport.workload import WorkloadKey

CERTIFICATES_ISSUED: Final = counter(
    "certificates_issued_total",
    "Certificates signed, by the holder's role and why.",
    {"role": [role.value for role in Role], "why": ["enrolment", "renewal", "workload"]},
)

DEFAULT_EXPIRY_S: Final = 24 * 3600
_FEDERATION_ID: Final = re.compile(r"[a-z0-9-]{1,64}")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Workload:
    """Servers of one kind, which come and go and share a key."""

    key: WorkloadKey
    role: Role
    names: tuple[str, ...]
    """Names and addresses that they are reached at, as `checked_names` returns them."""


class Enrolments:
    """Issues tokens and certificates.

    Args:
        register: Keeps tokens and names.
        issuer: Signs.
        clock_ms: Unix milliseconds.
        entropy: Random bytes, for the tokens' secrets.
        workloads: Whose servers are certified for proving to hold their key.
    """

    def __init__(
        self,
        register: Register,
        issuer: Issuer,
        clock_ms: Callable[[], int],
        entropy: Callable[[int], bytes] = secrets.token_bytes,
        workloads: Sequence[Workload] = (),
    ) -> None:
        self._register = register
        self._issuer = issuer
        self._clock_ms = clock_ms
        self._entropy = entropy
        self._workloads = tuple(workloads)

    @property
    def authority(self) -> bytes:
        """The authority's certificate in DER."""
        return self._issuer.root.der

    async def create_token(self, grant: Grant, expires_in_s: int = 0) -> tuple[Token, int]:
        """A new token and when it expires, Unix milliseconds. `expires_in_s` 0 is a day.

        Raises: DomainError INVALID_ARGUMENT, naming the field.
        """
        checked = _checked(grant)
        if not 0 <= expires_in_s <= MAX_TOKEN_S:
            raise DomainError(Reason.INVALID_ARGUMENT, f"expires_in_s must be 0 to {MAX_TOKEN_S}")
        token, now_ms = Token(self._issuer.root.pin, self._entropy(SECRET_BYTES)), self._clock_ms()
        expires_ms = now_ms + (expires_in_s or DEFAULT_EXPIRY_S) * 1000
        await asyncio.to_thread(self._register.add, token.secret, checked, now_ms, expires_ms)
        _log.info(
            "token_created",
            role=checked.role,
            federation_id=checked.federation_id,
            client_id=checked.client_id,
            names=list(checked.names),
            expires_unix_ms=expires_ms,
        )
        return token, expires_ms

    async def enroll(self, token_text: str, request: bytes, client_id: str) -> bytes:
        """The certificate that a token is good for, in DER.

        Raises: DomainError TOKEN_REFUSED, CLIENT_EXISTS, INVALID_ARGUMENT, STORE_UNAVAILABLE.
        """
        token = Token.parse(token_text)
        fingerprint = _fingerprint(request)  # a malformed request does not cost the token
        redeemed = await asyncio.to_thread(
            self._register.redeem, token.secret, fingerprint, client_id, self._clock_ms()
        )
        return self._issued(
            request,
            redeemed.identity,
            redeemed.names,
            "enrolment",
            redeemed.issued_ms,
            promise=redeemed.promise,
        )

    async def enroll_server(self, request: bytes, proof: bytes) -> tuple[bytes, bytes]:
        """The certificate, in DER, of a server that holds a workload's key, and the proof that it is from here.

        Raises: DomainError TOKEN_REFUSED, INVALID_ARGUMENT.
        """
        for workload in self._workloads:
            if hmac.compare_digest(proof, workload.key.request_proof(self.authority, request)):
                identity, now_ms = Identity(workload.role), self._clock_ms()
                issued = await asyncio.to_thread(self._register.first_issue, identity, now_ms)
                certificate = self._issued(request, identity, workload.names, "workload", issued)
                return certificate, workload.key.answer_proof(self.authority, certificate)
        raise DomainError(
            Reason.TOKEN_REFUSED,
            "no workload key of this authority makes that proof: give server and authority the same key",
        )

    async def renew(self, request: bytes, holder: Certificate) -> bytes:
        """Another certificate for the holder of a valid one, in DER.

        It counts as issued before the holder was looked up, so that a revocation in between is one of it, too.

        Raises: DomainError CERTIFICATE_REVOKED, INVALID_ARGUMENT.
        """
        now_ms = self._clock_ms()
        revoked_ms = await asyncio.to_thread(self._register.revoked_ms, holder.identity)
        if issued_ms(holder) <= revoked_ms:
            raise RevokedError(holder.identity)
        issued = max(now_ms, issued_ms(holder))  # who was certified anew just now may be a second ahead
        return self._issued(request, holder.identity, holder.names, "renewal", issued, promise=holder.promise)

    def _issued(
        self,
        request: bytes,
        identity: Identity,
        names: tuple[str, ...],
        why: str,
        issued_ms: int,
        *,
        promise: Level | None = None,
    ) -> bytes:
        issued = datetime.fromtimestamp(issued_ms / 1000, UTC)
        certificate = self._issuer.issue(request, identity, names, issued, promise)
        CERTIFICATES_ISSUED.labels(identity.role, why).inc()
        _log.info("certificate_issued", identity=identity.uri, names=list(names), why=why)
        return certificate


def _checked(grant: Grant) -> Grant:
    if grant.role is Role.KEY_AUTHORITY:
        raise DomainError(Reason.INVALID_ARGUMENT, "role: the key authority certifies itself")
    if grant.role is Role.CLIENT and not grant.client_id:
        if not _FEDERATION_ID.fullmatch(grant.federation_id):
            raise DomainError(
                Reason.INVALID_ARGUMENT, "federation_id must be 1 to 64 characters of [a-z0-9-]"
            )
    else:
        Identity(grant.role, grant.federation_id, grant.client_id)  # raises, naming the field
    if grant.promise is not None and grant.role is not Role.CLIENT:
        raise DomainError(Reason.INVALID_ARGUMENT, "promise: only clients are promised protection")
    return replace(grant, names=checked_names(grant.role, grant.names))


def _fingerprint(request: bytes) -> bytes:
    """SHA-256 of the requested public key."""
    key = requested_key(request).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(key).digest()
