"""The process `shelora-aggregation`: puts the service together and runs it."""

import secrets
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer

from services.aggregation.aggregations import Aggregations
from services.aggregation.announcement import announced
from services.aggregation.downloads import Downloads
from services.aggregation.keys import PREFIX
from services.aggregation.servicer import SERVICE_NAME, AggregationServicer
from services.aggregation.settings import AggregationSettings
from services.aggregation.store import RedisShardStore, connect
from services.aggregation.uploads import Uploads
from services.aggregation.watermark import POLL_S as WATERMARK_POLL_S
from services.aggregation.watermark import Watermark
from services.aggregation.workers import WorkerPool
from services.common import flags
from services.common.fullness import watch_fullness
from services.common.membership import join
from services.common.process import run_process
from services.common.readiness import Readiness
from services.common.redis_watch import require_accepted, watch_redis
from services.common.revocations import Revocations, follow
from services.common.server import Service, serve
from shelora.terminal import CommandLine
from shelora.transport.channel import open_channel
from shelora.v1 import aggregation_pb2_grpc
from shelora.version import VersionOption

KEYS: Final = PREFIX.rstrip(":")

app = CommandLine(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    listen: flags.Listen = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Redis that holds the shards. Give a password by the environment only.")
    ] = None,
    redis_connections: Annotated[int | None, typer.Option(help="Most connections to it.")] = None,
    redis_timeout_s: Annotated[float | None, typer.Option(help="Seconds a command may take.")] = None,
    redis_password_file: Annotated[Path | None, typer.Option(help="File with its password.")] = None,
    identity: flags.IdentityFolder = None,
    key_authority_address: flags.KeyAuthorityAddress = None,
    revocation_poll_s: flags.RevocationPoll = None,
    workload_key_file: flags.WorkloadKeyFile = None,
    enrolment_address: flags.EnrolmentAddress = None,
    advertise: Annotated[
        str | None, typer.Option(help="Where callers reach this replica, host:port; port 0: as it listens.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; the CPUs by default.")] = None,
    worker_threads: Annotated[int | None, typer.Option(help="Threads of linear algebra in each.")] = None,
    worker_queue: Annotated[int | None, typer.Option(help="Shards that may wait for a worker.")] = None,
    job_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds a worker may take for a shard.")
    ] = None,
    max_concurrent_uploads: Annotated[int | None, typer.Option(help="Uploads received at once.")] = None,
    max_client_uploads: Annotated[int | None, typer.Option(help="Of these of one client.")] = None,
    max_federation_uploads: Annotated[
        int | None, typer.Option(help="Of these of one federation; 0 for three quarters.")
    ] = None,
    upload_least_bytes_per_s: Annotated[
        float | None, typer.Option(help="Average below which an upload loses its turn; 0 for any.")
    ] = None,
    max_concurrent_checks: Annotated[int | None, typer.Option(help="Shards checked at once.")] = None,
    max_concurrent_downloads: Annotated[int | None, typer.Option(help="Downloads at once.")] = None,
    upload_idle_s: Annotated[float | None, typer.Option(help="Seconds an upload may be quiet.")] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(help="Largest shard of a layout.")] = None,
    metrics_host: flags.MetricsHost = None,
    metrics_port: flags.MetricsPort = None,
    health_listen: flags.HealthListen = None,
    shutdown_grace_s: flags.ShutdownGrace = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
    calls_per_s: flags.CallsPerS = None,
    concurrent_calls: flags.ConcurrentCalls = None,
    upload_bytes_per_s: flags.UploadBytesPerS = None,
    ready_file: flags.ReadyFile = None,
    version: VersionOption = None,
) -> None:
    """Stores the shards of updates, aggregates them, serves results. Settings: SHELORA_AGGREGATION_* and flags."""
    given = dict(locals())  # every parameter is a field of the settings, of the same name
    run_process("aggregation", lambda: AggregationSettings.load(**given), run)


async def run(settings: AggregationSettings) -> None:
    """Serves until a signal stops the process."""
    store = connect(
        settings.redis,
        connections=settings.redis_connections,
        timeout_s=settings.redis_timeout_s,
    )
    await require_accepted(store.redis, KEYS)
    membership, readiness = await join(settings), Readiness()
    authority = open_channel(settings.key_authority_address, membership.credentials)
    revocations = Revocations()
    pool = WorkerPool(settings.pool_limits, settings.worker_environment)
    await pool.start()
    watermark = Watermark()
    servicer = build_servicer(settings, store, pool, watermark)

    def register(server: grpc.aio.Server) -> None:
        aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)

    await serve(
        settings,
        Service(
            names=[SERVICE_NAME],
            register=register,
            background=[
                partial(watch_redis, store.redis, KEYS, readiness),
                partial(watch_fullness, store, watermark.tell, WATERMARK_POLL_S),
                membership.keep_renewed,
                partial(
                    follow, revocations, authority, settings.revocation_poll_s, on_own=membership.void.set
                ),
            ],
            on_stop=[authority.close, pool.close, store.close],
            announcing=partial(announced, store, settings.advertise) if settings.advertise else None,
            readiness=readiness,
        ),
        credentials=membership.credentials,
        revocations=revocations,
    )


def build_servicer(
    settings: AggregationSettings,
    store: RedisShardStore,
    pool: WorkerPool,
    watermark: Watermark | None = None,
) -> AggregationServicer:
    """The servicer over a store and a started pool."""
    uploads = Uploads(store, settings.upload_limits, lambda: secrets.token_hex(16), watermark)
    downloads = Downloads(store, settings.max_concurrent_downloads)
    return AggregationServicer(store, uploads, downloads, Aggregations(store, pool), settings.max_shard_bytes)


if __name__ == "__main__":
    app()
