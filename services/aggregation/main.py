"""The process `shelora-aggregation`: puts the service together and runs it."""

import secrets
from functools import partial
from typing import Annotated

import grpc
import typer

from services.aggregation.aggregations import Aggregations
from services.aggregation.servicer import SERVICE_NAME, AggregationServicer
from services.aggregation.settings import AggregationSettings
from services.aggregation.store import RedisShardStore, connect
from services.aggregation.uploads import Uploads
from services.aggregation.workers import WorkerPool
from services.shell import flags
from services.shell.process import run_process
from services.shell.server import serve
from shelora.transport.enrolment import keep_renewed, renewal_at
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import aggregation_pb2_grpc

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    listen: flags.Listen = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Redis that holds the shards. Give a password by the environment only.")
    ] = None,
    redis_connections: Annotated[int | None, typer.Option(help="Most connections to it.")] = None,
    redis_timeout_s: Annotated[float | None, typer.Option(help="Seconds a command may take.")] = None,
    identity: flags.IdentityFolder = None,
    key_authority_address: flags.KeyAuthorityAddress = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; the CPUs by default.")] = None,
    worker_threads: Annotated[int | None, typer.Option(help="Threads of linear algebra in each.")] = None,
    worker_queue: Annotated[int | None, typer.Option(help="Shards that may wait for a worker.")] = None,
    job_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds a worker may take for a shard.")
    ] = None,
    max_concurrent_uploads: Annotated[int | None, typer.Option(help="Uploads received at once.")] = None,
    max_concurrent_checks: Annotated[int | None, typer.Option(help="Shards checked at once.")] = None,
    upload_idle_s: Annotated[float | None, typer.Option(help="Seconds an upload may be quiet.")] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(help="Largest shard of a layout.")] = None,
    metrics_host: flags.MetricsHost = None,
    metrics_port: flags.MetricsPort = None,
    shutdown_grace_s: flags.ShutdownGrace = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
    ready_file: flags.ReadyFile = None,
) -> None:
    """Stores the shards of updates, aggregates them, serves results. Settings: SHELORA_AGGREGATION_* and flags."""
    given = dict(locals())  # every parameter is a field of the settings, of the same name
    run_process("aggregation", lambda: AggregationSettings.load(**given), run)


async def run(settings: AggregationSettings) -> None:
    """Serves until the process is told to stop."""
    folder = IdentityFolder(settings.identity)
    credentials = TlsCredentials(folder)
    store = connect(
        settings.redis_url.get_secret_value(),
        connections=settings.redis_connections,
        timeout_s=settings.redis_timeout_s,
    )
    pool = WorkerPool(settings.pool_limits, settings.worker_environment)
    await pool.start()
    servicer = build_servicer(settings, store, pool)

    def register(server: grpc.aio.Server) -> None:
        aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)

    await serve(
        settings,
        service_names=[SERVICE_NAME],
        register=register,
        background=[partial(keep_renewed, folder, renewal_at(settings.key_authority_address, credentials))],
        on_stop=[pool.close, store.close],
        credentials=credentials,
    )


def build_servicer(
    settings: AggregationSettings, store: RedisShardStore, pool: WorkerPool
) -> AggregationServicer:
    """The servicer over a store and a started pool."""
    uploads = Uploads(store, settings.upload_limits, lambda: secrets.token_hex(16))
    return AggregationServicer(store, uploads, Aggregations(store, pool), settings.max_shard_bytes)


if __name__ == "__main__":
    app()
