"""Keys of epochs on disk. Written once, never rewritten, lost by no restart.

The folder is closed to other users; contents are not encrypted, so whoever reads the disk or a backup has the keys.
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from services.key_authority.epochs import (
    OBFUSCATION_SECRET_BYTES,
    EpochId,
    EpochSecrets,
    from_file,
    to_file,
)
from shelora.ckks.parameters import CkksParameters
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason

_OTHERS: Final = 0o077
"""Permission bits of group and world."""

_ABANDONED_AFTER_S: Final = 3600.0
"""Age at which a draft is surely not being written any more: writing one takes milliseconds."""


class Vault:
    """A folder with one file an epoch. Threads and processes may share the folder.

    Args:
        folder: Made with mode 0700 if it is missing.

    Raises: DomainError CONFIGURATION_INVALID if the folder cannot be used or is open to other users.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = folder.stat().st_mode
            _remove_abandoned_drafts(folder)
        except OSError as error:
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"the vault cannot use {folder}: {error.strerror}"
            ) from error
        if mode & _OTHERS:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                f"the vault's folder is open to other users; run: chmod 700 {folder}",
            )

    def open_epoch(self, epoch_id: EpochId, parameters: CkksParameters) -> EpochSecrets:
        """The keys of an epoch, made now if there are none. Idempotent; of concurrent calls one makes them.

        Raises: DomainError INVALID_ARGUMENT if the epoch has keys of another profile, SECRET_UNAVAILABLE if its file
        is damaged, STORE_UNAVAILABLE if the disk fails.
        """
        found = self._find(epoch_id)
        if found is None:
            self._create(epoch_id, to_file(epoch_id, _generate(parameters)))
            found = self.read(
                epoch_id
            )  # of several writers the first won, so this may not be what was made here
        if found.parameters != parameters.name:
            raise DomainError(
                Reason.INVALID_ARGUMENT, f"{epoch_id} was opened with the CKKS profile {found.parameters}"
            )
        return found

    def read(self, epoch_id: EpochId) -> EpochSecrets:
        """The keys of an epoch.

        Raises: DomainError FEDERATION_UNKNOWN if it was not opened, SECRET_UNAVAILABLE if its file is damaged,
        STORE_UNAVAILABLE if the disk fails.
        """
        found = self._find(epoch_id)
        if found is None:
            raise DomainError(Reason.FEDERATION_UNKNOWN, f"{epoch_id} was not opened")
        return found

    def _find(self, epoch_id: EpochId) -> EpochSecrets | None:
        try:
            with _disk_failures_named():
                content = self._path(epoch_id).read_bytes()
        except FileNotFoundError:
            return None
        return from_file(epoch_id, content)

    def _create(self, epoch_id: EpochId, content: bytes) -> None:
        """Makes the epoch's file, whole or not at all and durably; leaves one that exists."""
        path = self._path(epoch_id)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")
        with _disk_failures_named():
            try:
                _write_durably(draft, content)
                with suppress(FileExistsError):
                    os.link(draft, path)  # unlike a rename, fails if another writer was first
            finally:
                draft.unlink(missing_ok=True)
            _sync_folder(self._folder)

    def _path(self, epoch_id: EpochId) -> Path:
        return self._folder / f"{epoch_id.federation_id}.{epoch_id.epoch}.keys"


def _generate(parameters: CkksParameters) -> EpochSecrets:
    key = SecretKey.generate(parameters)
    return EpochSecrets(
        parameters=parameters.name,
        key_id=key.key_id,
        ckks_secret_key=key.to_bytes(),
        obfuscation_secret=secrets.token_bytes(OBFUSCATION_SECRET_BYTES),
    )


def _write_durably(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a new name in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned_drafts(folder: Path) -> None:
    """Removes keys that a crash left half made; nobody was given them."""
    for draft in folder.glob(".*.draft"):
        with suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > _ABANDONED_AFTER_S:
                draft.unlink()


@contextmanager
def _disk_failures_named() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DomainError(
            Reason.STORE_UNAVAILABLE, f"the key authority's disk failed: {error.strerror}"
        ) from error
