"""Settings of a server process: from its environment, overridden by its flags."""

from math import ceil
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from services.common.rates import RateLimits
from services.common.redis_url import parts_of
from services.common.revocations import POLL_S
from shelora.configuration import read_secret, remedy
from shelora.errors import DomainError, Reason
from shelora.transport.address import Address, ListenAddress, ProbeAddress

BURST_S: Final = 10
"""Seconds of its rates that a client may use up at once."""


class ServerSettings(BaseSettings):
    """What every server needs. A service derives from it, with its own `env_prefix` and fields."""

    model_config = SettingsConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix="SHELORA_",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    listen: ListenAddress = "127.0.0.1:0"
    """Address to serve gRPC on, `host:port`. Port 0 picks a free one, see `ready_file`."""

    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; `0.0.0.0` where the scraper is on another machine."""

    metrics_port: Annotated[int, Field(ge=-1, le=65535)] = 0
    """Port to serve Prometheus metrics on. 0 picks a free one, -1 serves none."""

    health_listen: ProbeAddress | None = None
    """Address to answer gRPC health checks on without TLS, `host:port` or `unix:/path`, for probes that show no
    certificate, as a kubelet's. It says whether the server serves, and nothing else."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""

    log_json: bool = False
    """Log one JSON object a line, for machines, in place of text for people."""

    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """Seconds that calls in progress may take to finish after SIGTERM; Kubernetes sends SIGKILL after 30."""

    calls_per_s: Annotated[float, Field(ge=0)] = 100.0
    """Calls a second that one client may make in the long run, 0 for any number; ten seconds' worth may come at once.
    An agent makes one in five seconds, and two a shard while it sends or fetches."""

    concurrent_calls: Annotated[int, Field(ge=0)] = 32
    """Calls of one client in progress, streams included, 0 for any number. An agent has three."""

    upload_bytes_per_s: Annotated[float, Field(ge=0)] = 128.0 * 2**20
    """Bytes a second that one client may send in the long run, 0 for any number: a gigabit line. Ten seconds' worth may
    come at once; then it is read no faster."""

    ready_file: Path | None = None
    """File that says, while serving, where: `{"address": "host:port", "metrics_port": n, "pid": n}`.
    metrics_port is -1 if no metrics are served."""

    @property
    def rate_limits(self) -> RateLimits:
        """What one client may ask."""
        return RateLimits(
            calls_s=self.calls_per_s,
            calls_burst=ceil(BURST_S * self.calls_per_s),
            concurrent=self.concurrent_calls,
            bytes_s=self.upload_bytes_per_s,
            bytes_burst=ceil(BURST_S * self.upload_bytes_per_s),
        )

    @classmethod
    def load(cls, **flags: Any) -> Self:  # noqa: ANN401 - the fields' own types check the values
        """Settings from the environment; a flag that is not None wins.

        Raises: DomainError CONFIGURATION_INVALID, naming each wrong field and its variable, never its value.
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise DomainError(Reason.CONFIGURATION_INVALID, cls._explained(error)) from None
        except SettingsError as error:  # names the field, not its value
            named = str(error).partition('"')[2].partition('"')[0]
            variable = (cls.model_config.get("env_prefix", "") + named).upper()
            raise DomainError(
                Reason.CONFIGURATION_INVALID, f"{named} (environment variable {variable}): write JSON"
            ) from None

    @classmethod
    def _explained(cls, error: ValidationError) -> str:
        prefix = cls.model_config.get("env_prefix", "")
        lines = [
            f"{name} (environment variable {(prefix + name).upper()}): {remedy(problem)}"
            for problem in error.errors(include_input=False, include_url=False)
            for name in [".".join(map(str, problem["loc"]))]
        ]
        return "; ".join(lines)


def with_password(url: SecretStr, file: Path | None) -> str:
    """A Redis URL with the password that a file holds, if one is given.

    Raises: DomainError CONFIGURATION_INVALID if the file cannot be read, or the URL cannot, or has a password already.
    """
    plain = url.get_secret_value()
    if file is None:
        return plain
    parts = parts_of(plain)
    if parts.password is not None:
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            "redis_url has a password already: leave it out, or redis_password_file",
        )
    password = read_secret(file, "redis_password_file:").rstrip("\r\n")
    address = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{address}").geturl()


class MemberSettings(ServerSettings):
    """What every server needs that the key authority certifies."""

    identity: Path
    """Folder of this process's key and certificate; `shelora enroll` fills it."""

    key_authority_address: Address
    """The key authority, `host:port`; it renews the certificate and says which ones are revoked."""

    revocation_poll_s: Annotated[float, Field(ge=0.05, le=60)] = POLL_S
    """Seconds between two questions for revoked certificates: how long a revoked client may still call this server."""

    workload_key_file: Path | None = None
    """File with a key that servers of this kind share with the key authority, 64 hexadecimal digits. With it the server
    enrols by itself, at start and instead of renewing; `identity` is where it keeps what it gets."""

    enrolment_address: Address | None = None
    """Where the key authority enrols, `host:port`; needed with `workload_key_file`."""

    @property
    def workload(self) -> tuple[Path, str] | None:
        """File of the workload's key and address to enrol at; None for a server that was enrolled by hand.

        Raises: DomainError CONFIGURATION_INVALID if one is given without the other.
        """
        if self.workload_key_file is None and self.enrolment_address is None:
            return None
        if self.workload_key_file is None or self.enrolment_address is None:
            raise DomainError(
                Reason.CONFIGURATION_INVALID,
                "give workload_key_file and enrolment_address together, or neither and enrol with `shelora enroll`",
            )
        return self.workload_key_file, self.enrolment_address
