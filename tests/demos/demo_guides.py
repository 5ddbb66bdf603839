"""Every demo that a guide shows runs by the command that it shows, and leaves what it says."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = {"chat.md": ("make demo-chat", "runs/chat"), "vision.md": ("make demo-vision", "runs/vision")}
LIMIT_S = 1800


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("guide", GUIDES)
def test_the_demo_of_a_guide_runs_and_leaves_what_the_guide_says(guide: str) -> None:
    command, folder = GUIDES[guide]
    assert f"\n    {command}\n" in (ROOT / "docs" / guide).read_text()
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    left = ROOT / folder
    assert {path.name for path in left.iterdir()} >= {"summary.json", "rounds.png", "report.html", "adapter"}
    assert (left / "adapter" / "adapter_model.safetensors").is_file()
    rounds = json.loads((left / "summary.json").read_text())["rounds"]
    assert rounds[-1]["train_loss"] < rounds[0]["train_loss"], "it learns"
