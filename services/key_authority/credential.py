"""What an agent shows to be given secrets."""

import hmac
import re
from pathlib import Path
from typing import Final

from services.key_authority.files import read_secret
from shelora.errors import DomainError, Reason

_HEX: Final = re.compile(r"[0-9a-f]{32,256}")


class AgentCredential:
    """One secret that all agents of this authority share, at least 128 bits in lower-case hexadecimal."""

    def __init__(self, hexadecimal: str) -> None:
        """Raises: DomainError CONFIGURATION_INVALID if it is not 32 to 256 lower-case hexadecimal digits."""
        if not _HEX.fullmatch(hexadecimal):
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                "the agent credential must be 32 to 256 lower-case hexadecimal digits; "
                "make one with: openssl rand -hex 32",
            )
        self._hexadecimal = hexadecimal.encode("ascii")

    def __repr__(self) -> str:
        return "AgentCredential(***)"

    @classmethod
    def from_file(cls, path: Path) -> "AgentCredential":
        """Reads a file that holds the credential and, perhaps, white space around it.

        Raises: DomainError CONFIGURATION_INVALID if it cannot be read, is open to other users, or holds something
        else; the message says what to run.
        """
        return cls(read_secret(path, "agent credential"))

    def require(self, authorization: str | bytes | None) -> None:
        """Accepts `Bearer <hex>`, compared in constant time.

        Raises: DomainError UNAUTHENTICATED, the same for a missing and for a wrong credential.
        """
        shown = authorization.encode() if isinstance(authorization, str) else authorization or b""
        if not hmac.compare_digest(shown, b"Bearer " + self._hexadecimal):
            raise DomainError(Reason.UNAUTHENTICATED, "the agent credential is missing or wrong")
