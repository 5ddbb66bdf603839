"""What an agent shows to be given secrets."""

import hmac
import os
import re
from pathlib import Path
from typing import Final

from shelora.errors import DomainError, Reason

_HEX: Final = re.compile(r"[0-9a-f]{32,256}")
_OTHERS: Final = 0o077
_READ_LIMIT_BYTES: Final = 4096


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
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(_READ_LIMIT_BYTES)
        except OSError as error:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"the agent credential {path} cannot be read: {error.strerror}"
            ) from error
        if mode & _OTHERS:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"the agent credential is open to other users; run: chmod 600 {path}",
            )
        return cls(content.decode("ascii", errors="replace").strip())

    def require(self, authorization: str | bytes | None) -> None:
        """Accepts `Bearer <hex>`, compared in constant time.

        Raises: DomainError UNAUTHENTICATED, the same for a missing and for a wrong credential.
        """
        shown = authorization.encode() if isinstance(authorization, str) else authorization or b""
        if not hmac.compare_digest(shown, b"Bearer " + self._hexadecimal):
            raise DomainError(Reason.UNAUTHENTICATED, "the agent credential is missing or wrong")
