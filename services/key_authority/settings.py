"""Settings of the key authority."""

from pathlib import Path

from pydantic_settings import SettingsConfigDict

from services.shell.settings import ServerSettings


class KeyAuthoritySettings(ServerSettings):
    """From `SHELORA_KEY_AUTHORITY_*`, overridden by flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_KEY_AUTHORITY_")

    data_dir: Path
    """Folder of the vault, made if missing. Back it up: an epoch whose keys are lost cannot be decrypted."""

    agent_credential_file: Path
    """File with the credential of agents in hexadecimal. No other user may read it."""

    allow_insecure_parameters: bool = False
    """Accept CKKS profiles below 128-bit security. For tests only."""
