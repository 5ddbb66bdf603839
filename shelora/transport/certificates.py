"""X.509 as this system uses it: ECDSA on P-256, short lives, one URI that names the holder.

Only what both sides need: requests are made and certificates read here. Who signs is `services.key_authority.ca`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.transport.identity import Identity

BACKDATED: Final = timedelta(minutes=5)
"""How long before its making a certificate is already valid: clocks differ."""

MAX_REQUEST_BYTES: Final = 8192
"""Largest signing request, in DER; ours have about 250 bytes."""

PrivateKey = ec.EllipticCurvePrivateKey
PROMISE_OID: Final = x509.ObjectIdentifier("2.25.158152548905764896907048715693383518788")
"""Of our extension that says what protection a client was promised; any UUID may stand below 2.25 (X.667)."""

_PEM: Final = serialization.Encoding.PEM
_DER: Final = serialization.Encoding.DER
_UTF8_STRING: Final = 0x0C


def new_key() -> PrivateKey:
    """A fresh key on P-256, the one curve that every TLS library takes."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def key_from_pem(pem: bytes) -> PrivateKey:
    """Reads what `key_to_pem` wrote. Raises: ValueError for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm) as error:  # encrypted, or of a kind that OpenSSL does not know
        raise ValueError("not a key that can be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on an elliptic curve")  # noqa: TRY004 - malformed content, not a wrong call
    return key


def signing_request(key: PrivateKey) -> bytes:
    """A request for a certificate of that key, in DER. It names nobody: the authority knows who asks."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(_DER)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a signing request proves possession of.

    Raises: DomainError INVALID_ARGUMENT if the request is malformed, not signed by its key, or not on P-256.
    """
    if len(request) > MAX_REQUEST_BYTES:
        raise DomainError(Reason.INVALID_ARGUMENT, f"signing_request has more than {MAX_REQUEST_BYTES} bytes")
    try:
        parsed = x509.load_der_x509_csr(request)
        key, signed = parsed.public_key(), parsed.is_signature_valid
    except Exception as error:  # the parser raises several kinds for malformed requests
        raise DomainError(Reason.INVALID_ARGUMENT, "signing_request is not a PKCS #10 request") from error
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise DomainError(
            Reason.INVALID_ARGUMENT, "signing_request must be signed by its own key, on the curve P-256"
        )
    return key


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a certificate of this system says."""

    identity: Identity
    names: tuple[str, ...]
    """DNS names and IP addresses."""
    serial: int
    issued: datetime
    """When it was made; it is valid `BACKDATED` before that."""
    expires: datetime
    promise: Level | None = None
    """Least protection that the client was promised when it enrolled; None if nothing was said."""

    @property
    def renewal_due(self) -> datetime:
        """When its holder asks for another: after two thirds of its life."""
        return self.expires - (self.expires - self.issued) / 3


@lru_cache(maxsize=4096)
def read_certificate(pem: bytes) -> Certificate:
    """Reads a certificate; that it is genuine was checked by TLS.

    Raises: DomainError INVALID_ARGUMENT if it is none of this system.
    """
    try:
        return _facts(x509.load_pem_x509_certificate(pem))
    except DomainError:
        raise
    except Exception as error:  # the parser raises several kinds for malformed certificates
        raise DomainError(Reason.INVALID_ARGUMENT, "the certificate names nobody") from error


def _facts(parsed: x509.Certificate) -> Certificate:
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise DomainError(Reason.INVALID_ARGUMENT, "the certificate does not name exactly one identity")
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return Certificate(
        identity=Identity.from_uri(uris[0]),
        names=(*names.get_values_for_type(x509.DNSName), *addresses),
        serial=parsed.serial_number,
        issued=parsed.not_valid_before_utc + BACKDATED,
        expires=parsed.not_valid_after_utc,
        promise=_promise(parsed.extensions),
    )


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Whom a genuine certificate names, and the key that signs for it."""

    identity: Identity
    key: ec.EllipticCurvePublicKey
    not_before: datetime
    not_after: datetime


@lru_cache(maxsize=4096)
def holder(der: bytes, authority: bytes) -> Holder:
    """Whom a certificate names, once it is known to be of an authority.

    For statements that travel through servers, where no TLS connection vouches for the signer. The time is not checked.

    Args:
        der: The certificate, from anyone.
        authority: The pinned certificate of the authority, in DER.

    Raises: DomainError UNAUTHENTICATED if the authority did not issue it to an identity of this system, with a key on
        P-256.
    """
    try:
        parsed = x509.load_der_x509_certificate(der)
        parsed.verify_directly_issued_by(x509.load_der_x509_certificate(authority))
        facts, key = _facts(parsed), parsed.public_key()
        certifies = parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Exception as error:  # the parser raises several kinds for malformed certificates
        raise DomainError(
            Reason.UNAUTHENTICATED, "the certificate is not of the federation's authority"
        ) from error
    if certifies or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise DomainError(
            Reason.UNAUTHENTICATED, "the certificate has no key on P-256 that signs for its holder"
        )
    return Holder(
        identity=facts.identity,
        key=key,
        not_before=parsed.not_valid_before_utc,
        not_after=parsed.not_valid_after_utc,
    )


def promise_extension(promise: Level) -> x509.UnrecognizedExtension:
    """The extension for a client's certificate: the level's name as an UTF8String."""
    name = promise.encode()
    return x509.UnrecognizedExtension(PROMISE_OID, bytes((_UTF8_STRING, len(name))) + name)


def _promise(extensions: x509.Extensions) -> Level | None:
    """Raises: ValueError for a level that this version does not know: what was promised is not to be lost."""
    try:
        value = extensions.get_extension_for_oid(PROMISE_OID).value
    except x509.ExtensionNotFound:
        return None
    assert isinstance(value, x509.UnrecognizedExtension)
    return Level(value.value[2:].decode())


def der_to_pem(der: bytes) -> bytes:
    """A certificate in PEM. Raises: DomainError INVALID_ARGUMENT if it is none."""
    try:
        return x509.load_der_x509_certificate(der).public_bytes(_PEM)
    except (ValueError, x509.InvalidVersion) as error:
        raise DomainError(Reason.INVALID_ARGUMENT, "not a certificate in DER") from error


def pem_to_der(pem: bytes) -> bytes:
    """The first certificate of a PEM text in DER."""
    return x509.load_pem_x509_certificate(pem).public_bytes(_DER)


def same_key(key: PrivateKey, pem: bytes) -> bool:
    """Whether a certificate is for that key. Raises: ValueError if it is not a certificate."""
    try:
        return x509.load_pem_x509_certificate(pem).public_key() == key.public_key()
    except UnsupportedAlgorithm:
        return False


def utc_now() -> datetime:
    """The clock certificates are held against."""
    return datetime.now(UTC)
