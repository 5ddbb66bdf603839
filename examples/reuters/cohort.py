"""The demo's four agents: what they run, the data they hold, their configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from examples.agents import Servers, agent_file
from examples.reuters.split import LABELS, dirichlet_split, read_tab, write_jsonl
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec

HERE: Final = Path(__file__).parent
SPLIT_SEED: Final = 7
DIRICHLET_ALPHA: Final = 1.0
"""At 0.3 one of five splits leaves two of four agents with one label each, and ten rounds then end between 66 and 84 %
by the batches that were drawn: nothing can be told apart there."""


class Protection(StrEnum):
    COMPLETE = "complete"
    SELECTIVE = "selective"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class AgentProfile:
    """What differs between the demo's agents."""

    name: str
    rank: int
    alpha: float
    budget: float


AGENTS: Final = (
    AgentProfile(name="newsroom-1", rank=4, alpha=8, budget=1.0),
    AgentProfile(name="newsroom-2", rank=8, alpha=16, budget=1.0),
    AgentProfile(name="thin-uplink", rank=8, alpha=16, budget=0.1),
    AgentProfile(name="newsroom-3", rank=16, alpha=16, budget=1.0),
)


def federation_spec(protection: Protection, initial_seed: int = 0) -> FederationSpec:
    """The federation of federation.yaml, with the protection asked for.

    Args: initial_seed: runs of the same one start from the same factors; 0 for secret ones.
    """
    spec = FederationSpec.from_yaml(HERE / "federation.yaml")
    return spec.model_copy(
        update={
            "protection": spec.protection.model_copy(update={"mode": protection.value}),
            "training": spec.training.model_copy(update={"initial_seed": initial_seed}),
        }
    )


def write_data(source: Path, folder: Path, seed: int = SPLIT_SEED) -> Mapping[str, int]:
    """Writes every agent's train and test examples to `folder`. Returns the number of training examples by agent."""
    train = read_tab(source / "reuters-r8-train.tab")
    test = read_tab(source / "reuters-r8-test.tab")
    if {e.label for e in train} != set(LABELS):
        raise DomainError(
            Reason.DATA_INVALID, "the training data does not hold the eight classes of Reuters R8"
        )
    parts = dirichlet_split([e.label for e in train], len(AGENTS), DIRICHLET_ALPHA, seed)
    for position, (agent, indices) in enumerate(zip(AGENTS, parts, strict=True)):
        home = folder / agent.name
        home.mkdir(parents=True, exist_ok=True)
        write_jsonl([train[i] for i in indices], home / "train.jsonl")
        write_jsonl(test[position :: len(AGENTS)], home / "test.jsonl")
    return {agent.name: len(indices) for agent, indices in zip(AGENTS, parts, strict=True)}


def agent_config(
    servers: Servers, profile: AgentProfile, model: Path, protection: Protection = Protection.COMPLETE
) -> dict[str, Any]:
    """The content of an agent's YAML file; paths are relative to it."""
    file = agent_file(
        servers, federation="reuters", name=profile.name, model=model, protection=protection.value
    )
    return file | {
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "lora": {"rank": profile.rank, "alpha": profile.alpha},
        "budget": profile.budget,
    }
