"""Enrols the members of a local cluster, each with a token, as an operator would by hand."""

from pathlib import Path
from typing import Final

from shelora.errors import DomainError
from shelora.levels import Level
from shelora.operator import create_token, own_credentials
from shelora.transport.certificates import pem_to_der
from shelora.transport.enrolment import enroll, presented_chain
from shelora.transport.identity import Role
from shelora.transport.tls import Held, IdentityFolder

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
CLIENT_IDENTITY: Final = "identity"
"""Folder in an agent's state_dir, where the agent looks for its identity."""


class Members:
    """Identities below one folder. An identity that is still valid is kept from run to run."""

    def __init__(
        self, folder: Path, key_authority: str, enrolment: str, names: tuple[str, ...] = LOCAL_NAMES
    ) -> None:
        """Takes the addresses of the key authority, for members and for newcomers, and the names of all servers."""
        self._names = names
        self._folder = folder
        self._key_authority = key_authority
        self._enrolment = enrolment

    @property
    def operator(self) -> Path:
        """Folder of the operator's identity."""
        return self._folder / "operator"

    async def enrol_operator(self, token: str) -> None:
        """Enrols the operator with the token that the key authority left."""
        if not self._valid(self.operator):
            await enroll(token, self._enrolment, self.operator)

    async def enrol_server(self, name: str, role: Role) -> Path:
        """Enrols a server of this machine. Returns the folder of its identity."""
        folder = self._folder / name
        if not self._valid(folder):
            await self._enrol(folder, role, names=self._names)
        return folder

    async def enrol_client(
        self, federation: str, client: str, folder: Path, promise: Level | None = None
    ) -> Held:
        """Enrols a client, with a token for this name that promises it this protection."""
        return await self._enrol(folder, Role.CLIENT, federation=federation, client=client, promise=promise)

    async def _enrol(
        self,
        folder: Path,
        role: Role,
        *,
        federation: str = "",
        client: str = "",
        names: tuple[str, ...] = (),
        promise: Level | None = None,
    ) -> Held:
        """Issues a token as the operator, and exchanges it as the newcomer."""
        credentials = await own_credentials(self.operator, self._key_authority)
        created = await create_token(
            self._key_authority,
            credentials,
            role,
            federation=federation,
            client=client,
            names=names,
            promise=promise,
        )
        return await enroll(created.token, self._enrolment, folder)

    def _valid(self, folder: Path) -> bool:
        """Whether an identity has not expired and is of this authority, which may have been made anew."""
        try:
            held = IdentityFolder(folder).read_valid()
        except DomainError:
            return False
        return pem_to_der(held.authority) in presented_chain(self._enrolment)
