"""Settings of the key authority."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, Strict, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.settings import ServerSettings
from services.key_authority.disk import read_secret
from services.key_authority.enrolment import Workload
from services.key_authority.sealer import SealingKey
from shelora.errors import DomainError, Reason
from shelora.transport.address import ListenAddress
from shelora.transport.identity import Role, checked_names
from shelora.transport.workload import WorkloadKey


def _server_names(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return checked_names(Role.KEY_AUTHORITY, names)
    except DomainError as error:
        raise ValueError(error.message) from error


class WorkloadSettings(BaseModel):
    """Servers of one kind that enrol by themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    role: Literal[Role.COORDINATOR, Role.AGGREGATION]
    key_file: Path
    """File with their workload key. No other user may read it."""
    names: tuple[str, ...]
    """DNS names and addresses that they are reached at."""

    @model_validator(mode="after")
    def _names_checked(self) -> Self:
        _server_names(self.names)
        return self

    def read(self) -> Workload:
        """With the key. Raises: DomainError CONFIGURATION_INVALID."""
        key = WorkloadKey.from_hex(read_secret(self.key_file, "workload key"))
        return Workload(key, self.role, checked_names(self.role, self.names))


class KeyAuthoritySettings(ServerSettings):
    """From `SHELORA_KEY_AUTHORITY_*`, overridden by flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_KEY_AUTHORITY_")

    data_dir: Path
    """Folder of the vault and of the certificate authority, made if missing. Back it up: an epoch whose keys are lost
    cannot be decrypted, and without the authority's key everyone must enrol again."""

    sealing_key_file: Path | None = None
    """File outside `data_dir` with the key that seals it, in hexadecimal. No other user may read it."""

    sealing_key: SecretStr | None = None
    """The key itself, 64 hexadecimal digits, in place of the file. From the environment only."""

    enrolment_listen: ListenAddress = "127.0.0.1:0"
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

    workloads: Annotated[tuple[WorkloadSettings, ...], Strict(strict=False)] = ()
    """Servers that enrol by themselves, with a key they share with the authority; a JSON list in the environment, of
    `{"role": "aggregation", "key_file": "/path", "names": ["aggregation.example.org"]}`."""

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
