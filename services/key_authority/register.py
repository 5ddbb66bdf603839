"""Tokens, enrolled clients and revocations, in one sealed file: a token is consumed in the same write that takes the
name, and voided in the same write that revokes its holder.

The file is authentic as a whole: who has not the sealing key can enter no token and free no name, only put back what
was there before. Tokens are kept as their SHA-256: the file enrols nobody.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.key_authority.sealer import Binding, SealBrokenError, Sealer
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import Revocation, first_issue_after

PAGE: Final = 1000
"""Revocations listed at once."""

_Result = TypeVar("_Result")

_KEPT_MS: Final = 24 * 3600 * 1000
"""How long an expired token is remembered, so that a repeat is answered as before."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a token allows, once."""

    role: Role
    federation_id: str = ""
    client_id: str = ""
    """Empty: a client names itself."""
    names: tuple[str, ...] = ()
    """Names and addresses of a server."""
    promise: Level | None = None
    """Least protection that the operator promises a client."""


class Redeemed(NamedTuple):
    """What a token was good for."""

    identity: Identity
    """Whom to certify."""
    names: tuple[str, ...]
    """Names and addresses of a server."""
    issued_ms: int
    """When the certificate counts as issued, Unix milliseconds: after the revocation of its predecessors, if any."""
    promise: Level | None = None
    """Least protection that the client is promised."""


class Revoked(NamedTuple):
    """A revocation in the register."""

    revocation: Revocation
    enrolled_again: bool
    """Whether the client, or anyone of the role, enrolled anew since, with a token."""


class _Stored(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex"
    )


class _Token(_Stored):
    grant: Grant
    expires_ms: int
    used_by: Annotated[bytes, Field(min_length=32, max_length=32)] | None = None
    """SHA-256 of the public key that it was consumed for."""
    used_as: str = ""
    """URI of the identity that it made."""


class _Revoked(_Stored):
    federation_id: str
    client_id: str
    at_ms: int
    enrolled_again: bool
    role: Role = Role.CLIENT

    @classmethod
    def of(cls, revocation: Revocation, *, enrolled_again: bool) -> "_Revoked":
        role, federation_id, client_id = _name(revocation.identity)
        return cls(
            role=role,
            federation_id=federation_id,
            client_id=client_id,
            at_ms=revocation.at_ms,
            enrolled_again=enrolled_again,
        )

    def concerns(self, identity: Identity) -> bool:
        return _name(self) == _name(identity)

    def listed(self) -> Revoked:
        return Revoked(Revocation(Identity(*_name(self)), self.at_ms), self.enrolled_again)


class _Content(_Stored):
    """What is sealed, as JSON. A new format gets a new number and its own class."""

    format: Literal[1] = 1
    tokens: dict[str, _Token] = {}
    """By the SHA-256 of their secret, in hexadecimal."""
    clients: frozenset[tuple[str, str]] = frozenset()
    """Federation and name of every client that was enrolled."""
    revocations: tuple[_Revoked, ...] = ()
    """In order of their times, of which no two are equal."""

    def with_token(self, digest: str, token: _Token, now_ms: int) -> "_Content":
        """With a token more, and without those that expired long ago."""
        kept = {key: old for key, old in self.tokens.items() if old.expires_ms >= now_ms - _KEPT_MS}
        return self.model_copy(update={"tokens": {**kept, digest: token}})

    def with_client(self, identity: Identity, *, replace: bool) -> "_Content":
        """With a client more. A name is taken anew only by the operator's will: else a token would make impostors.

        Raises: DomainError CLIENT_EXISTS.
        """
        name = (identity.federation_id, identity.client_id)
        if name in self.clients and not replace:
            raise DomainError(
                Reason.CLIENT_EXISTS,
                "the federation has a client of this name: choose another, or ask for a token for it",
            )
        return self.model_copy(update={"clients": self.clients | {name}})

    def without_tokens_of(self, identity: Identity) -> "_Content":
        """Without the tokens that made this holder or could make it anew.

        Of operators also without all that are not used yet: the one to be cut off may have issued them.
        """

        def void(token: _Token) -> bool:
            issued = identity.role is Role.OPERATOR and token.used_by is None
            return issued or token.used_as == identity.uri or _name(token.grant) == _name(identity)

        kept = {digest: token for digest, token in self.tokens.items() if not void(token)}
        return self.model_copy(update={"tokens": kept})

    def with_revocations(self, revoked: Iterable[_Revoked]) -> "_Content":
        ordered = sorted([*self.revocations, *revoked], key=lambda entry: entry.at_ms)
        return self.model_copy(update={"revocations": tuple(ordered)})

    def revoked_ms(self, identity: Identity) -> int:
        """The time up to which a holder's certificates are revoked, Unix milliseconds; 0 for none."""
        return max((entry.at_ms for entry in self.revocations if entry.concerns(identity)), default=0)

    def first_issue(self, identity: Identity, now_ms: int) -> int:
        """When a certificate of now is to count as issued, so that no revocation covers it, Unix milliseconds."""
        revoked_ms = self.revoked_ms(identity)
        return max(now_ms, first_issue_after(revoked_ms) if revoked_ms else 0)


