"""Settings of a server process: from its environment, overridden by its flags."""

from math import ceil
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.shell.rates import RateLimits
from shelora.errors import DomainError, Reason

BURST_S: Final = 10
"""Seconds of its rates that a client may use up at once."""


class ServerSettings(BaseSettings):
    """What every server needs. A service derives from it, with its own `env_prefix` and fields."""

    model_config = SettingsConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        env_prefix="SHELORA_",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    listen: str = "127.0.0.1:0"
    """Address to serve gRPC on, `host:port`. Port 0 picks a free one, see `ready_file`."""

    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; `0.0.0.0` where the scraper is on another machine."""

    metrics_port: Annotated[int, Field(ge=-1, le=65535)] = 0
    """Port to serve Prometheus metrics on. 0 picks a free one, -1 serves none."""

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

    @classmethod
    def _explained(cls, error: ValidationError) -> str:
        prefix = cls.model_config.get("env_prefix", "")
        lines = [
            f"{name} (environment variable {(prefix + name).upper()}): {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
            for name in [".".join(map(str, problem["loc"]))]
        ]
        return "; ".join(lines)


class MemberSettings(ServerSettings):
    """What every server needs that the key authority certifies."""

    identity: Path
    """Folder of this process's key and certificate; `shelora enroll` fills it."""

    key_authority_address: str
    """The key authority, `host:port`; it renews the certificate."""
