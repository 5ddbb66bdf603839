"""Training code of users' own on real processes: a script around a Trainer, a loop of a module, and an agent."""

from pathlib import Path
from statistics import fmean

import pytest
import yaml

from client_agent.measured import Measured
from shelora.cli.cluster import LocalCluster
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import figures_by_round, training_rounds
from tests.e2e import federations
from tests.e2e.agents import Agent, configure, enrol, specification, start_agent

SCRIPT = Agent("script", rank=2, alpha=2, budget=1.0, suffix=".jsonl")
LOOP = Agent("loop", rank=4, alpha=4, budget=1.0, suffix=".jsonl")
USUAL = Agent("usual", rank=2, alpha=6, budget=1.0, suffix=".csv")


async def test_a_script_and_a_loop_of_ones_own_train_beside_an_agent(
    cluster: LocalCluster, model: Path, tmp_path: Path
) -> None:
    spec = specification("complete", rounds=2, min_updates=3)
    usual = await start_agent(cluster, USUAL, cluster.addresses, model, tmp_path)
    await enrol(cluster, LOOP, tmp_path)
    path = configure(LOOP, cluster.addresses, model, tmp_path)
    own = yaml.safe_load(path.read_text()) | {"learner": "examples.own_trainer.loop:PlainLoop"}
    path.write_text(yaml.safe_dump(own))
    loop = cluster.spawn("loop", "client_agent.main", ["run", "--config", str(path)], {})
    await enrol(cluster, SCRIPT, tmp_path)
    path = configure(SCRIPT, cluster.addresses, model, tmp_path)
    told = yaml.safe_load(path.read_text())
    del told["data"]
    path.write_text(yaml.safe_dump(told))
    files = [str(model), *(str(path.parent / f"{part}.jsonl") for part in ("train", "test"))]
    script = cluster.spawn("script", "examples.own_trainer.script", [*files, str(path)], {})
    await federations.start(cluster, spec)
    federation = await federations.wait_until_over(cluster, spec, [usual, loop, script])

    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    rounds = training_rounds(federation)
    assert [summary.update_count for summary in rounds] == [3, 3]
    kept = [Measured(tmp_path / agent.name / "state") for agent in (USUAL, LOOP, SCRIPT)]
    measured = [one.newest() for one in kept]
    assert sum(one["count"] for one in measured) == 60
    assert sum(one["correct"] for one in measured) > 36  # 30 by chance; 52 and more in five runs
    assert_means_alone_are_told(rounds, [one.results()[rounds[0].round_id]["own"] for one in kept])
    for agent in (USUAL, LOOP, SCRIPT):
        adapter = yaml.safe_load((tmp_path / agent.name / "state/adapter/adapter_config.json").read_text())
        assert adapter["r"] >= agent.rank
    assert yaml.safe_load((tmp_path / "script/state/adapter/adapter_config.json").read_text())["r"] == 4


def assert_means_alone_are_told(rounds: list[pb.RoundSummary], first: list[dict[str, float]]) -> None:
    """No agent tells what is its own; how good the first result is, the second sum tells, the same to all.

    Args: first: What each agent measured of the first result. Of three each weighs a third.
    """
    for summary in rounds:
        assert [update.train_loss for update in summary.updates] == [0, 0, 0]
        told = summary.evaluations
        assert [(one.example_count, one.correct_count, one.loss) for one in told] == [(0, 0, 0)] * 3
    assert len({one.means.SerializeToString() for one in rounds[1].evaluations}) == 1
    assert figures_by_round(rounds)[1].test_accuracy is None
    if rounds[1].attempt > 1:  # on a machine that stands still; whoever told its figures before tells none
        return
    mean = fmean(one["correct"] / one["count"] for one in first)
    assert rounds[1].evaluations[0].means.accuracy == pytest.approx(mean, abs=1e-3)
    assert figures_by_round(rounds)[0].test_accuracy == pytest.approx(mean, abs=1e-3)
    assert rounds[1].evaluations[0].means.loss == pytest.approx(fmean(one["loss"] for one in first), abs=5e-3)
