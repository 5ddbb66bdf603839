"""Statements of clients: bytes signed with ECDSA P-256 by the key of a certificate, bound to a kind and a context.

A reader of a statement checks the signature over the bytes as they are and only then parses them, so that no
canonical form of messages is needed. Revocation is not seen here: servers refuse revoked clients' calls.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NoReturn, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from google.protobuf.message import DecodeError, Message

from shelora.committee.context import RoundContext
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import Holder, PrivateKey, holder
from shelora.transport.identity import Role
from shelora.v1 import committee_pb2 as pb

MAX_CONTENT_BYTES: Final = 64 * 1024
MAX_SIGNATURE_BYTES: Final = 80
MAX_CERTIFICATE_BYTES: Final = 4096

_DOMAIN: Final = b"shelora/committee/v1/statement/"
_Message = TypeVar("_Message", bound=Message)


class StatementKind(StrEnum):
    """What a statement is about; part of what is signed."""

    COMMITTEE_KEY = "committee-key"
    DEALING = "dealing"
    CHECK = "check"
    SET = "set"
    ANSWER = "answer"


def signed_bytes(kind: StatementKind, context: RoundContext, content: bytes) -> bytes:
    """What a signature is over: domain, kind, digest of the context, content. The kind has no zero byte."""
    return _DOMAIN + kind.encode() + b"\0" + context.digest + content


class Signer:
    """Signs one client's statements. No `repr` of the key, no pickle."""

    def __init__(self, name: str, key: PrivateKey, certificate: bytes) -> None:
        """Args: name: The client's. key: Of its certificate. certificate: DER."""
        self.name = name
        self._key = key
        self._certificate = certificate

    def sign(self, kind: StatementKind, context: RoundContext, content: bytes) -> pb.Signed:
        """A statement of these bytes. ECDSA is randomized: sign once and keep what must stay the same."""
        signature = self._key.sign(signed_bytes(kind, context, content), ec.ECDSA(SHA256()))
        return pb.Signed(content=content, signature=signature, certificate=self._certificate)

    def __repr__(self) -> str:
        return f"Signer({self.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key is not pickled or copied")


class Trust:
    """Verifies statements of one federation's clients against its pinned authority."""

    def __init__(
        self,
        authority: bytes,
        federation_id: str,
        clock: Callable[[], datetime],
        grace: timedelta = timedelta(),
    ) -> None:
        """What statements are held against.

        Args:
            authority: The pinned root certificate in DER.
            federation_id: Whose clients may sign.
            clock: UTC time certificates are held against.
            grace: How long after its end a certificate still vouches: for members and dealers as long as a round may
                last; for readers of results longer, as certificates live for a day and a client may come back later.
        """
        self._grace = grace
        self._authority = authority
        self._federation = federation_id
        self._clock = clock

    def author(self, statement: pb.Signed, kind: StatementKind, context: RoundContext) -> str:
        """The client that made a statement.

        Raises: DomainError(SIGNATURE_REFUSED): certificate of another authority, federation or role, or not valid
            now; signature of another key, kind, context or content.
        """
        _check_sizes(statement)
        signer = self._holder(statement.certificate)
        try:
            message = signed_bytes(kind, context, statement.content)
            signer.key.verify(statement.signature, message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            client = signer.identity.client_id
            raise _refused(f"a {kind} of {client} is not signed by it for this round") from None
        return signer.identity.client_id

    def verify(self, statement: pb.Signed, kind: StatementKind, context: RoundContext, name: str) -> None:
        """Raises: DomainError(SIGNATURE_REFUSED): as `author`, or another client made it."""
        author = self.author(statement, kind, context)
        if author != name:
            raise _refused(f"a {kind} said to be of {name} is signed by {author}")

    def _holder(self, certificate: bytes) -> Holder:
        try:
            found = holder(certificate, self._authority)
        except DomainError as error:
            raise _refused(error.message) from None
        identity = found.identity
        if identity.role is not Role.CLIENT or identity.federation_id != self._federation:
            raise _refused(f"a statement is signed by {identity}, who is not a client of this federation")
        if not found.not_before <= self._clock() <= found.not_after + self._grace:
            raise _refused(f"the certificate of {identity.client_id} is not valid now")
        return found


def parsed(kind: type[_Message], content: bytes) -> _Message:
    """A message from the bytes of a statement that was verified.

    Raises: DomainError(INVALID_ARGUMENT): not such a message.
    """
    message = kind()
    try:
        message.ParseFromString(content)
    except DecodeError:
        raise DomainError(Reason.INVALID_ARGUMENT, f"not a {kind.__name__}") from None
    return message


def _check_sizes(statement: pb.Signed) -> None:
    small = (
        len(statement.content) <= MAX_CONTENT_BYTES
        and len(statement.signature) <= MAX_SIGNATURE_BYTES
        and len(statement.certificate) <= MAX_CERTIFICATE_BYTES
    )
    if not small:
        raise _refused("a statement is larger than any that a client makes")


def _refused(message: str) -> DomainError:
    return DomainError(Reason.SIGNATURE_REFUSED, message)
