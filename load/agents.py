"""A process of simulated agents: `python -m load.agents SHARE.json`, started by `load.run`."""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import REGISTRY

from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.worker import Worker
from load.calls import Calls
from load.learner import SyntheticLearner
from services.common.process import allow_many_connections
from shelora.cli.cluster import Addresses
from shelora.configuration import StrictModel
from shelora.telemetry.logs import configure_logs

RANKS: Final = (4, 8, 8, 16)
"""As in the demo; agents take them in turn. All have the default budget: everything is encrypted."""
TRANSFERRED: Final = "shelora_agent_transfer_bytes_total"
"""The agents' own counter."""

_log = structlog.get_logger(__name__)


class Share(StrictModel):
    """The agents of one process."""

    federation: str
    names: tuple[str, ...]
    addresses: Addresses
    folder: Path
    """Holds a folder for every agent, enrolled."""
    deadline_s: float
    """Seconds that a round collects."""
    starts_per_s: float
    """Agents started a second: a fleet does not come up in one moment."""
    output: Path
    """Where the outcome goes."""

    def config(self, index: int) -> AgentConfig:
        """What one agent is told."""
        name = self.names[index]
        values: dict[str, Any] = {
            "federation": self.federation,
            "client_id": name,
            "coordinator": self.addresses.coordinator,
            "aggregation": tuple(self.addresses.aggregation),
            "key_authority": self.addresses.key_authority,
            "state_dir": state_dir(self.folder, name),
            "model": {"path": "synthetic"},
            "data": {"train": "synthetic.jsonl"},
            "lora": {"rank": RANKS[index % len(RANKS)]},
        }
        return AgentConfig.model_validate(values)


def state_dir(folder: Path, name: str) -> Path:
    """Where an agent's state lies."""
    return folder / name / "state"


async def run(share: Share) -> dict[str, Any]:
    """Runs the agents to their ends. Returns how they ended, and what their calls took."""
    calls, worker = Calls(share.deadline_s), Worker()

    async def one(index: int) -> str:
        await asyncio.sleep(index / share.starts_per_s)
        agent = Agent(share.config(index), SyntheticLearner, worker=worker, connect=calls.connect)
        try:
            return (await agent.run()).value
        except Exception as error:  # noqa: BLE001 - what ended one agent is a finding, not the end of the others
            _log.warning("agent_failed", client_id=share.names[index], exc_info=error)
            return f"{type(error).__name__}: {error}"

    try:
        outcomes = await asyncio.gather(*map(one, range(len(share.names))))
    finally:
        await worker.close()
    return {
        "outcomes": Counter(outcomes),
        "failures": calls.failures,
        "seconds": calls.seconds,
        "sent": calls.sent,
        "received": calls.received,
        "bytes": {way: REGISTRY.get_sample_value(TRANSFERRED, {"direction": way}) for way in ("up", "down")},
    }


def main() -> None:
    share = Share.model_validate_json(Path(sys.argv[1]).read_bytes())
    configure_logs("load-agents", "WARNING", json=True)
    allow_many_connections()
    outcome = asyncio.run(run(share))
    share.output.write_text(json.dumps(outcome))
    sys.exit(0 if set(outcome["outcomes"]) == {Outcome.FINISHED.value} else 1)


if __name__ == "__main__":
    main()
