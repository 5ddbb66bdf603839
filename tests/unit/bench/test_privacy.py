import json
from dataclasses import asdict

import pytest
import torch

from bench import privacy
from bench.privacy import Lower


def test_what_lies_below_comes_back_as_it_was(tmp_path, monkeypatch):
    known = {(1, 2, 3): torch.randn(3, 4), (7,): torch.randn(1, 4)}
    monkeypatch.setattr(Lower, "known", dict(known))
    Lower.save(tmp_path / "hidden.safetensors")
    Lower.known.clear()
    Lower.load(tmp_path / "hidden.safetensors")
    assert list(Lower.known) == list(known)
    assert all(torch.equal(Lower.known[ids], states) for ids, states in known.items())


def test_what_is_written_down_is_drawn_and_not_trained_again(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(privacy, "draw", lambda trainings, _: drawn.extend(trainings))
    monkeypatch.setattr(privacy, "ProcessPoolExecutor", lambda *_: pytest.fail("nothing is left to train"))
    terms = {"rounds": 2, "steps": 3, "batch_size": 64, "learning_rate": 0.02, "delta": 1e-5, "seed": 0}
    for epsilon, clip, correct in ((8.0, 0.5, 90), (8.0, 1.0, 80), (0.0, 0.0, 95)):
        setting = privacy.Setting(epsilon=epsilon, max_gradient_norm=clip, **terms)
        found = asdict(setting) | {"noise_multiplier": 1.0, "correct": correct, "count": 100}
        (tmp_path / f"{setting.name}.json").write_text(json.dumps(found))
    privacy.compare(
        epsilons=[8.0, 0.0],
        rounds=2,
        steps=3,
        batch_size=64,
        learning_rate=0.02,
        clip=0.5,
        delta=1e-5,
        seeds=1,
        folder=tmp_path,
        at_most=9,
        workers=2,
    )
    assert [(t["epsilon"], t["correct"]) for t in drawn] == [(8.0, 90), (0.0, 95)]
