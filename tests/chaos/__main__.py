"""`make chaos`: disturbs a federation of real processes, then checks what must hold; exit code 1 if it does not."""

import asyncio
import json
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from coordinator.main import now_ms
from coordinator.store import redis_store
from services.common.redis_client import connect
from shelora.cli.cluster import LocalCluster
from shelora.federation import FederationSpec
from shelora.strategies.registry import DEFAULT
from tests.chaos import invariants
from tests.chaos.auditor import RoundAudit, certified, rounds_of
from tests.chaos.drill import Drill, Tale
from tests.chaos.invariants import Finding
from tests.chaos.nursery import ForkingCluster, Nursery
from tests.chaos.relay import TcpRelay
from tests.chaos.timeline import incidents
from tests.e2e.agents import Agent, save_tiny_bert, specification

FOLDER = Path("runs/chaos")
ROUND_S = 12
"""Seconds of disturbance for each round that the federation is given."""
PATIENCE_S = 240
"""Seconds that an undisturbed federation may take to its end."""
SLOWNESS_S = 0.02
"""Delay of every 4 KiB to and from aggregation, always, so that incidents meet transfers in the middle."""
COORDINATOR = {"LEASE_S": "5", "TICK_S": "0.5", "ALIVE_S": "15", "RETRY_S": "20", "REDIS_TIMEOUT_S": "10"}
AGGREGATION = {"REDIS_TIMEOUT_S": "10"}

console = Console(highlight=False)


def main(
    seconds: Annotated[int, typer.Option(help="How long to disturb the federation.")] = 120,
    seed: Annotated[int, typer.Option(help="What happens when; 0 draws one.")] = 0,
    agents: Annotated[int, typer.Option(help="Agents, 3 to 8.")] = 4,
    mode: Annotated[str, typer.Option(help="Protection: complete, selective or none.")] = DEFAULT,
) -> None:
    """Kills, stops and cuts off the processes of a running federation, and checks that nothing is lost or doubled."""
    seed = seed or time.time_ns() % 1_000_000
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tale = Tale(console.print)
    console.print(
        f"chaos for {seconds} s in mode {mode}, seed {seed}: processes, logs and summary in {FOLDER}"
    )
    found = run(seconds, seed, agents, mode, tale)
    _show(found)
    summary = {
        "seed": seed,
        "seconds": seconds,
        "agents": agents,
        "mode": mode,
        "timeline": tale.lines,
        "findings": [{**asdict(finding), "holds": finding.holds} for finding in found],
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1))
    sys.exit(0 if all(finding.holds for finding in found) else 1)


def run(seconds: int, seed: int, agents: int, mode: str, tale: Tale) -> list[Finding]:
    """The drill, and what was found after it."""
    folder = FOLDER.absolute()
    model = save_tiny_bert(folder / "model")
    spec = _specification(mode, agents, rounds=max(2, seconds // ROUND_S))
    with (
        TcpRelay() as relay,
        Nursery() as nursery,
        ForkingCluster(
            nursery,
            folder / "cluster",
            coordinators=2,
            aggregation_replicas=2,
            workers=1,
            announce=True,
            settings={"coordinator": COORDINATOR, "aggregation": AGGREGATION},
            relay=relay,
        ) as cluster,
    ):
        drill = Drill(cluster, relay, spec, folder, model, tale)
        found = asyncio.run(_drilled(drill, cluster, seconds, seed, agents, tale))
    return [*found, invariants.no_orphans(drill.groups)]


async def _drilled(
    drill: Drill, cluster: LocalCluster, seconds: int, seed: int, agents: int, tale: Tale
) -> list[Finding]:
    drill.slow_down(SLOWNESS_S)
    await drill.begin([_agent(number) for number in range(agents)])
    beside = [asyncio.create_task(drill.copying()), asyncio.create_task(drill.supervising())]
    until = time.monotonic() + seconds
    for incident in incidents(seed, drill.targets):
        await asyncio.sleep(incident.pause_s)
        if time.monotonic() > until or not drill.agents_left():
            break
        await drill.strike(incident)
    tale.tell("calm")
    await drill.calm()
    hangs = await _hangs(drill)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    drill.copies.take()
    return await _findings(drill, cluster, hangs, tale)


async def _hangs(drill: Drill) -> list[str]:
    """Waits for the end. Returns who did not come to it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while not (await drill.is_over() and not drill.agents_left()):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.5)
    over = await drill.is_over()
    return [
        *([] if over else [f"the federation did not end within {PATIENCE_S} s"]),
        *(f"{name} did not leave" for name in drill.agents_left()),
    ]


async def _findings(drill: Drill, cluster: LocalCluster, hangs: list[str], tale: Tale) -> list[Finding]:
    federation = await drill.federation()
    assert federation is not None, "the coordinator does not answer, with nothing disturbed"
    async with connect(cluster.addresses.redis_url) as client:
        store = redis_store(client, now_ms, timedelta(days=30))
        record = (await store.federations.read(federation.federation_id)).record
        rounds: list[RoundAudit] = await rounds_of(store, record)
    aggregation = drill.logs("aggregation")
    return [
        invariants.the_federation_ended(federation, hangs),
        invariants.rounds_are_in_order(rounds, federation),
        invariants.abandoned_rounds_say_why(rounds),
        invariants.every_commit_counts_once(rounds),
        invariants.one_set_a_draw(rounds, {name: certified(state) for name, state in drill.states.items()}),
        invariants.no_sum_of_too_few(rounds),
        invariants.spent_rounds_train_anew(rounds, drill.logs()),
        await asyncio.to_thread(invariants.results_are_the_sums, rounds, drill.copies),
        invariants.nothing_is_trained_twice(drill.logs()),
        invariants.nothing_that_arrived_is_sent_again(drill.logs(), aggregation.values()),
        invariants.nobody_left_by_itself(tale.exits),
        invariants.nothing_broke_unseen(
            {**drill.logs(), **aggregation, **drill.logs("coordinator", "key-authority")}.values()
        ),
        invariants.keys_expire(cluster.addresses.redis_url),
    ]


def _specification(mode: str, agents: int, rounds: int) -> FederationSpec:
    spec = specification(
        mode, rounds=rounds, clients=agents, min_updates=2, deadline_s=40, committee_s=8, max_attempts=50
    ).model_dump()
    spec["training"] |= {"local_steps": 30, "batch_size": 8, "evaluation_examples": 8}
    return FederationSpec.model_validate(spec)


def _agent(number: int) -> Agent:
    suffix = (".jsonl", ".csv", ".parquet")[number % 3]
    return Agent(
        f"agent-{number}", rank=2 + 2 * (number % 2), alpha=4, budget=(1.0, 0.5)[number % 2], suffix=suffix
    )


def _show(found: list[Finding]) -> None:
    table = Table("invariant", "", "seen", title_justify="left")
    for finding in found:
        table.add_row(finding.invariant, "ok" if finding.holds else "[red]FAILED[/red]", finding.seen)
    console.print(table)
    for finding in found:
        for violation in finding.violations:
            console.print(f"[red]{finding.invariant}[/red]: {violation}", markup=True)


if __name__ == "__main__":
    typer.run(main)
