"""The process `shelora-coordinator`: puts the coordinator together and runs it."""

import secrets
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer

from coordinator.aggregation import AggregationPool
from coordinator.authority import KeyAuthorityClient
from coordinator.changes import Changes
from coordinator.driver import Driver, driver_on
from coordinator.handlers import Handlers, handlers_on
from coordinator.keys import Keys
from coordinator.metrics import tell_fullness
from coordinator.servicer import SERVICE_NAME, CoordinatorServicer, register
from coordinator.settings import CoordinatorSettings
from coordinator.store import redis_store
from services.common import flags
from services.common.fullness import watch_fullness
from services.common.membership import join
from services.common.process import run_process
from services.common.readiness import Readiness
from services.common.redis_client import RedisClient, connect
from services.common.redis_watch import require_accepted, watch_redis
from services.common.revocations import Revocations, follow
from services.common.server import Service, serve
from shelora.terminal import CommandLine
from shelora.transport.certificates import pem_to_der
from shelora.transport.channel import open_channel
from shelora.transport.replicas import Replicas
from shelora.version import VersionOption

FULLNESS_POLL_S: Final = 15.0
"""Seconds between two looks at Redis' memory: as often as Prometheus usually asks."""

KEYS: Final = Keys().prefix

app = CommandLine(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    listen: flags.Listen = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis that holds federations and rounds.")] = None,
    redis_password_file: Annotated[Path | None, typer.Option(help="File with its password.")] = None,
    aggregation_addresses: Annotated[
        list[str] | None, typer.Option(help="Aggregation replica, host:port; repeat for more.")
    ] = None,
    identity: flags.IdentityFolder = None,
    key_authority_address: flags.KeyAuthorityAddress = None,
    revocation_poll_s: flags.RevocationPoll = None,
    workload_key_file: flags.WorkloadKeyFile = None,
    enrolment_address: flags.EnrolmentAddress = None,
    lease_s: Annotated[float | None, typer.Option(help="Seconds until a dead replica is replaced.")] = None,
    tick_s: Annotated[float | None, typer.Option(help="Seconds between two looks at a federation.")] = None,
    alive_s: Annotated[
        float | None, typer.Option(help="Seconds of silence until a client is left out.")
    ] = None,
    max_federations: Annotated[int | None, typer.Option(help="Federations this cluster holds.")] = None,
    max_members: Annotated[int | None, typer.Option(help="Clients that may join one federation.")] = None,
    aggregate_concurrency: Annotated[int | None, typer.Option(help="Shards aggregated at once.")] = None,
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
    """Runs federations: members, rounds, plans. Settings: SHELORA_COORDINATOR_* and flags."""
    given: dict[str, Any] = {**locals(), "aggregation_addresses": aggregation_addresses or None}
    run_process("coordinator", lambda: CoordinatorSettings.load(**given), run)


async def run(settings: CoordinatorSettings) -> None:
    """Serves until a signal stops the process."""
    client = connect(settings.redis, settings.redis_connections, settings.redis_timeout_s)
    await require_accepted(client, KEYS)
    membership, readiness = await join(settings), Readiness()
    aggregation = Replicas(
        settings.aggregation_addresses,
        lambda address: open_channel(address, membership.credentials),
        refresh_s=settings.aggregation_refresh_s,
    )
    authority = open_channel(settings.key_authority_address, membership.credentials)
    changes, revocations = Changes(client), Revocations()
    root = pem_to_der(membership.credentials.held.authority)
    handlers, driver = compose(settings, client, changes, revocations, aggregation, authority, root)
    servicer = CoordinatorServicer(handlers)
    await serve(
        settings,
        Service(
            names=[SERVICE_NAME],
            register=lambda server: register(servicer, server),
            background=[
                changes.run,
                driver.run,
                partial(watch_redis, client, KEYS, readiness),
                partial(watch_fullness, client, tell_fullness, FULLNESS_POLL_S),
                aggregation.keep_fresh,
                membership.keep_renewed,
                partial(
                    follow,
                    revocations,
                    authority,
                    settings.revocation_poll_s,
                    changes.wake_all,
                    membership.void.set,
                ),
            ],
            on_drain=[changes.close],
            on_stop=[aggregation.close, authority.close, client.aclose],
            readiness=readiness,
        ),
        credentials=membership.credentials,
        revocations=revocations,
    )


def compose(
    settings: CoordinatorSettings,
    client: RedisClient,
    changes: Changes,
    revocations: Revocations,
    aggregation: Replicas,
    authority: grpc.aio.Channel,
    root: bytes,
) -> tuple[Handlers, Driver]:
    """The use cases and the driver over the same store.

    Args: root: certificate of the authority in DER, whose clients' statements are believed.
    """
    sighting = timedelta(seconds=settings.sighting_s)
    store = redis_store(client, now_ms, settings.retention, sighting, settings.redis_timeout_s)
    pool = AggregationPool(
        aggregation, retry_s=settings.retry_s, aggregate_timeout_s=settings.aggregate_timeout_s
    )
    handlers = handlers_on(
        store,
        changes,
        aggregation=pool,
        clock_ms=now_ms,
        new_instance=lambda: secrets.token_hex(4),
        watch_poll_s=settings.watch_poll_s,
        limits=settings.limits,
        liveness=settings.liveness,
        root=root,
    )
    driver = driver_on(
        store,
        changes,
        aggregation=pool,
        authority=KeyAuthorityClient(authority, retry_s=settings.retry_s),
        revoked=revocations.clients_of,
        clock_ms=now_ms,
        new_token=lambda: secrets.token_hex(16),
        policy=settings.policy,
    )
    return handlers, driver


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    app()
