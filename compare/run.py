"""One cell: a method from its first round to its last, measured."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client_agent.drawing import batches, seed_of
from compare.data import Encoded, seed_bytes, split
from compare.datasets.registry import encoded, network
from compare.methods.port import Outcome
from compare.methods.registry import METHODS
from compare.networks.port import Measured, Network, Schedule
from compare.settings import DECAY, SCALING, Cell
from compare.state import Held, World, dense, effective_rank
from shelora.obfuscation import Obfuscation

MOST_SHARE = 3.0
"""No client weighs more than that many medians, as under `screening.max_example_ratio`."""
OBSERVED = 64
"""Examples of each client behind the directions of an activation-based A."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a cell measured."""

    metric: str
    """Name of what is measured."""
    early: float
    """On all test examples after a third of the rounds."""
    final: float
    """After all of them: of the model handed out, or the mean of the clients' models where none is."""
    worst: float
    """The worst, over clients, of what its own model reaches on examples with its own mix of labels."""
    effective_rank: float
    """Of the update, mean over matrices."""
    up: float
    """Bytes a client and round."""
    down: float
    server_s: float
    """CPU seconds a round."""
    wall_s: float
    """Of the whole cell."""

    def record(self) -> dict[str, float]:
        """As it is kept: the final figure under the name of its metric."""
        figures = asdict(self)
        return {figures.pop("metric"): figures.pop("final"), **figures}


def run(cell: Cell, assets: Path, store: Path) -> Result:
    """Runs a cell.

    The same cell gives the same figures on one machine, times excepted, and what the noise of fresh keys moves where a
    method encrypts.
    """
    began, cohort = time.monotonic(), cell.cohort
    data, net = encoded(cohort.data, assets, store), network(cohort.data, assets, store)
    parts = split(data, cohort.clients, uneven=cohort.uneven, seed=cell.seed, least=cohort.batch)
    method = METHODS[cell.method]()
    held = list(method.begin(_world(cell, net, parts)))
    tests, outcomes, early = _Tests(net, data), list[Outcome](), 0.0
    for number in range(1, cohort.rounds + 1):
        schedule = _schedule(cell, parts, number, pooled=method.pooled, trains=method.trains(number))
        outcomes.append(method.combine(net.train(held, schedule, SCALING), number))
        held = list(outcomes[-1].held)
        if number == cohort.rounds // 3:
            early = tests.mean(outcomes[-1].models)
    last, own = outcomes[-1], held if len(held) > 1 else held * cohort.clients
    return Result(
        metric=cohort.setting.metric.name,
        early=early,
        final=tests.mean(last.models),
        worst=cohort.setting.metric.worst(map(tests.by_mix, own, parts)),
        effective_rank=_effective_rank(net, last),
        up=float(np.mean([o.up for o in outcomes])),
        down=float(np.mean([o.down for o in outcomes])),
        server_s=float(np.mean([o.server_s for o in outcomes])),
        wall_s=time.monotonic() - began,
    )


def _world(cell: Cell, net: Network, parts: Sequence[NDArray[np.int64]]) -> World:
    sizes = np.array([len(part) for part in parts], dtype=np.float64)
    sizes = np.minimum(sizes, MOST_SHARE * np.median(sizes))
    world = World(
        matrices=net.matrices,
        tensors=net.tensors,
        ranks=cell.cohort.ranks,
        weights=sizes / sizes.sum(),
        scaling=SCALING,
        obfuscation=Obfuscation(seed_bytes(cell.seed), 1),
        steps_per_round=cell.cohort.steps,
        learning_rate=cell.learning_rate,
    )
    seen = np.concatenate([part[:: max(1, len(part) // OBSERVED)] for part in parts])
    return replace(world, inputs=net.moments(world.initial(1), seen, SCALING))


def _schedule(
    cell: Cell, parts: Sequence[NDArray[np.int64]], number: int, *, pooled: bool, trains: tuple[bool, bool]
) -> Schedule:
    """The same batches for every method; pooled training sees as many examples a step as all clients together."""
    cohort = cell.cohort
    sources, size = (
        ([np.concatenate(parts)], cohort.batch * cohort.clients) if pooled else (parts, cohort.batch)
    )
    chosen = [
        [source[step].tolist() for step in _batches(cell, len(source), size, client, number)]
        for client, source in enumerate(sources)
    ]
    return Schedule(
        batches=chosen,
        learning_rate=cell.learning_rate * DECAY ** (number - 1),
        train_A=trains[0],
        train_B=trains[1],
    )


def _batches(cell: Cell, count: int, size: int, client: int, number: int) -> list[list[int]]:
    return list(batches(count, size, cell.cohort.steps, seed_of("compare", cell.seed, client, number)))


class _Tests:
    """The test examples, and what models reach on them: each model is measured once."""

    def __init__(self, net: Network, data: Encoded) -> None:
        self._net, self._data = net, data
        self._examples = np.arange(data.training, len(data.labels))
        self._known: dict[int, tuple[Held, Measured]] = {}

    def mean(self, models: Sequence[Held]) -> float:
        """Mean over the models."""
        return float(np.mean([self._measured(model).mean for model in models]))

    def by_mix(self, model: Held, part: NDArray[np.int64]) -> float:
        """A model's figure if labels came as in a part of the training examples; those that tests lack are left out."""
        measured, labels, classes = self._measured(model), self._data.labels, self._data.classes
        mix = np.bincount(labels[part], minlength=classes)
        totals, counts = (
            np.bincount(labels[self._examples], weights=each, minlength=classes)
            for each in (measured.totals, measured.counts)
        )
        weights = np.where(counts > 0, mix, 0).astype(np.float64)
        return float((weights * totals / np.maximum(counts, 1)).sum() / weights.sum())

    def _measured(self, model: Held) -> Measured:
        if id(model) not in self._known:  # the model is kept, so that its number stays its own
            self._known[id(model)] = model, self._net.measured(model, self._examples, SCALING)
        return self._known[id(model)][1]


def _effective_rank(net: Network, outcome: Outcome) -> float:
    model = outcome.models[0]
    return float(np.mean([effective_rank(dense(model, m.name, SCALING)) for m in net.matrices]))
