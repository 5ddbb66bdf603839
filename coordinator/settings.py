"""Settings of the coordinator."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, Strict, model_validator
from pydantic_settings import SettingsConfigDict

from coordinator.driver.policy import DriverPolicy
from coordinator.handlers.limits import Limits
from coordinator.liveness import Liveness
from services.common.settings import MemberSettings, with_password
from shelora.transport.address import Address


class CoordinatorSettings(MemberSettings):
    """From `SHELORA_COORDINATOR_*`, overridden by flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_COORDINATOR_")

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis that holds federations and rounds; it may hold a password. Use `maxmemory-policy noeviction`."""

    redis_password_file: Path | None = None
    """File with the password of Redis, to keep it out of the URL."""

    redis_connections: Annotated[int, Field(ge=4, le=4096)] = 64
    """Most connections to Redis of this replica."""

    redis_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Seconds after which a Redis command, or the wait for a connection, fails with STORE_UNAVAILABLE."""

    aggregation_addresses: Annotated[tuple[Address, ...], Field(min_length=1), Strict(strict=False)]
    """Aggregation replicas, `host:port` each; a JSON list in the environment. One load-balanced name will do, and
    so will one of several replicas that announce themselves."""

    aggregation_refresh_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Seconds between two looks for replicas that have announced themselves or are gone."""

    retention_days: Annotated[int, Field(ge=8, le=365)] = 30
    """Days that a federation's state is kept after its last change; more than the longest deadline, a week."""

    sighting_s: Annotated[int, Field(ge=60, le=7 * 86_400)] = 3600
    """Seconds that a client's last heartbeat is shown."""

    max_federations: Annotated[int, Field(ge=1)] = 1000
    """Federations that this cluster holds, ended ones included until their state expires."""

    max_members: Annotated[int, Field(ge=2, le=100_000)] = 20_000
    """Clients that may join one federation."""

    alive_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds after its last heartbeat or call during which a client is taken into new rounds; heartbeats come six
    times as often."""

    heartbeats_per_s: Annotated[float, Field(gt=0, le=10_000)] = 50.0
    """Most heartbeats a second of one federation. Members of a larger one send them less often, and count as gone
    later, in proportion: with 1 000 members every 20 s, and after 120 s."""

    lease_s: Annotated[float, Field(ge=1, le=600)] = 15.0
    """Seconds after which another replica takes over the federations of one that died."""

    tick_s: Annotated[float, Field(ge=0.05, le=60)] = 2.0
    """Seconds between two looks at a federation in which nothing was announced to change."""

    watch_poll_s: Annotated[float, Field(ge=0.1, le=600)] = 5.0
    """Seconds between two looks for a watching agent to which nothing was announced."""

    aggregate_concurrency: Annotated[int, Field(ge=1, le=1024)] = 4
    """Shards of a round aggregated at once: about the workers of all aggregation replicas."""

    aggregate_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds that one attempt at a shard may take."""

    retry_s: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """Seconds during which a call to aggregation is tried again before the round is looked at anew."""

    result_ttl_days: Annotated[int, Field(ge=1, le=29)] = 7
    """Days that aggregation keeps a result that nothing replaced, beyond the deadlines of the next round's attempts."""

    @model_validator(mode="after")
    def _sightings_last(self) -> Self:
        patience_s = self.liveness.patience_s(self.max_members)
        if patience_s > self.sighting_s:
            raise ValueError(
                f"a silent client of a federation of max_members counts as alive for {patience_s:.0f} s, but what was "
                f"heard of it is kept for sighting_s = {self.sighting_s} s: raise sighting_s or heartbeats_per_s"
            )
        return self

    @property
    def redis(self) -> str:
        """The URL, password included. Raises: as `with_password`."""
        return with_password(self.redis_url, self.redis_password_file)

    @property
    def retention(self) -> timedelta:
        """As a duration."""
        return timedelta(days=self.retention_days)

    @property
    def limits(self) -> Limits:
        """How much it takes on."""
        return Limits(
            max_federations=self.max_federations,
            max_members=self.max_members,
            result_life_s=self.result_ttl_days * 86_400,
        )

    @property
    def liveness(self) -> Liveness:
        """How often members beat."""
        return Liveness(self.alive_s, self.heartbeats_per_s)

    @property
    def policy(self) -> DriverPolicy:
        """How the driver behaves."""
        return DriverPolicy(
            liveness=self.liveness,
            tick_s=self.tick_s,
            lease_s=self.lease_s,
            concurrency=self.aggregate_concurrency,
            result_ttl_s=self.result_ttl_days * 86_400,
        )
