"""Settings of the key authority."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, Strict
from pydantic_settings import SettingsConfigDict

from services.shell.settings import ServerSettings
from shelora.errors import DomainError
from shelora.transport.identity import Role, checked_names


def _server_names(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return checked_names(Role.KEY_AUTHORITY, names)
    except DomainError as error:
        raise ValueError(error.message) from error


class KeyAuthoritySettings(ServerSettings):
    """From `SHELORA_KEY_AUTHORITY_*`, overridden by flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_KEY_AUTHORITY_")

    data_dir: Path
    """Folder of the vault and of the certificate authority, made if missing. Back it up: an epoch whose keys are lost
    cannot be decrypted, and without the authority's key everyone must enrol again."""

    enrolment_listen: str = "127.0.0.1:0"
    """Address to exchange tokens for certificates on, `host:port`. The one port that asks for no certificate."""

    names: Annotated[tuple[str, ...], AfterValidator(_server_names), Strict(strict=False)] = (
        "localhost",
        "127.0.0.1",
        "::1",
    )
    """DNS names and addresses that others reach the key authority at; a JSON list in the environment."""

    certificate_lifetime_s: Annotated[int, Field(ge=2, le=30 * 86_400)] = 86_400
    """Seconds that a certificate is valid. Its holder renews it after two thirds."""

    operator_token_file: Path | None = None
    """File to leave a join token for an operator in, mode 0600, anew at every start. This is how the first operator
    enrols; without it, only operators make operators."""

    allow_insecure_parameters: bool = False
    """Accept CKKS profiles below 128-bit security. For tests only."""
