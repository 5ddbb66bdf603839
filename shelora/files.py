"""Files that no other user reads and that no crash leaves half written, and files that may be anything."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shelora.errors import DomainError, Reason


class UnreadableError(Exception):
    """Says in words why a file cannot be read."""


def read_small(path: Path, most_bytes: int) -> bytes:
    """The content of a file that is no longer than that; of a longer one, or an endless one, no more is read.

    Raises: UnreadableError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except ValueError as error:
        raise UnreadableError("no file can have this name") from error
    if len(content) > most_bytes:
        raise UnreadableError(f"it has more than {most_bytes:,} bytes: is it the right file?")
    return content


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


def sync_tree(folder: Path) -> None:
    """Makes everything in `folder` survive a power cut, and readable to its owner alone. Raises: OSError."""
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o700)
            sync_folder(path)
        else:
            path.chmod(0o600)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def remove_drafts(folder: Path) -> None:
    """Removes what a crash left half made, in subfolders too; only for who has the folder alone. Raises: OSError."""
    for draft in folder.rglob(".*.draft"):
        draft.unlink()


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Raises: DomainError DISK_UNAVAILABLE, with the remedy, for an OSError inside: a full disk, a read-only one."""
    try:
        yield
    except OSError as error:
        raise unavailable(folder, error.strerror or str(error)) from error


def unavailable(folder: Path, why: str) -> DomainError:
    """DISK_UNAVAILABLE, with the remedy."""
    return DomainError(
        Reason.DISK_UNAVAILABLE, f"{folder} cannot be written: {why}; make room there, or mend the disk"
    )


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
