"""The certificate authority: one root, made at the first start, that signs short-lived certificates."""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.key_authority import disk
from services.key_authority.sealer import Binding, SealBrokenError, Sealer
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.transport.certificates import (
    BACKDATED,
    PrivateKey,
    key_from_pem,
    key_to_pem,
    new_key,
    promise_extension,
    requested_key,
    same_key,
    utc_now,
)
from shelora.transport.identity import SERVERS, Identity

ROOT_LIFETIME: Final = timedelta(days=3650)
DEFAULT_LIFETIME: Final = timedelta(hours=24)

_PEM: Final = serialization.Encoding.PEM
_DER: Final = serialization.Encoding.DER
_FILE: Final = "root.sealed"


@dataclass(frozen=True)
class Root:
    """The authority's key and certificate. The `repr` shows no secret."""

    key: PrivateKey = field(repr=False)
    certificate: bytes
    """PEM."""

    @property
    def pin(self) -> bytes:
        """SHA-256 of the certificate in DER, 32 bytes: what tokens carry."""
        return hashlib.sha256(self.der).digest()

    @property
    def der(self) -> bytes:
        return x509.load_pem_x509_certificate(self.certificate).public_bytes(_DER)


class RootFile:
    """Keeps the root on disk: one sealed file, key and certificate in PEM, written once, whole or not at all.

    The one place that knows the form of the file.

    Args:
        folder: Made with mode 0700 if it is missing.
        sealer: Seals the file.
        vault: Identity of the vault; the root of another vault does not open.
        evidence: Finds a file that shows that there was a root, so that a lost one is not replaced by another.
    """

    def __init__(
        self, folder: Path, sealer: Sealer, vault: str, evidence: Callable[[], Path | None] = lambda: None
    ) -> None:
        self._folder = folder
        self._path = folder / _FILE
        self._sealer = sealer
        self._binding = Binding(purpose="certificate authority", vault=vault)
        self._evidence = evidence

    def load_or_create(self) -> Root:
        """The root. Of concurrent processes one makes it.

        Raises: DomainError CONFIGURATION_INVALID if the file cannot be used, and is left as it is; or if it is missing
        although others show that it was there.
        """
        disk.private_folder(self._folder)
        root = self.load()
        if root is None:
            self._require_new()
            self._create(_new_root())
            root = self._read()  # of several writers the first won
        return root

    def load(self) -> Root | None:
        """The root, None if there is none yet. Raises: as `load_or_create`."""
        return self._read() if self._path.exists() else None

    def _require_new(self) -> None:
        if (found := self._evidence()) is not None:
            raise _unusable(
                f"{self._path} is missing, but {found} shows that there was one: restore it from a backup of this "
                "folder. A new certificate authority would know nobody; if you want one, start in an empty folder"
            )

    def _create(self, root: Root) -> None:
        blob = self._sealer.seal(self._binding, key_to_pem(root.key) + root.certificate)
        try:
            files.create(self._path, blob)
        except OSError as error:
            raise _unusable(f"the certificate authority cannot use {self._path}: {error.strerror}") from error

    def _read(self) -> Root:
        try:
            return _parsed(self._sealer.open(self._binding, self._path.read_bytes()))
        except OSError as error:
            raise _unusable(f"the certificate authority cannot use {self._path}: {error.strerror}") from error
        except DomainError as error:
            raise _unusable(
                f"{self._path} is {error.message}; it was left as it is, restore it from a backup"
            ) from None


class Issuer:
    """Signs certificates.

    Args:
        root: Signs them.
        lifetime: How long they are valid from now on.
        clock: The time.
    """

    def __init__(
        self,
        root: Root,
        lifetime: timedelta = DEFAULT_LIFETIME,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.root = root
        self._lifetime = lifetime
        self._clock = clock
        self._parent = x509.load_pem_x509_certificate(root.certificate)

    def issue(
        self,
        request: bytes,
        identity: Identity,
        names: tuple[str, ...] = (),
        issued: datetime | None = None,
        promise: Level | None = None,
    ) -> bytes:
        """A certificate for the key of a signing request, in DER.

        Args:
            request: PKCS #10 in DER; nothing but its key is taken from it.
            identity: Whom the certificate names.
            names: DNS names and addresses of a server, as `checked_names` returns them.
            issued: What it says about when it was issued, on which its revocation depends; now by default.
            promise: Least protection that a client is promised.

        Raises: DomainError INVALID_ARGUMENT if the request is malformed or not signed by its key.
        """
        key, now = requested_key(request), issued or self._clock()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.role.value)]))
            .issuer_name(self._parent.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + self._lifetime)
        )
        for extension, critical in _extensions(key, self._parent, identity, names):
            builder = builder.add_extension(extension, critical)
        if promise is not None:
            builder = builder.add_extension(promise_extension(promise), critical=False)
        return builder.sign(self.root.key, hashes.SHA256()).public_bytes(_DER)


def _extensions(
    key: ec.EllipticCurvePublicKey, parent: x509.Certificate, identity: Identity, names: tuple[str, ...]
) -> list[tuple[x509.ExtensionType, bool]]:
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.role in SERVERS:  # nobody else can pose as a server
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    signer = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    alternatives = [x509.UniformResourceIdentifier(identity.uri), *map(_general_name, names)]
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage(purposes), False),
        (x509.SubjectAlternativeName(alternatives), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), False),
    ]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _parsed(content: bytes) -> Root:
    """Raises: SealBrokenError if it is not a root; only a mistake of ours can have sealed such a thing."""
    try:
        root = Root(key_from_pem(content), x509.load_pem_x509_certificate(content).public_bytes(_PEM))
        matches = same_key(root.key, root.certificate)
    except ValueError:
        matches = False
    if not matches:
        raise SealBrokenError("damaged: it holds no key with its certificate")
    return root


def _new_root() -> Root:
    key, now = new_key(), utc_now()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"shelora authority {secrets.token_hex(4)}")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Root(key, builder.sign(key, hashes.SHA256()).public_bytes(_PEM))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _unusable(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
