"""What a cell of the comparison is: one method on one data set, in one cohort, with one seed and learning rate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from compare.metrics import ACCURACY, LOSS, Metric

GRID: Final = (1e-3, 3e-3, 1e-2)
"""Learning rates, the same for all methods; the best on TUNING_SEED is taken for the others."""
TUNING_SEED: Final = 100
ROUNDS: Final = 6
SEEDS: Final = (0, 1, 2)
"""Paired: a seed fixes split, initial values and batches for every method."""
MIXED_RANKS: Final = (2, 4, 8, 16)
EQUAL_RANK: Final = 8
SCALING: Final = 2.0
"""LoRA's alpha / rank, at every client."""
DECAY: Final = 0.8
"""Factor of the learning rate from a round to the next."""
MAX_GRADIENT_NORM: Final = 1.0
"""Gradients of a client are scaled down to this norm."""
EDITION: Final = 1
"""Raised when figures of before do not compare with those of after: cached cells of another edition are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a data set is trained, measured and shown; `compare.datasets.registry` has the data."""

    title: str
    metric: Metric = ACCURACY
    divided: str = "labels"
    """What is divided among clients, evenly or not."""
    rounds: int = ROUNDS
    steps: int = 16
    batch: int = 16
    grid: tuple[float, ...] = GRID
    """Learning rates that every method is tried with."""


DATA: Final[Mapping[str, Setting]] = {
    "r8": Setting(title="Reuters R8"),
    "20news": Setting(title="20 Newsgroups"),
    # Two labels, divided unevenly: six rounds hardly leave chance, whatever the method.
    "tomatoes": Setting(title="Rotten Tomatoes", rounds=18),
    "digits": Setting(title="Handwritten digits"),
    # Steps as in the chat demo. No head is trained, and rates are higher.
    "instructions": Setting(
        title="Questions with answers",
        metric=LOSS,
        divided="topics",
        steps=8,
        batch=4,
        grid=(3e-3, 1e-2, 3e-2),
    ),
}
"""Data sets by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Who takes part, on what."""

    data: str
    """Name of a data set: `DATA`."""
    clients: int = 4
    uneven: bool = True
    """Whether labels are divided by a Dirichlet distribution of alpha 0.3, and not evenly."""
    mixed: bool = True
    """Whether ranks are 2, 4, 8 and 16 in turn, and not all 8."""
    rounds: int = ROUNDS
    steps: int = 16
    """Local steps of AdamW in a round."""
    batch: int = 16

    @classmethod
    def on(cls, data: str, clients: int, *, uneven: bool, mixed: bool) -> "Cohort":
        """A cohort that trains as the data set's setting says."""
        setting = DATA[data]
        return cls(
            data=data,
            clients=clients,
            uneven=uneven,
            mixed=mixed,
            rounds=setting.rounds,
            steps=setting.steps,
            batch=setting.batch,
        )

    @property
    def setting(self) -> Setting:
        """Of the data set."""
        return DATA[self.data]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the clients."""
        return tuple(
            MIXED_RANKS[i % len(MIXED_RANKS)] if self.mixed else EQUAL_RANK for i in range(self.clients)
        )

    @property
    def name(self) -> str:
        """Short, for files and tables."""
        split = "uneven" if self.uneven else "even"
        return f"{self.data}-{self.clients}-{split}-{'mixed' if self.mixed else 'equal'}"

    @property
    def words(self) -> str:
        """For a heading."""
        split = f"{self.setting.divided} {'by Dirichlet(0.3)' if self.uneven else 'even'}"
        ranks = "ranks 2, 4, 8, 16" if self.mixed else f"ranks all {EQUAL_RANK}"
        return f"{self.clients} clients, {split}, {ranks}, {self.rounds} rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run."""

    cohort: Cohort
    method: str
    seed: int
    learning_rate: float

    @property
    def key(self) -> str:
        """Name of its file."""
        return f"{self.cohort.name}/{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    def identity(self) -> dict[str, object]:
        """What its result depends on."""
        return {"edition": EDITION, **asdict(self)}


def tuning(cell: Cell) -> list[Cell]:
    """The runs that a cell's learning rate is chosen by: four clients, uneven, mixed ranks, one seed of their own."""
    cohort = replace(cell.cohort, clients=4, uneven=True, mixed=True)
    return [
        replace(cell, cohort=cohort, seed=TUNING_SEED, learning_rate=rate) for rate in cohort.setting.grid
    ]
