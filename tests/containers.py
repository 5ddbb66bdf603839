"""What the tests of compose and of the chart's pods share: commands, patience, and how they ask for a federation."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 900

ASK = """
import asyncio, os, sys
from pathlib import Path
from google.protobuf.json_format import MessageToJson
from shelora.operator import operator, own_credentials

async def ask():
    credentials = await own_credentials(Path(os.environ["SHELORA_IDENTITY"]), os.environ["SHELORA_KEY_AUTHORITY"])
    async with operator(os.environ["SHELORA_COORDINATOR"], credentials) as connection:
        print(MessageToJson(await connection.get(sys.argv[1])))

asyncio.run(ask())
"""
"""Run beside an operator's identity: prints a federation as JSON of its message."""


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


def wait(
    condition: Callable[[], bool], what: str, logs: Callable[[], str], patience_s: float = PATIENCE_S
) -> None:
    """Waits until a condition holds; fails with the logs if that takes too long."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}\n{logs()}"
        time.sleep(1)


def training(federation: dict[str, Any]) -> list[dict[str, Any]]:
    """The published training rounds. Without evaluations, which agents report later."""
    return [
        {field: value for field, value in r.items() if field != "evaluations"}
        for r in federation.get("history", [])
        if (r["kind"], r["state"]) == ("ROUND_KIND_TRAIN", "ROUND_STATE_PUBLISHED")
    ]
