"""The key authority's data folder as a whole: one process, one sealing key, one vault, one audit log.

lock            held by the process that uses the folder
vault.sealed    fixes which sealing key belongs to the folder; holds the vault's identity
audit.log       every opening of an epoch, every release, every refusal
epochs/         one sealed file an epoch
authority/      the certificate authority's root, sealed
register.sealed tokens and enrolled clients
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from services.key_authority import disk
from services.key_authority.audit import AuditLog
from services.key_authority.audit_file import start_log, succeed_log
from services.key_authority.ca import Root, RootFile
from services.key_authority.register import Register
from services.key_authority.sealer import (
    Binding,
    SealBrokenError,
    Sealer,
    SealingKey,
    WrongSealingKeyError,
    key_id_of,
)
from services.key_authority.vault import Vault
from shelora import files
from shelora.audit import LOG_NAME
from shelora.errors import DomainError, Reason

_IDENTITY_NAME: Final = "vault.sealed"
_REGISTER_NAME: Final = "register.sealed"
_EPOCHS_NAME: Final = "epochs"
_IDENTITY_BYTES: Final = 16
_IDENTITY_BINDING: Final = Binding(purpose="vault identity")
_log = structlog.get_logger(__name__)
_HEAD_BYTES: Final = 64
"""Enough of a sealed file to see its key."""


@dataclass(frozen=True, kw_only=True)
class Custody:
    """An open data folder."""

    identity: str
    """Names the vault: 32 hexadecimal digits, public, kept for its whole life."""

    vault: Vault
    root: RootFile
    register: Register
    audit: AuditLog


@contextmanager
def open_custody(folder: Path, key: SealingKey) -> Iterator[Custody]:
    """Opens a data folder for as long as the context lasts; the first start makes what is in it.

    Raises: DomainError CONFIGURATION_INVALID, with the remedy, if the folder cannot be used, is in use or open to other
    users, if `key` is not the key it is sealed under, or if something in it is missing or damaged.
    """
    disk.private_folder(folder)
    with _locked(folder):
        sealer = Sealer(key)
        if not (folder / _IDENTITY_NAME).exists():
            _first_start(folder, sealer)
        identity = _identity(folder, sealer)
        _require_one_key(folder, sealer)
        vault, register = Vault(folder / _EPOCHS_NAME, sealer, identity), _register(folder, sealer, identity)
        with AuditLog(folder / LOG_NAME, identity) as audit:
            yield Custody(
                identity=identity,
                vault=vault,
                root=_root_file(folder, sealer, identity),
                register=register,
                audit=audit,
            )


def read_vault(folder: Path, key: SealingKey) -> Vault:
    """The vault of a data folder that another process may be using. Raises: as `open_custody`."""
    sealer, identity = _opened(folder, key)
    return Vault(folder / _EPOCHS_NAME, sealer, identity)


def read_root(folder: Path, key: SealingKey) -> Root | None:
    """The certificate authority's root in such a folder, None if there is none yet. Raises: as `open_custody`."""
    return _root_file(folder, *_opened(folder, key)).load()


def read_register(folder: Path, key: SealingKey) -> Register:
    """The register of such a folder, as it is now; not to be changed. Raises: as `open_custody`."""
    return _register(folder, *_opened(folder, key))


def reseal(folder: Path, old: SealingKey, new: SealingKey) -> int:
    """Seals every file of a data folder under another key. May be interrupted and repeated.

    Returns: How many files were sealed anew by this call.

    Raises: DomainError CONFIGURATION_INVALID as `open_custody`; SECRET_UNAVAILABLE, naming the file, if one opens with
    neither key; STORE_UNAVAILABLE if the disk fails. Files that are done stay done.
    """
    before, after, last = Sealer(old), Sealer(new), folder / _IDENTITY_NAME
    with _locked(folder):
        finished = _key_id(last) == after.key_id
        identity = _identity(folder, after if finished else before)
        count = sum(_resealed(path, before, after) for path in _sealed_files(folder) if path != last)
        if count or not finished:
            with AuditLog(folder / LOG_NAME, identity) as audit:
                audit.resealed(after.key_id)
        return count + _resealed(last, before, after)


def replace_audit_log(folder: Path, key: SealingKey) -> Path:
    """Sets aside an audit log that does not hold, so that the authority can start. Returns where it lies now.

    Raises: DomainError CONFIGURATION_INVALID as `open_custody`, or if the log holds.
    """
    with _locked(folder):
        identity, log = _identity(folder, Sealer(key)), folder / LOG_NAME
        if _holds(log, identity):
            raise _refused(f"the audit log {log} holds; there is no reason to replace it")
        with disk.failures_named():
            if not log.exists():
                log.touch(mode=0o600)  # lost: what follows it then says so, by the hash of nothing
            return succeed_log(log, identity)


