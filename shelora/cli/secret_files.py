"""The secrets of a cluster in containers: made once, then kept, each in the folder of those who need it.

    key-authority/  sealing.key, coordinator.key, aggregation.key
    coordinator/    workload.key, redis.password
    aggregation/    workload.key, redis.password
    redis/          users.acl, which holds hashes
    grafana/        admin.password

Every folder is meant to be mounted alone. The first three are for one user (mode 0600); Redis and Grafana run as users
of their own, so anyone that their folder is mounted for can read their files.
"""

import hashlib
import secrets
from pathlib import Path
from typing import Final

from shelora import files
from shelora.errors import DomainError, Reason

SECRET_BYTES: Final = 32
WORKLOADS: Final = ("coordinator", "aggregation")
"""Servers that enrol with a workload key and use Redis, each as the user of its name."""

_CHANNELS: Final = {"coordinator": "&shelora:coordinator:*:changes", "aggregation": ""}
"""What each may subscribe to: a pattern must be allowed letter for letter."""

_COMMANDS: Final = {"coordinator": "+info +bgrewriteaof", "aggregation": "+info"}
"""What each may say beyond the ordinary: how full Redis is, for metrics and to refuse uploads in time; the
coordinator has what was deleted leave the append-only file once a federation is over."""


def make_secrets(folder: Path) -> list[Path]:
    """Makes what is missing. Returns the files that were made; a secret that exists is never changed.

    Raises: DomainError CONFIGURATION_INVALID if a file cannot be written.
    """
    try:
        return [*_made(folder)]
    except OSError as error:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"{error.filename} cannot be written: {error.strerror}"
        ) from error


def _made(folder: Path) -> list[Path]:
    authority = folder / "key-authority"
    made = [path for path in (authority / "sealing.key", *_members(folder)) if _make(path)]
    for name in WORKLOADS:
        _derive(authority / f"{name}.key", (folder / name / "workload.key").read_text())
    _derive(
        folder / "redis" / "users.acl", _users({name: _password(folder, name) for name in WORKLOADS}), 0o644
    )
    if _make(password := folder / "grafana" / "admin.password", 0o644):
        made.append(password)
    return made


def _members(folder: Path) -> list[Path]:
    return [folder / name / file for name in WORKLOADS for file in ("workload.key", "redis.password")]


def _password(folder: Path, name: str) -> str:
    return (folder / name / "redis.password").read_text().strip()


def _users(passwords: dict[str, str]) -> str:
    """Users of Redis: each server reaches its own keys, and nothing that administers; `probe` may say PING."""
    return "".join(
        [
            "user default off\n",
            "user probe on nopass resetkeys resetchannels -@all +ping\n",
            *(
                f"user {name} on #{hashlib.sha256(password.encode()).hexdigest()} ~shelora:{name}:* "
                f"resetchannels {_CHANNELS[name]} +@all -@admin -@dangerous {_COMMANDS[name]}\n"
                for name, password in passwords.items()
            ),
        ]
    )


def _make(path: Path, mode: int = 0o600) -> bool:
    """A file of 32 random bytes in hexadecimal; False if it exists."""
    if path.exists():
        return False
    _write(path, secrets.token_hex(SECRET_BYTES), mode)
    return True


def _derive(path: Path, content: str, mode: int = 0o600) -> None:
    """A file that follows from another, renewed if it does not."""
    if not path.exists() or path.read_text().strip() != content.strip():
        _write(path, content, mode)


def _write(path: Path, content: str, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.replace(path, content.strip().encode() + b"\n")
    path.chmod(mode)
