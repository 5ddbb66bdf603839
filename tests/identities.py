"""Identities for tests: an authority in this process, and folders that it filled."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from services.key_authority.ca import DEFAULT_LIFETIME, Issuer, Root, RootFile
from services.key_authority.sealer import Sealer, SealingKey
from shelora.transport.certificates import der_to_pem, new_key, signing_request
from shelora.transport.identity import SERVERS, Identity, Role
from shelora.transport.tls import Held, IdentityFolder, TlsCredentials

LOCAL = ("localhost", "127.0.0.1")
OPERATOR, COORDINATOR = Identity(Role.OPERATOR), Identity(Role.COORDINATOR)
AGGREGATION, KEY_AUTHORITY = Identity(Role.AGGREGATION), Identity(Role.KEY_AUTHORITY)

SEALER = Sealer(SealingKey(bytes(range(32))))
VAULT = "5e" * 16


class TestAuthority:
    """Certifies whom it is told to, with a root of its own or one that is given."""

    __test__ = False

    def __init__(self, folder: Path, root: Root | None = None) -> None:
        self.folder = folder
        self.root = root or RootFile(folder / "root", SEALER, VAULT).load_or_create()

    def held(
        self,
        identity: Identity,
        names: tuple[str, ...] | None = None,
        lifetime: timedelta = DEFAULT_LIFETIME,
        ago: timedelta = timedelta(),
    ) -> Held:
        """An identity that was certified `ago`."""
        if names is None:
            names = LOCAL if identity.role in SERVERS else ()
        key = new_key()
        issuer = Issuer(self.root, lifetime, lambda: datetime.now(UTC) - ago)
        certificate = issuer.issue(signing_request(key), identity, names)
        return Held(key, der_to_pem(certificate), self.root.certificate)

    def enrolled(self, identity: Identity, name: str = "", **options) -> Path:
        """A folder that holds such an identity."""
        folder = self.folder / (name or identity.uri.removeprefix("shelora://").replace("/", "."))
        IdentityFolder(folder).write(self.held(identity, **options))
        return folder

    def credentials(self, identity: Identity, name: str = "", **options) -> TlsCredentials:
        return TlsCredentials(IdentityFolder(self.enrolled(identity, name, **options)))


def client(name: str = "ward-7", federation: str = "clinic") -> Identity:
    return Identity(Role.CLIENT, federation, name)


class Stranger:
    """Credentials that trust the authority and show nothing."""

    def __init__(self, authority: TestAuthority) -> None:
        self._authority = authority

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self._authority.root.certificate)

    def generation(self) -> int:
        return 0
