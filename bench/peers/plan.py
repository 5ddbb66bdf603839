"""What every system does: the demo's federation, with one rank for all, as the peers average factors of one shape."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from client_agent.schedule import Schedule
from examples.reuters.cohort import AGENTS, Protection, federation_spec, write_data
from shelora.federation import FederationSpec

RANK: Final = 8
ALPHA: Final = 16.0
CLIENTS: Final = tuple(agent.name for agent in AGENTS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work, as `apps/work.py` reads it; paths are absolute."""

    model: str
    data: str
    """Folder with one for every client, of train.jsonl and test.jsonl."""
    notes: str
    """Folder where clients note when they trained and what they evaluated."""
    initial: str
    """File of the values that all start from."""
    script: str
    """What NVFLARE's clients run."""
    clients: tuple[str, ...]
    labels: tuple[str, ...]
    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    rounds: int
    batch_size: int
    rates: tuple[tuple[float, ...], ...]
    """Learning rates by round and step."""
    max_tokens: int
    evaluation_examples: int

    @classmethod
    def of(cls, spec: FederationSpec, model: Path, folder: Path) -> Self:
        """The federation's work in a run's folder."""
        training, rounds = spec.training, range(1, spec.round.rounds + 1)
        schedule = Schedule(training, spec.round.rounds)
        return cls(
            model=str(model.absolute()),
            data=str(folder / "data"),
            notes=str(folder / "notes"),
            initial=str(folder / "initial.npy"),
            script=str(folder / "apps" / "nvflare_client.py"),
            clients=CLIENTS,
            labels=tuple(training.labels),
            target_modules=tuple(training.target_modules),
            rank=RANK,
            alpha=ALPHA,
            rounds=spec.round.rounds,
            batch_size=training.batch_size,
            rates=tuple(tuple(schedule.rates(number, training.local_steps)) for number in rounds),
            max_tokens=training.max_tokens,
            evaluation_examples=training.evaluation_examples,
        )

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def specification(protection: Protection, rounds: int, steps: int) -> FederationSpec:
    """The demo's federation, of so many rounds and steps a round; 0 for the demo's own."""
    spec = federation_spec(protection)
    return spec.model_copy(
        update={
            "round": spec.round.model_copy(update={"rounds": rounds or spec.round.rounds}),
            "training": spec.training.model_copy(update={"local_steps": steps or spec.training.local_steps}),
        }
    )


def divided(source: Path, folder: Path) -> Mapping[str, int]:
    """Writes every client's data as the demo divides it. Returns how many examples each trains on."""
    return write_data(source, folder)
