"""Settings of the aggregation service."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from services.aggregation.slots import SlotLimits
from services.aggregation.uploads import UploadLimits
from services.aggregation.workers import PoolLimits
from services.common.settings import MemberSettings, with_password
from shelora.transport.address import ListenAddress


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class AggregationSettings(MemberSettings):
    """What the aggregation service needs, from SHELORA_AGGREGATION_* and flags."""

    model_config = SettingsConfigDict(env_prefix="SHELORA_AGGREGATION_")

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis that holds rounds, shards and results; it may hold a password. Use `maxmemory-policy noeviction`."""

    redis_password_file: Path | None = None
    """File with the password of Redis, to keep it out of the URL."""

    redis_connections: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most connections to Redis of this replica; workers have one each besides."""

    redis_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Seconds after which a Redis command, or the wait for a connection, fails with STORE_UNAVAILABLE."""

    advertise: ListenAddress | Literal[""] = ""
    """Where the coordinator and the agents reach this very replica, `host:port`; port 0 stands for the one it listens
    on. They learn of it within seconds and leave it when it is gone. Empty: they keep to the addresses they were given,
    which suits replicas behind one load-balanced name. Its certificate must name the host."""

    workers: Annotated[int, Field(ge=1, le=1024)] = Field(default_factory=usable_cpus)
    """Worker processes. The default is the CPUs of the machine; set it where a container may use fewer."""

    worker_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads that linear algebra may use in each worker."""

    worker_queue: Annotated[int, Field(ge=1)] = 1024
    """Shards that may wait for a worker; beyond, AggregateShard fails with WORKER_FAILED, to be tried elsewhere."""

    job_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds a worker may take for one shard before it is killed and replaced."""

    max_concurrent_uploads: Annotated[int, Field(ge=1)] = 64
    """Uploads received at once, about 2 MiB each; others wait for their turn."""

    max_client_uploads: Annotated[int, Field(ge=1)] = 4
    """Uploads of one client received at once. An agent sends one shard after the other."""

    max_federation_uploads: Annotated[int, Field(ge=0)] = 0
    """Uploads of one federation received at once; 0 for three quarters of max_concurrent_uploads, which leaves room for
    another's."""

    upload_least_bytes_per_s: Annotated[float, Field(ge=0)] = 1024.0
    """Least bytes a second of an upload, on average; after 30 s below it loses its turn. What arrived stays and can be
    resumed. 0 for any number."""

    max_concurrent_checks: Annotated[int, Field(ge=1)] = Field(default_factory=usable_cpus)
    """Shards checked at once: each is whole in memory, up to max_shard_bytes, and keeps a thread busy."""

    max_concurrent_downloads: Annotated[int, Field(ge=1)] = 128
    """Downloads of results at once, about 1 MiB each; others wait for their turn."""

    upload_idle_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a piece after which an upload loses its turn; what arrived stays and can be resumed."""

    max_shard_bytes: Annotated[int, Field(ge=1, le=512 * 2**20)] = 256 * 2**20
    """Largest shard of a layout. Redis holds at most 512 MiB in one string."""

    @property
    def redis(self) -> str:
        """The URL, password included. Raises: as `with_password`."""
        return with_password(self.redis_url, self.redis_password_file)

    @property
    def upload_limits(self) -> UploadLimits:
        """What uploads may take."""
        most = self.max_concurrent_uploads
        slots = SlotLimits(
            most, self.max_client_uploads, self.max_federation_uploads or max(1, 3 * most // 4)
        )
        return UploadLimits(
            slots=slots,
            checks=self.max_concurrent_checks,
            idle_s=self.upload_idle_s,
            least_bytes_s=self.upload_least_bytes_per_s,
        )

    @property
    def pool_limits(self) -> PoolLimits:
        """What the workers may take."""
        return PoolLimits(
            workers=self.workers,
            threads=self.worker_threads,
            queue=self.worker_queue,
            job_timeout_s=self.job_timeout_s,
        )

    @property
    def worker_environment(self) -> dict[str, str]:
        """What a worker process finds in its environment (`worker`)."""
        return {
            "SHELORA_AGGREGATION_REDIS_URL": self.redis,
            "SHELORA_AGGREGATION_REDIS_TIMEOUT_S": str(self.redis_timeout_s),
            "SHELORA_AGGREGATION_LOG_LEVEL": self.log_level,
            "SHELORA_AGGREGATION_LOG_JSON": "true" if self.log_json else "false",
        }
