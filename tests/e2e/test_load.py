"""The load driver, small. Its agents are the real agent's code, so this is also the largest federation of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

AGENTS, ROUNDS = 24, 2


def test_simulated_agents_finish_a_federation_and_every_update_counts(tmp_path: Path):
    folder = tmp_path / "load"
    sizes = ["--agents", str(AGENTS), "--rounds", str(ROUNDS), "--starts-per-s", "100"]
    command = [sys.executable, "-m", "load", *sizes, "--processes", "1", "--folder", str(folder)]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert (folder / "summary.json").exists(), done.stdout + done.stderr
    (run,) = json.loads((folder / "summary.json").read_text())["runs"]
    # On a busy machine a heartbeat may time out, which the agent makes up for; nothing else may fail.
    assert not [problem for problem in run["problems"] if "DEADLINE_EXCEEDED" not in problem]
    assert (run["agents"], len(run["round_s"])) == (AGENTS, ROUNDS)
    assert run["latency_s"]["CommitUpdate"]["count"] == AGENTS * ROUNDS
    assert run["latency_s"]["GetOpening"]["count"] >= AGENTS * ROUNDS, "every agent opens every sum"
    assert run["mode"] == "complete"
    assert run["latency_s"]["ReportEvaluation"]["count"] == AGENTS * ROUNDS
    assert {"redis", "coordinator", "key-authority", "aggregation-0", "aggregation-0/worker-0"} <= set(
        run["services"]
    )
    assert (folder / "cost.png").stat().st_size > 10_000
