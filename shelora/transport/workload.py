"""Keys by which servers that come and go become members: shared with the key authority, in place of a token each.

The key never travels. The newcomer sees the authority's certificate in the TLS handshake, as one that it does not
believe yet, and sends a MAC over that certificate and its signing request. Somebody in between, with a certificate of
their own, gets a MAC over theirs, which the authority refuses, and cannot make the MAC that the newcomer wants to see
over its certificate in return. So both know that the other holds the key.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shelora.errors import DomainError, Reason

KEY_BYTES: Final = 32
_HEX: Final = re.compile(rf"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class WorkloadKey:
    """A key that servers of one kind share with the authority. The `repr` shows no secret."""

    secret: bytes = field(repr=False)
    """32 uniformly random bytes."""

    @classmethod
    def from_hex(cls, text: str) -> "WorkloadKey":
        """Reads 64 hexadecimal digits. Raises: DomainError CONFIGURATION_INVALID, which does not show them."""
        if not _HEX.fullmatch(text.strip()):
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"a workload key is {2 * KEY_BYTES} hexadecimal digits: make one with `openssl rand -hex {KEY_BYTES}`",
            )
        return cls(bytes.fromhex(text.strip()))

    @classmethod
    def from_file(cls, path: Path) -> "WorkloadKey":
        """Reads a file of them. Raises: DomainError CONFIGURATION_INVALID."""
        try:
            return cls.from_hex(path.read_text(errors="replace"))
        except OSError as error:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"the workload key {path} cannot be read: {error.strerror}"
            ) from error

    def request_proof(self, authority: bytes, request: bytes) -> bytes:
        """What a newcomer sends. Takes the authority's certificate as it saw it, and its signing request, in DER."""
        return self._mac(b"shelora workload request", authority, request)

    def answer_proof(self, authority: bytes, certificate: bytes) -> bytes:
        """What the authority answers. Takes its own certificate and the newcomer's, in DER."""
        return self._mac(b"shelora workload answer", authority, certificate)

    def _mac(self, purpose: bytes, *parts: bytes) -> bytes:
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hmac.digest(self.secret, purpose + digests, "sha256")
