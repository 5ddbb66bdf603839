"""Folders and secrets that no other user reads; failures of the disk by their name."""

import os
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


@contextmanager
def failures_named() -> Iterator[None]:
    """Turns an OSError into STORE_UNAVAILABLE, except that of a missing file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DomainError(
            Reason.STORE_UNAVAILABLE,
            f"the key authority's disk failed: {error.strerror}; make room for its data_dir, or mend the disk",
        ) from error
