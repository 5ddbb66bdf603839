"""The process `shelora-aggregation`: puts the service together and runs it."""

import secrets
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from services.aggregation.aggregations import Aggregations
from services.aggregation.servicer import SERVICE_NAME, AggregationServicer
from services.aggregation.settings import AggregationSettings
from services.aggregation.store import RedisShardStore, connect
from services.aggregation.uploads import Uploads
from services.aggregation.workers import WorkerPool
from services.shell.process import run_process
from services.shell.server import serve
from shelora.v1 import aggregation_pb2_grpc

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    listen: Annotated[str | None, typer.Option(help="Address to serve gRPC on, host:port.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis that holds the shards.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    worker_threads: Annotated[int | None, typer.Option(help="Threads of linear algebra in each.")] = None,
    job_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds a worker may take for a shard.")
    ] = None,
    max_concurrent_uploads: Annotated[int | None, typer.Option(help="Uploads received at once.")] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(help="Largest shard of a layout.")] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address to serve metrics on.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of metrics; -1 for none.")] = None,
    shutdown_grace_s: Annotated[float | None, typer.Option(help="Seconds calls may take to end.")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json/--log-text", help="Log JSON lines.")] = None,
    allow_plaintext: Annotated[
        bool | None,
        typer.Option("--allow-plaintext/--no-allow-plaintext", help="Serve other machines in plaintext."),
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="File that says, while serving, where.")] = None,
) -> None:
    """Stores the shards of updates, aggregates them, serves results. Settings: SHELORA_AGGREGATION_* and flags."""
    flags: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    run_process("aggregation", lambda: AggregationSettings.load(**flags), run)


async def run(settings: AggregationSettings) -> None:
    """Serves until the process is told to stop."""
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

    await serve(settings, service_names=[SERVICE_NAME], register=register, on_stop=[pool.close, store.close])


def build_servicer(
    settings: AggregationSettings, store: RedisShardStore, pool: WorkerPool
) -> AggregationServicer:
    """The servicer over a store and a started pool."""
    uploads = Uploads(store, settings.upload_limits, lambda: secrets.token_hex(16))
    return AggregationServicer(store, uploads, Aggregations(store, pool), settings.max_shard_bytes)


if __name__ == "__main__":
    app()
