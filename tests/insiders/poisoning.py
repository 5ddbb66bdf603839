"""By how much one hostile member of four moves the model: the demo's federation, once for each attack.

    python -m tests.insiders.poisoning                    # two runs without an attack, and every attack, minutes each
    python -m tests.insiders.poisoning honest claim+flip
    python -m tests.insiders.poisoning complete honest boost
    python -m tests.insiders.poisoning complete hostile=thin-uplink absent boost

Selective mode, or complete. The hostile member is newsroom-1, which has the most examples, or the one named. Prints
the accuracy that the honest members measure after every round that counts, how often the hostile one was left out,
how many results were taken back, and who sits out. Ten rounds take three minutes on two cores. Needs the demo's model
and data, which it fetches once.
"""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from examples.measured import with_own_figures
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.cohort import (
    AGENTS,
    AgentProfile,
    Protection,
    agent_config,
    federation_spec,
    write_data,
)
from shelora.cli.cluster import LocalCluster
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import spoiled_rounds, training_rounds

NAMED = "hostile="
ATTACKS = (
    "flip",
    "claim+flip",
    "boost",
    "claim+boost",
    "head",
    "claim+head+reverse",
    "claim+within",
    "claim+quiet",
)
FOLDER = Path("runs/poisoning")
HONEST, ABSENT = "honest", "absent"
"""All four are honest; the one that attacks elsewhere does not take part. Whose update is left out costs no less than
its absence, so an attack that is stopped is to be held against that."""
LAST_WORDS_S = 60
"""After its end for agents to measure the last result; who refuses it measures nothing."""
INITIAL_SEED = 7
"""Under complete: rows start alike, so they differ by what the attack does. Selective keeps its start secret."""
ROUNDS = 10
RECIPE = {
    "learning_rate": 0.005,
    "learning_rate_schedule": "linear",
    "learning_rate_decay": 1.0,
    "max_tokens": 32,
}
"""Whatever the demo's is: rows of different days compare. On shorter texts runs stay at 82 % or get to 89 by chance."""
TEST_EXAMPLES = 300
"""An agent's; the order of the test data is random."""


def small(spec: FederationSpec, rounds: int, clients: int) -> FederationSpec:
    """The demo's federation with fewer test texts."""
    recipe = {**RECIPE, "evaluation_examples": TEST_EXAMPLES}
    training = spec.training.model_copy(update=recipe)
    round_ = spec.round.model_copy(update={"rounds": rounds, "clients": clients, "deadline_s": 900})
    return spec.model_copy(update={"training": training, "round": round_})


def flip(path: Path, labels: Sequence[str]) -> None:
    """Gives every example the label after its own."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = labels[(labels.index(row["label"]) + 1) % len(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(attack: str, hostile: str, spec: FederationSpec, model: Path, data: Path) -> pb.Federation:
    """Runs the federation with one member that attacks; how it ended."""
    home = FOLDER / f"{spec.protection.mode}-{attack}-{hostile}"
    shutil.rmtree(home, ignore_errors=True)
    write_data(data, home / "agents")
    for agent in AGENTS:
        test = home / "agents" / agent.name / "test.jsonl"
        test.write_text("".join(test.read_text().splitlines(keepends=True)[:TEST_EXAMPLES]))
    if "flip" in attack:
        flip(home / "agents" / hostile / "train.jsonl", spec.training.labels)
    with LocalCluster(home / "cluster", fixed_ports=False, workers=1) as cluster:
        for agent in _taking_part(attack, hostile):
            folder = home / "agents" / agent.name
            asyncio.run(cluster.enrol_client(spec.name, agent.name, folder / "state"))
            config = folder / "agent.yaml"
            content = agent_config(cluster.addresses, agent, model, Protection(spec.protection.mode))
            config.write_text(yaml.safe_dump(content, sort_keys=False))
            attacks = agent.name == hostile and attack != HONEST
            module = "tests.insiders.hostile_agent" if attacks else "client_agent.main"
            cluster.spawn(
                agent.name, module, [*([attack] if attacks else []), "run", "--config", str(config)], {}
            )
        federation = asyncio.run(_followed(cluster, spec, hostile))
    return with_own_figures(
        federation, {agent.name: home / "agents" / agent.name / "state" for agent in AGENTS}
    )


def _taking_part(attack: str, hostile: str) -> list[AgentProfile]:
    return [agent for agent in AGENTS if attack != ABSENT or agent.name != hostile]


async def _followed(cluster: LocalCluster, spec: FederationSpec, hostile: str) -> pb.Federation:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        federation = await connection.start(spec.name)
        deadline = time.monotonic() + 3600
        while time.monotonic() < deadline:
            federation = await connection.get(spec.name)
            rounds = training_rounds(federation)
            if federation.phase in {pb.PHASE_FINISHED, pb.PHASE_FAILED}:
                if not rounds or len(_reports(rounds[-1], hostile)) == len(AGENTS) - 1:
                    break
                deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
            await asyncio.sleep(2)
        return federation


def _reports(summary: pb.RoundSummary, hostile: str) -> list[pb.EvaluationReport]:
    """Of the honest members."""
    return [report for report in summary.evaluations if report.client_id != hostile]


def _measured(summary: pb.RoundSummary, hostile: str) -> list[pb.EvaluationReport]:
    """What the honest members measured, once it was read in their folders."""
    return [report for report in _reports(summary, hostile) if report.example_count]


def accuracy(summary: pb.RoundSummary, hostile: str) -> float:
    """Of the honest members, after a round."""
    reports = _measured(summary, hostile)
    return sum(r.correct_count for r in reports) / max(1, sum(r.example_count for r in reports))


def main(arguments: Sequence[str], rounds: int = ROUNDS) -> None:
    modes = [mode for mode in (Protection.SELECTIVE, Protection.COMPLETE) if mode in arguments]
    hostile = next((a.removeprefix(NAMED) for a in arguments if a.startswith(NAMED)), AGENTS[0].name)
    attacks = [a for a in arguments if a not in modes and not a.startswith(NAMED)]
    assets = FOLDER / "assets"
    model, data = fetch(MINILM, assets), fetch(REUTERS, assets)
    for attack in attacks or (HONEST, ABSENT, *ATTACKS):
        protection = modes[0] if modes else Protection.SELECTIVE
        seed = INITIAL_SEED if protection is Protection.COMPLETE else 0
        spec = small(federation_spec(protection, seed), rounds, len(_taking_part(attack, hostile)))
        federation = run(attack, hostile, spec, model, data)
        found = training_rounds(federation)
        shown = " ".join(f"{accuracy(summary, hostile):6.1%}" for summary in found)
        dropped = [sum(d.client_id == hostile for d in summary.dropped) for summary in found]
        ends = f"left out in {sum(dropped)} of {len(found)} rounds"
        taken_back = len(spoiled_rounds(federation))
        sits_out = f"{taken_back} results taken back, {federation.sits_out or 'nobody'} sits out"
        refused = len(AGENTS) - 1 - len(_measured(found[-1], hostile)) if found else 0
        ends += f"; {refused} refuse the last result" if refused else ""
        failure = f"; failed: {federation.failure}" if federation.failure else ""
        print(f"{protection} {attack:20} {shown}   {ends}; {sits_out}{failure}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
