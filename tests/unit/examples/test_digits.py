"""The vision demo: who sees which digits, what its files say, when it fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from client_agent.config import AgentConfig
from examples.agents import Nowhere
from examples.digits import data
from examples.digits.demo import HERE, agent_config, require_close
from examples.report import PERPLEXITY, plot_rounds
from shelora.errors import DomainError
from shelora.federation import FederationSpec

COUNT = 400
"""Far fewer than there are: the first are public all the same."""


def digits() -> data.Digits:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    return data.Digits(images, rng.integers(0, 10, COUNT))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.png")}


def test_agents_share_out_the_training_digits_by_class_and_test_on_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PUBLIC", 50)
    monkeypatch.setattr(data, "TRAINED", 250)
    counts = data.write_agents(digits(), tmp_path)
    assert sum(counts.values()) == 200
    assert sorted(digit for seen in data.CLASSES.values() for digit in seen) == list(range(10))
    tests = []
    for agent, classes in data.CLASSES.items():
        assert {path.name for path in (tmp_path / agent / "train").iterdir()} == {str(c) for c in classes}
        assert len(files(tmp_path / agent / "train")) == counts[agent]
        assert len(list((tmp_path / agent / "test").iterdir())) == 10
        tests.append(files(tmp_path / agent / "test"))
    assert sum(map(len, tests)) == len(set.union(*tests)) == COUNT - 250
    data.write_pooled(digits(), tmp_path / "pooled")
    assert files(tmp_path / "pooled" / "train") == set.union(
        *(files(tmp_path / agent / "train") for agent in data.CLASSES)
    )
    assert files(tmp_path / "pooled" / "test") == set.union(*tests)


def test_the_files_of_the_vision_demo_are_valid(tmp_path):
    spec = FederationSpec.from_yaml(HERE / "federation.yaml")
    assert spec.protection.mode == "complete"
    assert spec.round.clients == len(data.CLASSES)
    assert spec.training.labels == data.LABELS
    path = tmp_path / "agent.yaml"
    path.write_text(yaml.safe_dump(agent_config(Nowhere(), name="post-office-1", model=tmp_path)))
    assert AgentConfig.load(path, {}).federation == spec.name


def test_the_vision_demo_fails_from_two_points_behind_pooled_training():
    require_close(0.96, 0.975)
    with pytest.raises(DomainError, match=r"3\.0 points behind"):
        require_close(0.95, 0.98)


def test_a_plot_has_other_trainings_beside_the_rounds(tmp_path):
    agents = {"a": {"upload_bytes": 1e6, "download_bytes": 1e6}}
    rounds = [
        {"number": n, "test_loss": 2 / n, "upload_bytes": 1e6, "download_bytes": 1e6, "agents": agents}
        for n in (1, 2)
    ]
    summary = {"rounds": rounds, "configuration": {"federation": {"protection": {"mode": "complete"}}}}
    assert PERPLEXITY.value(json.loads(json.dumps(rounds))[0]) == pytest.approx(np.exp(2))
    plot_rounds(summary, tmp_path / "rounds.png", PERPLEXITY, {"alone": 5.0})
    assert (tmp_path / "rounds.png").stat().st_size > 10_000