def _opened(folder: Path, key: SealingKey) -> tuple[Sealer, str]:
    """The sealer and the identity of a folder that was started."""
    sealer = Sealer(key)
    identity = _identity(folder, sealer)
    _require_one_key(folder, sealer)
    return sealer, identity


def _root_file(folder: Path, sealer: Sealer, identity: str) -> RootFile:
    return RootFile(folder / "authority", sealer, identity, lambda: _sign_of_use(folder))


def _sign_of_use(folder: Path) -> Path | None:
    """A file that is made only after the root: the register, or an epoch's, retired ones too."""
    later = [folder / _REGISTER_NAME, *sorted((folder / _EPOCHS_NAME).glob("*.*"))]
    return next((path for path in later if path.exists()), None)


def _register(folder: Path, sealer: Sealer, identity: str) -> Register:
    return Register(folder / _REGISTER_NAME, sealer, identity)


def _first_start(folder: Path, sealer: Sealer) -> None:
    """Makes an identity, the log, and last the file that says that the folder is in use.

    Whatever a crash in between leaves is made anew by the next start.
    """
    if _sealed_files(folder) or _has_records(folder / LOG_NAME):
        raise _refused(
            f"{folder} is in use, but its {_IDENTITY_NAME} is missing; restore that file from a backup of this folder"
        )
    identity = secrets.token_bytes(_IDENTITY_BYTES)
    with disk.failures_named():
        start_log(folder / LOG_NAME, identity.hex())
        files.create(folder / _IDENTITY_NAME, sealer.seal(_IDENTITY_BINDING, identity))


def _identity(folder: Path, sealer: Sealer) -> str:
    path = folder / _IDENTITY_NAME
    try:
        return sealer.open(_IDENTITY_BINDING, path.read_bytes()).hex()
    except WrongSealingKeyError as error:
        raise _refused(
            f"wrong sealing key: {folder} is {error.message}. Give the right key; if a change of keys was "
            "interrupted, repeat it: shelora-key-authority reseal"
        ) from None
    except SealBrokenError as error:
        raise _refused(f"{path} is {error.message}; restore that file from a backup of this folder") from None
    except OSError as error:
        raise _refused(f"{path} cannot be read: {error.strerror}") from error


def _require_one_key(folder: Path, sealer: Sealer) -> None:
    """Refuses a folder in which files are sealed under different keys, before anybody misses one of them.

    A change of keys begins with the root. An epoch's file that alone names another key is damaged, or of another
    backup: it takes its federation only, as any other damage of it.
    """
    foreign = [path for path in _sealed_files(folder) if _key_id(path) not in {None, sealer.key_id}]
    epochs = [path for path in foreign if path.parent.name == _EPOCHS_NAME]
    for path in epochs:
        _log.error("epoch_of_another_key", file=str(path))
    if len(foreign) > len(epochs):
        raise _refused(
            f"{len(foreign)} files, among them {foreign[0]}, are sealed under another key: a change of keys was "
            "interrupted, or a backup of another time was mixed in. Repeat: shelora-key-authority reseal"
        )


def _key_id(path: Path) -> bytes | None:
    """The key of a sealed file; None if it is missing or damaged, which is said when it is needed."""
    try:
        with path.open("rb") as file:
            return key_id_of(file.read(_HEAD_BYTES))
    except (SealBrokenError, FileNotFoundError):
        return None


def _resealed(path: Path, old: Sealer, new: Sealer) -> bool:
    """Seals one file under the new key, atomically. False if it is already."""
    try:
        with disk.failures_named():
            blob = path.read_bytes()
            if key_id_of(blob) == new.key_id:
                new.resealed(blob, new)  # proves that it opens
                return False
            files.replace(path, old.resealed(blob, new))
            return True
    except (WrongSealingKeyError, SealBrokenError) as error:
        raise DomainError(
            error.reason, f"{path} is {error.message}; restore it from a backup, then repeat"
        ) from None


def _sealed_files(folder: Path) -> list[Path]:
    """Every sealed file in the folder, drafts left out."""
    return sorted(path for path in folder.rglob("*.sealed") if path.is_file())


def _has_records(log: Path) -> bool:
    """Whether more was written down than that the log was started."""
    return log.exists() and log.read_bytes().count(b"\n") > 1


def _holds(log: Path, identity: str) -> bool:
    try:
        with AuditLog(log, identity):
            return True
    except DomainError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder. The lock ends with the process, however it ends."""
    descriptor = _open_lock(folder)
    try:
        _lock(descriptor, folder)
        files.remove_drafts(folder)
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int:
    try:
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refused(f"the key authority cannot use {folder}: {error.strerror}") from error


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refused(f"another process uses {folder}; stop that key authority first") from None


def _refused(message: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, message)
