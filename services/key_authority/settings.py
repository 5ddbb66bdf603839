"""Settings of the key authority."""

from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from services.key_authority.sealer import SealingKey
from services.shell.settings import ServerSettings
from shelora.errors import DomainError, Reason


class KeyAuthoritySettings(ServerSettings):
    """From `SHELORA_KEY_AUTHORITY_*`, overridden by flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_KEY_AUTHORITY_")

    data_dir: Path
    """Folder of the vault, made if missing. Back it up: an epoch whose keys are lost cannot be decrypted."""

    sealing_key_file: Path | None = None
    """File outside `data_dir` with the key that seals it, in hexadecimal. No other user may read it."""

    sealing_key: SecretStr | None = None
    """The key itself, 64 hexadecimal digits, in place of the file. From the environment only."""

    agent_credential_file: Path
    """File with the credential of agents in hexadecimal. No other user may read it."""

    allow_insecure_parameters: bool = False
    """Accept CKKS profiles below 128-bit security. For tests only."""

    def read_sealing_key(self) -> SealingKey:
        """The sealing key from its file or from the environment.

        Raises: DomainError CONFIGURATION_INVALID if none is given, or both, or it cannot be used; with the remedy.
        """
        if self.sealing_key_file is not None and self.sealing_key is None:
            return sealing_key_beside(self.data_dir, self.sealing_key_file)
        if self.sealing_key is not None and self.sealing_key_file is None:
            return SealingKey.from_hex(self.sealing_key.get_secret_value())
        problem = "no sealing key is given" if self.sealing_key is None else "two sealing keys are given"
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            f"{problem}: make one with `shelora-key-authority make-sealing-key PATH` and give it either as "
            "--sealing-key-file PATH (environment variable SHELORA_KEY_AUTHORITY_SEALING_KEY_FILE) or, in hexadecimal, "
            "as SHELORA_KEY_AUTHORITY_SEALING_KEY",
        )


def sealing_key_beside(data_dir: Path, path: Path) -> SealingKey:
    """The sealing key in a file, which must not lie in the folder it seals.

    Raises: DomainError CONFIGURATION_INVALID.
    """
    if path.resolve().is_relative_to(data_dir.resolve()):
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            f"the sealing key {path} lies in the folder it seals, so that every copy of the folder would hold both; "
            "move it elsewhere",
        )
    return SealingKey.from_file(path)
