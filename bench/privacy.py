"""`python -m bench.privacy`: what a privacy budget costs in accuracy on Reuters R8, one client without a federation."""

from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.privacy import Mechanism, epsilon_of, noise_for
from client_agent.private_training import train_privately
from client_agent.training import TrainingRun, train
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.cohort import Protection, federation_spec
from examples.reuters.split import LABELS, read_tab
from shelora.obfuscation import Obfuscation
from shelora.tasks import SEQUENCE_CLASSIFICATION

ASSETS: Final = Path("assets")
TOKENS: Final = 48
MICRO_BATCH: Final = 32
app = typer.Typer(add_completion=False)


@app.command()
def compare(
    steps: Annotated[int, typer.Option(min=1, help="Training steps, all rounds together.")] = 96,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step, on average.")] = 64,
    delta: Annotated[float, typer.Option(help="Of every budget; below 1 / 5485.")] = 1e-5,
    tested: Annotated[int, typer.Option(min=1, help="Test examples, of 2189.")] = 2189,
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Budgets; may be repeated.")
    ] = None,
) -> None:
    """Trains the demo's classifier without a budget and with each; prints noise and accuracy."""
    data = fetch(REUTERS, ASSETS)
    examples, test = _read(data / "reuters-r8-train.tab"), _read(data / "reuters-r8-test.tab")
    model = _model(fetch(MINILM, ASSETS))
    encoder = Encoder(model.tokenizer, TOKENS, append_end=False)
    start = model.weights()
    rate = federation_spec(Protection.NONE).training.learning_rate
    run = TrainingRun(rates=[rate] * steps, batch_size=batch_size, seed=1, micro_batch=MICRO_BATCH)
    table = Table("epsilon", "spent", "noise multiplier", "accuracy", "seconds")
    for epsilon in [None, *sorted(epsilons or (8.0, 3.0, 1.0), reverse=True)]:
        noise = noise_for(epsilon, delta, batch_size / len(examples), steps) if epsilon else 0.0
        seconds = _trained(model, start, encoder, examples, run, noise)
        found = evaluate(model, encoder, test.select(range(min(tested, len(test)))), lambda _: None)
        spent = epsilon_of(((noise, batch_size / len(examples), steps),), delta) if epsilon else float("inf")
        table.add_row(
            f"{epsilon or 'none'}",
            f"{spent:.2f}",
            f"{noise:.3f}",
            f"{found.correct / found.count:.1%}",
            f"{seconds:.0f}",
        )
    Console().print(table)


def _read(path: Path) -> Examples:
    rows = read_tab(path)
    return Examples(tuple(row.text for row in rows), tuple(LABELS.index(row.label) for row in rows))


def _model(folder: Path) -> AdaptedModel:
    model = AdaptedModel(
        load_checkpoint(str(folder), SEQUENCE_CLASSIFICATION, LABELS),
        task=SEQUENCE_CLASSIFICATION,
        target_modules=("query", "value"),
        lora=LoraSettings(),
        device=torch.device("cpu"),
    )
    model.initialise(Obfuscation(bytes(32), 1))
    return model


def _trained(
    model: AdaptedModel, start: Weights, encoder: Encoder, examples: Examples, run: TrainingRun, noise: float
) -> float:
    """Trains from the start; 0 for noise trains without privacy. Returns seconds."""
    model.load(start)
    if not noise:
        return train(model, encoder, examples, run, lambda _: None).seconds
    mechanism = Mechanism(
        noise_multiplier=noise, sample_rate=run.batch_size / len(examples), max_gradient_norm=1.0
    )
    return train_privately(model, encoder, examples, run, mechanism, lambda _: None).seconds


if __name__ == "__main__":
    app()
