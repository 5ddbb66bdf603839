"""Tokens and enrolled clients, in one SQLite file: a token is consumed in the same transaction that takes the name.

Tokens are stored as their SHA-256: whoever reads the file cannot enrol with it.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role

BUSY_TIMEOUT_S: Final = 10.0
_KEPT_MS: Final = 24 * 3600 * 1000
"""How long an expired token is remembered, so that a repeat is answered as before."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS tokens (
    hash BLOB PRIMARY KEY,
    role TEXT NOT NULL,
    federation_id TEXT NOT NULL,
    client_id TEXT NOT NULL,
    names TEXT NOT NULL,
    expires_ms INTEGER NOT NULL,
    used_by BLOB,
    used_as TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS clients (
    federation_id TEXT NOT NULL,
    client_id TEXT NOT NULL,
    PRIMARY KEY (federation_id, client_id)
) STRICT;
"""


@dataclass(frozen=True)
class Grant:
    """What a token allows, once."""

    role: Role
    federation_id: str = ""
    client_id: str = ""
    """Empty: a client names itself."""
    names: tuple[str, ...] = ()
    """Names and addresses of a server."""


class Register:
    """The file. Threads and processes may share it; it is made with mode 0600.

    Raises: DomainError CONFIGURATION_INVALID if it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with self._transaction() as database:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement)
        except (OSError, DomainError) as error:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"the register of tokens cannot use {path}: {error}"
            ) from error

    def add(self, secret: bytes, grant: Grant, now_ms: int, expires_ms: int) -> None:
        """Keeps a new token's hash, and forgets tokens that expired long ago."""
        row = (_hash(secret), grant.role, grant.federation_id, grant.client_id, json.dumps(grant.names))
        with self._transaction() as database:
            database.execute("DELETE FROM tokens WHERE expires_ms < ?", (now_ms - _KEPT_MS,))
            database.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)", (*row, expires_ms))

    def redeem(
        self, secret: bytes, key_hash: bytes, client_id: str, now_ms: int
    ) -> tuple[Identity, tuple[str, ...]]:
        """Consumes a token for a key; the same key may ask again while the token lives.

        Args:
            secret: The token's.
            key_hash: SHA-256 of the newcomer's public key.
            client_id: The name a client asks for; empty if the token names it.
            now_ms: Unix milliseconds.

        Returns: Whom to certify, and its names.

        Raises: DomainError TOKEN_REFUSED if it is unknown, expired or used for another key; CLIENT_EXISTS;
        INVALID_ARGUMENT if the name is malformed, missing, or another than the token's.
        """
        with self._transaction() as database:
            row = database.execute("SELECT * FROM tokens WHERE hash = ?", (_hash(secret),)).fetchone()
            if row is None or row["expires_ms"] <= now_ms or row["used_by"] not in {None, key_hash}:
                raise DomainError(
                    Reason.TOKEN_REFUSED,
                    "the token is unknown, has expired or was used: ask the operator for another "
                    "(shelora token create)",
                )
            names = tuple(json.loads(row["names"]))
            if row["used_by"] is not None:
                return Identity.from_uri(row["used_as"]), names
            identity = _named(row, client_id)
            _take_name(database, identity, replace=bool(row["client_id"]))
            database.execute(
                "UPDATE tokens SET used_by = ?, used_as = ? WHERE hash = ?",
                (key_hash, identity.uri, row["hash"]),
            )
            return identity, names

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone, durable once it has returned; nothing happened if it raised."""
        try:
            with closing(
                sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            ) as database:
                database.row_factory = sqlite3.Row
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")  # closing without it rolls back
        except sqlite3.Error as error:
            raise DomainError(
                Reason.STORE_UNAVAILABLE, f"the key authority's register failed: {error}"
            ) from error


def _named(row: sqlite3.Row, client_id: str) -> Identity:
    """Whom a token makes of a newcomer that asks for that name."""
    role, fixed = Role(row["role"]), str(row["client_id"])
    if role is not Role.CLIENT:
        return Identity(role)
    if fixed and client_id not in {"", fixed}:
        raise DomainError(Reason.INVALID_ARGUMENT, "client_id: the token is for a client of another name")
    if not fixed and not client_id:
        raise DomainError(Reason.INVALID_ARGUMENT, "client_id: the token names no client, so give a name")
    return Identity(role, row["federation_id"], fixed or client_id)


def _take_name(database: sqlite3.Connection, identity: Identity, *, replace: bool) -> None:
    """Enters a client. A name is taken anew only by the operator's will: otherwise a token would make impostors."""
    if identity.role is not Role.CLIENT:
        return
    name = (identity.federation_id, identity.client_id)
    taken = database.execute("INSERT OR IGNORE INTO clients VALUES (?, ?)", name).rowcount == 0
    if taken and not replace:
        raise DomainError(
            Reason.CLIENT_EXISTS,
            "the federation has a client of this name: choose another, or ask for a token for it",
        )


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
