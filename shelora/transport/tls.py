"""A process's own identity, and the TLS credentials made from it: TLS 1.3, both sides show a certificate.

On disk the identity is one file, so key and certificate are always those of one another: private key, certificate and
the authority's certificate in PEM, mode 0600, replaced atomically. A holder of `TlsCredentials` follows the file.
Who can certify itself keeps its identity in memory.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from shelora import files
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import (
    Certificate,
    PrivateKey,
    key_from_pem,
    key_to_pem,
    read_certificate,
    same_key,
    utc_now,
)

IDENTITY_FILE: Final = "identity.pem"
_OTHERS: Final = 0o077


class Credentials(Protocol):
    """What secures a connection, on both sides. None in its place means plaintext, which only tests use."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client: whom it trusts and who it is."""

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server: who it is and whom it accepts."""

    def generation(self) -> int:
        """Grows whenever the identity was replaced; channels opened before show the old one."""


@dataclass(frozen=True)
class Held:
    """An identity with its private key. The `repr` shows no secret."""

    key: PrivateKey = field(repr=False)
    certificate: bytes
    """PEM."""
    authority: bytes
    """Certificate of the authority, PEM."""

    @property
    def facts(self) -> Certificate:
        """What the certificate says."""
        return read_certificate(self.certificate)

    @property
    def chain(self) -> bytes:
        """What a server sends: its certificate, then the authority's, which newcomers hold against their pin."""
        return self.certificate + self.authority


class IdentityKeeper(Protocol):
    """Where an identity is kept."""

    def write(self, held: Held) -> None:
        """Replaces the identity."""

    def read(self) -> Held:
        """The identity. Raises: DomainError CONFIGURATION_INVALID if there is none that can be used."""

    def read_valid(self) -> Held:
        """The identity; raises CONFIGURATION_INVALID also if its certificate has expired."""

    def stamp(self) -> object | None:
        """Something that changes whenever the identity was replaced; None if it is gone."""


class IdentityInMemory:
    """An identity that no disk holds. It ends with the process, which must be able to get another."""

    def __init__(self) -> None:
        self._held: Held | None = None

    def write(self, held: Held) -> None:
        self._held = held

    def read(self) -> Held:
        if self._held is None:
            raise _unusable("this process has no identity yet")
        return self._held

    def read_valid(self) -> Held:
        held = self.read()
        if held.facts.expires <= utc_now():
            raise _unusable("the certificate of this process has expired")
        return held

    def stamp(self) -> object | None:
        return self._held and self._held.certificate


class IdentityFolder:
    """The folder of an identity; made with mode 0700."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / IDENTITY_FILE

    def write(self, held: Held) -> None:
        """Replaces the identity: all of it or, if the machine fails, nothing. Raises: DomainError DISK_UNAVAILABLE."""
        with files.failures_named(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.replace(self.path, key_to_pem(held.key) + held.chain)

    def exists(self) -> bool:
        """Whether there is an identity."""
        return self.path.exists()

    def read(self) -> Held:
        """The identity.

        Raises: DomainError CONFIGURATION_INVALID if there is none, it is damaged, or other users can read it.
        """
        try:
            mode, content = self.path.stat().st_mode, self.path.read_bytes()
        except OSError as error:
            raise _unusable(
                f"there is no identity in {self._folder} ({error.strerror}): enrol first, with a token "
                "from `shelora token create`"
            ) from error
        if mode & _OTHERS:
            raise _unusable(f"others can read {self.path}; run: chmod 600 {self.path}")
        return self._parsed(content)

    def read_valid(self) -> Held:
        """The identity; raises CONFIGURATION_INVALID also if its certificate has expired."""
        held = self.read()
        if held.facts.expires <= utc_now():
            raise _unusable(
                f"the certificate in {self.path} expired at {held.facts.expires:%Y-%m-%d %H:%M} UTC: "
                "enrol again, with a new token from `shelora token create`"
            )
        return held

    def stamp(self) -> object | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns  # a replaced file has another inode

    def _parsed(self, content: bytes) -> Held:
        try:
            key = key_from_pem(content)
            certificate, authority = (
                parsed.public_bytes(serialization.Encoding.PEM)
                for parsed in x509.load_pem_x509_certificates(content)
            )
            read_certificate(certificate)
            matches = same_key(key, certificate)
        except (ValueError, x509.InvalidVersion, DomainError) as error:
            raise _unusable(f"{self.path} is damaged: enrol again") from error
        if not matches:
            raise _unusable(f"{self.path} is damaged, its certificate is for another key: enrol again")
        return Held(key, certificate, authority)


class TlsCredentials:
    """Credentials that follow an identity: a renewed certificate is used from the next handshake on.

    Args:
        keeper: Where the identity is kept.
        anonymous_clients: As a server, ask callers for no certificate. For the enrolment port alone.

    Raises: DomainError CONFIGURATION_INVALID as `IdentityFolder.read_valid`.
    """

    def __init__(self, keeper: IdentityKeeper, *, anonymous_clients: bool = False) -> None:
        self._keeper = keeper
        self._anonymous = anonymous_clients
        self._lock = threading.Lock()  # gRPC asks for the server's configuration from threads of its own
        self._stamp = keeper.stamp()
        self._held = keeper.read_valid()
        self._generation = 0

    @property
    def held(self) -> Held:
        """The identity as it is on disk now."""
        self.generation()
        return self._held

    def generation(self) -> int:
        """Grows whenever the identity was replaced. One that is gone stays in use: what is in memory still holds."""
        with self._lock:
            if (stamp := self._keeper.stamp()) not in {None, self._stamp}:
                self._held, self._stamp = self._keeper.read(), stamp
                self._generation += 1
            return self._generation

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Trusts this authority alone, and shows the certificate."""
        held = self.held
        return grpc.ssl_channel_credentials(held.authority, key_to_pem(held.key), held.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Shows the certificate of the moment, and demands one of this authority."""
        seen = self.generation()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            if (now := self.generation()) == seen:
                return None
            seen = now
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            changed,  # type: ignore[arg-type]  # None, for "as before", is documented but not in the stub
            require_client_authentication=not self._anonymous,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        held = self._held
        return grpc.ssl_server_certificate_configuration(
            [(key_to_pem(held.key), held.chain)], root_certificates=held.authority
        )


def _unusable(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
