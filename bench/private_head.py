"""`python -m bench.private_head`: accuracy against epsilon where a head alone is trained, on outputs of frozen layers.

The fewest parameters that learn Reuters R8, so about the least that a budget costs: what agents train, adapters and
head, has more values for noise to fall on. DP-SGD as agents run it (Poisson sampling, clipping over all parameters,
noise on the sum, AdamW anew each round, Opacus' accountant), here in numpy with noise that can be predicted.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.privacy import DECAY, EPSILONS, FOLDER, HIDDEN, MICRO_BATCH, Bench, draw
from client_agent.data import Examples
from client_agent.privacy import noise_for
from client_agent.training import parts_of
from examples.reuters.split import LABELS
from shelora.obfuscation import Obfuscation

DELTA: Final = 1e-5
BETAS: Final = (0.9, 0.999)
TINY: Final = 1e-8
_FEATURES: Final = "features.npz"

Floats = NDArray[np.float64]
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a head sees [examples, n + 1], the last column one, and the labels."""

    train: Floats
    test: Floats
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]

    @classmethod
    def load(cls, folder: Path) -> "Data":
        """Computed once, and kept in the folder."""
        path = folder / _FEATURES
        if not path.exists():
            bench = Bench.load(folder / HIDDEN)
            np.savez(
                path,
                train=_features(bench, bench.examples),
                test=_features(bench, bench.test),
                train_labels=np.array(bench.examples.labels),
                test_labels=np.array(bench.test.labels),
            )
        with np.load(path) as kept:
            return cls(**{name: kept[name] for name in kept.files})


@torch.no_grad()
def _features(bench: Bench, examples: Examples) -> Floats:
    """What the frozen model hands its head, and ones."""
    bench.model.initialise(Obfuscation(bytes(32), 1))
    module: Any = bench.model.module
    module.eval()
    seen: list[torch.Tensor] = []
    hook = module.base_model.model.classifier.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    order = sorted(range(len(examples)), key=lambda i: len(examples.texts[i]))
    try:
        for chosen in parts_of(order, MICRO_BATCH):
            bench.model.predict(bench.encoder.batch(examples.select(list(chosen))))
    finally:
        hook.remove()
    found = np.empty((len(examples), seen[0].shape[1] + 1))
    found[order] = np.hstack([torch.cat(seen).double().numpy(), np.ones((len(order), 1))])
    return found


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Of a training."""

    rounds: int
    steps: int
    batch_size: int
    learning_rate: float
    clip: float

    def accuracy(self, data: Data, epsilon: float, seed: int) -> float:
        """On the test examples. Args: epsilon: 0 for no budget."""
        rng, count = np.random.default_rng(seed), len(data.train)
        share = min(1.0, self.batch_size / count)
        noise = noise_for(epsilon, DELTA, share, self.rounds * self.steps) if epsilon else 0.0
        norms = np.linalg.norm(data.train, axis=1)
        head = np.zeros((len(LABELS), data.train.shape[1]))
        for number in range(self.rounds):
            first, second = np.zeros_like(head), np.zeros_like(head)
            for step in range(1, self.steps + 1):
                chosen = np.flatnonzero(rng.random(count) < share)
                back = _softmax(data.train[chosen] @ head.T)
                back[np.arange(len(chosen)), data.train_labels[chosen]] -= 1
                if epsilon:
                    sizes = np.linalg.norm(back, axis=1) * norms[chosen]
                    back *= np.minimum(1, self.clip / np.maximum(sizes, TINY))[:, None]
                gradient = back.T @ data.train[chosen] + noise * self.clip * rng.standard_normal(head.shape)
                gradient /= share * count
                first = BETAS[0] * first + (1 - BETAS[0]) * gradient
                second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
                size = np.sqrt(second / (1 - BETAS[1] ** step)) + TINY
                head -= self.learning_rate * DECAY**number * first / (1 - BETAS[0] ** step) / size
        return float(((data.test @ head.T).argmax(axis=1) == data.test_labels).mean())


def _softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


@app.command()
def compare(
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a round.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step, on average.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 0.2,
    clip: Annotated[float, typer.Option(help="Norm that each example's gradient is scaled down to.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 5,
    folder: Annotated[Path, typer.Option(help="Where features and the picture go.")] = FOLDER,
) -> None:
    """Trains a head without a budget and with epsilon 8, 3 and 1, prints the accuracies and draws them."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Data.load(folder)
    terms = Terms(rounds=rounds, steps=steps, batch_size=batch_size, learning_rate=learning_rate, clip=clip)
    table, trainings = Table("epsilon", "accuracy", "least", "trainings"), []
    for epsilon in (0.0, *EPSILONS):
        found = [terms.accuracy(data, epsilon, seed) for seed in range(seeds)]
        spread = f" ± {stdev(found):.1%}" if seeds > 1 else ""
        words = (f"{epsilon:g}" if epsilon else "none", f"{mean(found):.1%}{spread}", f"{min(found):.1%}")
        table.add_row(*words, f"{seeds}")
        trainings += [{"epsilon": epsilon, "correct": share, "count": 1} for share in found]
    Console().print(table)
    draw(trainings, folder / "accuracy-head.png", "a head alone")


if __name__ == "__main__":
    app()
