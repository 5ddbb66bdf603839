"""Every demo that a guide shows runs by the command that it shows, and leaves what it says."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = {"chat.md": "runs/chat", "vision.md": "runs/vision"}
LIMIT_S = 1800


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("guide", GUIDES)
def test_the_demo_of_a_guide_runs_and_leaves_what_the_guide_says(guide: str) -> None:
    text = (ROOT / "docs" / guide).read_text()
    (command,) = re.findall(r"^ {4}(make demo-[a-z]+)$", text, flags=re.MULTILINE)
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    left = ROOT / GUIDES[guide]
    assert {path.name for path in left.iterdir()} >= {"summary.json", "rounds.png", "report.html", "adapter"}
    assert (left / "adapter" / "adapter_model.safetensors").is_file()
    rounds = json.loads((left / "summary.json").read_text())["rounds"]
    assert rounds[-1]["train_loss"] < rounds[0]["train_loss"], "it learns"
