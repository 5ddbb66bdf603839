"""Keys of epochs on disk, sealed. Written once, never rewritten, lost by no restart; deleted when an epoch retires."""

import re
import secrets
from pathlib import Path
from typing import Final

from services.key_authority import disk
from services.key_authority.epochs import (
    OBFUSCATION_SECRET_BYTES,
    EpochId,
    EpochKeys,
    from_bytes,
    to_bytes,
)
from services.key_authority.sealer import Binding, Sealer
from shelora import files
from shelora.ckks.parameters import CkksParameters
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.obfuscation import epoch_secret_id

_FILE_NAME: Final = re.compile(
    r"(?P<federation_id>[a-z0-9-]+)\.(?P<epoch>[1-9][0-9]*)\.(?P<state>sealed|retired)"
)


class Vault:
    """A folder with one sealed file an epoch, or an empty one if it is retired. Threads and processes may share it.

    Args:
        folder: Made with mode 0700 if it is missing.
        sealer: Seals every file.
        identity: Names the vault; a file of another vault does not open.

    Raises: DomainError CONFIGURATION_INVALID if the folder cannot be used or is open to other users.
    """

    def __init__(self, folder: Path, sealer: Sealer, identity: str) -> None:
        disk.private_folder(folder)
        self._folder = folder
        self._sealer = sealer
        self._identity = identity

    def open_epoch(self, epoch_id: EpochId, parameters: CkksParameters | None) -> EpochKeys:
        """The keys of an epoch, made now if there are none. Idempotent; of concurrent calls one makes them.

        Args: parameters: of the CKKS key; None for an epoch without one.

        Earlier epochs stay as they are: who has not moved on yet can still be given their keys.

        Raises: DomainError INVALID_ARGUMENT if the epoch has keys of another profile, EPOCH_RETIRED,
        SECRET_UNAVAILABLE if its file does not open, STORE_UNAVAILABLE if the disk fails.
        """
        found = self._find(epoch_id)
        if found is None:
            self._create(epoch_id, _generate(parameters))
            found = self.read(
                epoch_id
            )  # of several writers the first won, so this may not be what was made here
        if any(
            retired.federation_id == epoch_id.federation_id and retired.epoch >= epoch_id.epoch
            for retired in self._named("retired")
        ):  # while its keys were made, which a busy machine can draw out
            with disk.failures_named():
                self._path(epoch_id).unlink(missing_ok=True)
            raise _over(epoch_id)
        if found.parameters != (parameters.name if parameters else ""):
            made = f"with the CKKS profile {found.parameters}" if found.parameters else "without a CKKS key"
            raise DomainError(Reason.INVALID_ARGUMENT, f"{epoch_id} was opened {made}")
        return found

    def read(self, epoch_id: EpochId) -> EpochKeys:
        """The keys of an epoch.

        Raises: DomainError FEDERATION_UNKNOWN if it was not opened, EPOCH_RETIRED, SECRET_UNAVAILABLE if its file does
        not open, STORE_UNAVAILABLE if the disk fails.
        """
        found = self._find(epoch_id)
        if found is None:
            raise DomainError(Reason.FEDERATION_UNKNOWN, f"{epoch_id} was not opened")
        return found

    def epochs(self) -> list[EpochId]:
        """All epochs that have keys, by federation and number. Raises: DomainError STORE_UNAVAILABLE."""
        return self._named("sealed")

    def retire(self, before: EpochId) -> list[EpochId]:
        """Deletes the keys of all epochs of a federation before one, for good. May be interrupted and repeated.

        The mark comes first: whatever a crash leaves, retired keys are not given out any more. The last of them has
        one even without keys: who is still making keys of any of them sees it, and deletes what it made.

        Returns: All retired epochs of the federation.

        Raises: DomainError STORE_UNAVAILABLE.
        """
        if before.epoch > 1:
            with disk.failures_named():
                files.create(self._path(EpochId(before.federation_id, before.epoch - 1), "retired"), b"")
        for epoch_id in self.epochs():
            if epoch_id.federation_id == before.federation_id and epoch_id.epoch < before.epoch:
                with disk.failures_named():
                    files.create(self._path(epoch_id, "retired"), b"")
                    self._path(epoch_id).unlink(missing_ok=True)
                    files.sync_folder(self._folder)
        return [found for found in self._named("retired") if found.federation_id == before.federation_id]

    def _named(self, state: str) -> list[EpochId]:
        with disk.failures_named():
            found = [_FILE_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        ids = [EpochId(m["federation_id"], int(m["epoch"])) for m in found if m and m["state"] == state]
        return sorted(ids, key=lambda epoch_id: (epoch_id.federation_id, epoch_id.epoch))

    def _find(self, epoch_id: EpochId) -> EpochKeys | None:
        if self._path(epoch_id, "retired").exists():
            raise _over(epoch_id)
        try:
            with disk.failures_named():
                blob = self._path(epoch_id).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return from_bytes(self._sealer.open(self._binding(epoch_id), blob))
        except DomainError as error:
            raise _unreadable(epoch_id, error) from None

    def _create(self, epoch_id: EpochId, made: EpochKeys) -> None:
        blob = self._sealer.seal(self._binding(epoch_id), to_bytes(made))
        with disk.failures_named():
            files.create(self._path(epoch_id), blob)

    def _binding(self, epoch_id: EpochId) -> Binding:
        return Binding(
            purpose="epoch secrets",
            vault=self._identity,
            federation_id=epoch_id.federation_id,
            epoch=epoch_id.epoch,
        )

    def _path(self, epoch_id: EpochId, state: str = "sealed") -> Path:
        return self._folder / f"{epoch_id.federation_id}.{epoch_id.epoch}.{state}"


def _generate(parameters: CkksParameters | None) -> EpochKeys:
    obfuscation_secret = secrets.token_bytes(OBFUSCATION_SECRET_BYTES)
    if parameters is None:
        return EpochKeys(
            parameters="",
            key_id=epoch_secret_id(obfuscation_secret),
            ckks_secret_key=b"",
            obfuscation_secret=obfuscation_secret,
        )
    key = SecretKey.generate(parameters)
    return EpochKeys(
        parameters=parameters.name,
        key_id=key.key_id,
        ckks_secret_key=key.to_bytes(),
        obfuscation_secret=obfuscation_secret,
    )


def _over(epoch_id: EpochId) -> DomainError:
    return DomainError(Reason.EPOCH_RETIRED, f"{epoch_id} is over, and its keys are destroyed")


def _unreadable(epoch_id: EpochId, error: DomainError) -> DomainError:
    return DomainError(
        error.reason,
        f"the stored keys of {epoch_id} cannot be read and were left as they are ({error.message}); "
        "restore their file from a backup, or open a new epoch",
    )
