"""Files that no other user reads and that no crash leaves half written."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shelora.errors import DomainError, Reason

_OTHERS: Final = 0o077
"""Permission bits of group and world."""

_SECRET_LIMIT_BYTES: Final = 4096
"""More than any file with one secret in it holds."""


def private_folder(folder: Path) -> None:
    """Makes a folder of mode 0700, and its parents, if it is missing.

    Raises: DomainError CONFIGURATION_INVALID if it cannot be used or is open to other users, with the remedy.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"the key authority cannot use {folder}: {error.strerror}"
        ) from error
    if mode & _OTHERS:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"the folder is open to other users; run: chmod 700 {folder}"
        )


def read_secret(path: Path, what: str) -> str:
    """The content of a small file that no other user may read, without white space around it.

    Raises: DomainError CONFIGURATION_INVALID, naming `what` it was to hold, if it cannot be read or is open to others.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_SECRET_LIMIT_BYTES)
    except OSError as error:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"the {what} {path} cannot be read: {error.strerror}"
        ) from error
    if mode & _OTHERS:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"the {what} is open to other users; run: chmod 600 {path}"
        )
    return content.decode("ascii", errors="replace").strip()


def create(path: Path, content: bytes) -> bool:
    """Makes a file, whole or not at all and durably. Returns False, and changes nothing, if it exists.

    Raises: OSError.
    """
    with _draft(path, content) as draft:
        try:
            os.link(draft, path)  # unlike a rename, fails if another writer was first
        except FileExistsError:
            return False
        finally:
            draft.unlink()
    return True


def replace(path: Path, content: bytes) -> None:
    """Makes a file or takes the place of one: readers and crashes see the old content or the new, never a mixture.

    Raises: OSError.
    """
    with _draft(path, content) as draft:
        draft.replace(path)


def sync_folder(folder: Path) -> None:
    """Makes changes of names in `folder` survive a power cut. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_drafts(folder: Path) -> None:
    """Removes what a crash left half made, in subfolders too; only for who has the folder alone. Raises: OSError."""
    for draft in folder.rglob(".*.draft"):
        draft.unlink()


@contextmanager
def disk_failures_named() -> Iterator[None]:
    """Turns an OSError into STORE_UNAVAILABLE, except that of a missing file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DomainError(
            Reason.STORE_UNAVAILABLE, f"the key authority's disk failed: {error.strerror}"
        ) from error


@contextmanager
def _draft(path: Path, content: bytes) -> Iterator[Path]:
    """A synced file beside `path`, to be given its name inside. Syncs the folder; leaves no draft behind."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")
    try:
        _write_durably(draft, content)
        yield draft
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_durably(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