class Register:
    """The one user of the file. Threads may share it; a lock on the data folder keeps other processes out.

    Args:
        path: The file; while it is missing, there is no token and no client.
        sealer: Seals it.
        vault: Identity of the vault; the register of another vault does not open.

    Raises: DomainError CONFIGURATION_INVALID, with the remedy, if the file does not open; it is left as it is.
    """

    def __init__(self, path: Path, sealer: Sealer, vault: str) -> None:
        self._path = path
        self._sealer = sealer
        self._binding = Binding(purpose="register of tokens and clients", vault=vault)
        self._lock = threading.Lock()
        self._content = self._read()

    @property
    def tokens(self) -> int:
        """How many tokens are kept, those that were used or have expired lately included."""
        return len(self._content.tokens)

    @property
    def clients(self) -> int:
        """How many client names are taken."""
        return len(self._content.clients)

    def add(self, secret: bytes, grant: Grant, now_ms: int, expires_ms: int) -> None:
        """Keeps a new token's hash, and forgets tokens that expired long ago.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        token = _Token(grant=grant, expires_ms=expires_ms)
        self._change(lambda content: (content.with_token(_digest(secret), token, now_ms), None))

    def redeem(self, secret: bytes, key_hash: bytes, client_id: str, now_ms: int) -> Redeemed:
        """Consumes a token for a key; the same key may ask again while the token lives.

        Args:
            secret: The token's.
            key_hash: SHA-256 of the newcomer's public key.
            client_id: The name a client asks for; empty if the token names it.
            now_ms: Unix milliseconds.

        Raises: DomainError TOKEN_REFUSED if it is unknown, expired or used for another key; CLIENT_EXISTS;
        INVALID_ARGUMENT if the name is malformed, missing, or another than the token's; STORE_UNAVAILABLE.
        """
        return self._change(lambda content: _redeem(content, _digest(secret), key_hash, client_id, now_ms))

    def revoke(self, identity: Identity, clock_ms: Callable[[], int]) -> Revocation:
        """Revokes what a client or a role was certified so far, and voids its tokens.

        A repeat finds the client's first revocation, until it has enrolled again. Of a role it is another one: not all
        that are certified anew pass by here.

        The clock is read while nobody else has the register: who was looked up before counts as issued before.

        Raises: DomainError CLIENT_UNKNOWN if no such client has enrolled; STORE_UNAVAILABLE.
        """
        return self._change(lambda content: _revoke(content, identity, clock_ms))

    def revoked_ms(self, identity: Identity) -> int:
        """The time up to which a holder's certificates are revoked, Unix milliseconds; 0 for none."""
        with self._lock:
            return self._content.revoked_ms(identity)

    def first_issue(self, identity: Identity, now_ms: int) -> int:
        """When a certificate of now is to count as issued, so that no revocation covers it, Unix milliseconds."""
        with self._lock:
            return self._content.first_issue(identity, now_ms)

    def revocations(self, after_ms: int, limit: int = PAGE) -> list[Revoked]:
        """Revocations later than `after_ms`, the oldest first, at most `limit`."""
        with self._lock:
            later = [entry for entry in self._content.revocations if entry.at_ms > after_ms][:limit]
        return [entry.listed() for entry in later]

    def restore(self, revocations: Iterable[Revocation]) -> None:
        """Enters revocations that were written down elsewhere and that this file does not hold (any more).

        They count as enrolled again, so that another revocation of the same client is another one.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        self._change(lambda content: (_restored(content, revocations), None))

    def _change(self, change: Callable[[_Content], tuple[_Content, _Result]]) -> _Result:
        """One change, alone, durable once it has returned; nothing happened if it raised."""
        with self._lock:
            content, result = change(self._content)
            if content is not self._content:
                self._write(content)
                self._content = content
            return result

    def _write(self, content: _Content) -> None:
        blob = self._sealer.seal(self._binding, content.model_dump_json().encode())
        try:
            files.replace(self._path, blob)
        except OSError as error:
            raise DomainError(
                Reason.STORE_UNAVAILABLE, f"the key authority's register failed: {error.strerror}"
            ) from error

    def _read(self) -> _Content:
        try:
            return _parsed(self._sealer.open(self._binding, self._path.read_bytes()))
        except FileNotFoundError:
            return _Content()
        except OSError as error:
            raise _unusable(f"{self._path} cannot be read: {error.strerror}") from error
        except DomainError as error:
            raise _unusable(
                f"{self._path} is {error.message}; it was left as it is. Restore it from a backup, or delete it, "
                "which voids all tokens and frees all client names"
            ) from None


def _redeem(
    content: _Content, digest: str, key_hash: bytes, client_id: str, now_ms: int
) -> tuple[_Content, Redeemed]:
    token = content.tokens.get(digest)
    if token is None or token.expires_ms <= now_ms or token.used_by not in {None, key_hash}:
        raise DomainError(
            Reason.TOKEN_REFUSED,
            "the token is unknown, has expired or was used: ask the operator for another (shelora token create)",
        )
    if token.used_by is not None:
        return content, _redeemed(content, Identity.from_uri(token.used_as), token.grant, now_ms)
    identity = _named(token.grant, client_id)
    if identity.role is Role.CLIENT:
        content = content.with_client(identity, replace=bool(token.grant.client_id))
    used = token.model_copy(update={"used_by": key_hash, "used_as": identity.uri})
    tokens = {**content.tokens, digest: used}
    revocations = tuple(
        entry.model_copy(update={"enrolled_again": True}) if entry.concerns(identity) else entry
        for entry in content.revocations
    )
    content = content.model_copy(update={"tokens": tokens, "revocations": revocations})
    return content, _redeemed(content, identity, token.grant, now_ms)


def _redeemed(content: _Content, identity: Identity, grant: Grant, now_ms: int) -> Redeemed:
    return Redeemed(identity, grant.names, content.first_issue(identity, now_ms), grant.promise)


def _revoke(
    content: _Content, identity: Identity, clock_ms: Callable[[], int]
) -> tuple[_Content, Revocation]:
    is_client = identity.role is Role.CLIENT
    if is_client and (identity.federation_id, identity.client_id) not in content.clients:
        raise DomainError(Reason.CLIENT_UNKNOWN, f"there is no {identity}: none of that name enrolled")
    content = content.without_tokens_of(identity)
    found = next((e for e in content.revocations if e.concerns(identity) and not e.enrolled_again), None)
    if is_client and found is not None:
        return content, found.listed().revocation
    newest = content.revocations[-1].at_ms if content.revocations else 0
    revocation = Revocation(identity, max(clock_ms(), newest + 1))
    return content.with_revocations([_Revoked.of(revocation, enrolled_again=False)]), revocation


def _restored(content: _Content, revocations: Iterable[Revocation]) -> _Content:
    known = {entry.at_ms for entry in content.revocations}
    missing = [_Revoked.of(r, enrolled_again=True) for r in revocations if r.at_ms not in known]
    return content.with_revocations(missing) if missing else content


def _named(grant: Grant, client_id: str) -> Identity:
    """Whom a token makes of a newcomer that asks for that name."""
    if grant.role is not Role.CLIENT:
        return Identity(grant.role)
    if grant.client_id and client_id not in {"", grant.client_id}:
        raise DomainError(Reason.INVALID_ARGUMENT, "client_id: the token is for a client of another name")
    if not grant.client_id and not client_id:
        raise DomainError(Reason.INVALID_ARGUMENT, "client_id: the token names no client, so give a name")
    return Identity(Role.CLIENT, grant.federation_id, grant.client_id or client_id)


def _name(holder: Identity | Grant | _Revoked) -> tuple[Role, str, str]:
    return holder.role, holder.federation_id, holder.client_id


def _parsed(content: bytes) -> _Content:
    """Raises: SealBrokenError if it is of a newer format."""
    try:
        return _Content.model_validate_json(content)
    except ValidationError:
        raise SealBrokenError("of a format which this version does not read") from None


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _unusable(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
