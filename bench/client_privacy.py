"""`python -m bench.client_privacy`: what client privacy in sums costs in accuracy on Reuters R8, by number of clients.

Clients train the demo's classifier on equal random parts, in the product's own code from sketches to noise and back;
only encryption, which adds a thousandth of the noise, is left out. With `--copies n` each client stands for n that send
the same: the noise of n is added for each. Every run is written down (`--folder`) and not repeated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.privacy import ASSETS, MICRO_BATCH, TESTED, TOKENS, UNFINISHED, model_of, read
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.learning import Weights
from client_agent.results import cut_to_rank
from client_agent.state import AgentState
from client_agent.training import TrainingRun, train
from examples.reuters.assets import MINILM, REUTERS, fetch
from shelora.accounting import multiplier_for
from shelora.additive.parameters import DEFAULT
from shelora.additive.wire import ShardShape
from shelora.lora.layout import Layout
from shelora.lora.noise import ClientNoise
from shelora.lora.shards import Float64, ResultShardContent
from shelora.lora.sums import SKETCHES_KIND, SUMS_KIND
from shelora.obfuscation import Obfuscation
from shelora.strategies import complete
from shelora.strategies.agents.complete import COMPLETE
from shelora.strategies.agents.port import AgentContext, OpenedSum, Summand
from shelora.strategies.port import RoundTerms

FOLDER: Final = Path("runs/client-privacy")
DELTA: Final = 1e-5
TOLERATED: Final = 1
DECAY: Final = 0.8
OBFUSCATION: Final = Obfuscation(bytes(32), 1)
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Of a federation in complete mode."""

    noise: ClientNoise
    parameters: str = "standard"
    tensor_bound: float = 1.0
    max_directions: int = 1
    clear_bits: int = 32
    mean_figures: bool = False


@dataclass
class Sum:
    """Adds up what would be encrypted, and is what opens it."""

    shards: list[Float64] = field(default_factory=list)
    position: int = 0

    def encrypt(self, values: Float64) -> bytes:
        """The next shard of a client."""
        if self.position == len(self.shards):
            self.shards.append(np.zeros(len(values)))
        self.shards[self.position] += values
        self.position += 1
        return b""

    def open(self, data: bytes | memoryview, shape: ShardShape) -> Float64:  # noqa: ARG002 - the port's
        """The sum of a shard."""
        return self.shards[shape.shard]


def noise_of(
    deviation: int, share: float, rng: np.random.Generator
) -> Callable[[int, int], NDArray[np.int64]]:
    """Noise for a measurement, not for use: of a deviation times `share`."""
    return lambda _, count: np.rint(rng.normal(0, deviation * share, count)).astype(np.int64)


@app.command()
def measure(
    epsilon: Annotated[float, typer.Option(min=0, help="Budget of all rounds; 0: clip alone.")] = 8.0,
    clients: Annotated[int, typer.Option(min=2)] = 20,
    copies: Annotated[int, typer.Option(min=1, help="Clients that each one stands for.")] = 1,
    clip: Annotated[float, typer.Option(help="Norm of what a client changes in a round.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option()] = 0.003,
    folder: Annotated[Path, typer.Option()] = FOLDER,
    at_most: Annotated[
        int, typer.Option(min=1, help="Rounds after which a run breaks off, with exit status 3.")
    ] = 10_000,
) -> None:
    """Runs one federation unless it is written down; prints all that are."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"epsilon{epsilon:g}-clients{clients}x{copies}-clip{clip:g}-rank{rank}-steps{steps}-rate{learning_rate:g}"
    path = folder / f"{name}-rounds{rounds}.json"
    if not path.exists():
        torch.set_num_threads(1)
        state = AgentState(folder / "states" / f"{name}-rounds{rounds}")
        found = federation(epsilon, clients, copies, clip, rounds, steps, rank, learning_rate, state, at_most)
        path.write_text(json.dumps(found, indent=1))
        state.close()
    table = Table("clients", "epsilon", "clip", "rank", "noise multiplier", "norms", "accuracy")
    for written in sorted(folder.glob("*.json")):
        run = json.loads(written.read_text())
        table.add_row(
            f"{run['clients']} x {run['copies']}",
            f"{run['epsilon']:g}" if run["epsilon"] else "none",
            f"{run['clip']:g}",
            f"{run['rank']}",
            f"{run['multiplier']:.2f}",
            f"{run['norms'][0]:.2f} .. {run['norms'][-1]:.2f}",
            f"{run['accuracy']:.1%}",
        )
    Console(width=140).print(table)


def federation(
    epsilon: float,
    clients: int,
    copies: int,
    clip: float,
    rounds: int,
    steps: int,
    rank: int,
    learning_rate: float,
    state: AgentState,
    at_most: int,
) -> dict[str, Any]:
    """Accuracy at the end, and the median norm of what clients change in each round before the clip."""
    data = fetch(REUTERS, ASSETS)
    examples = read(data / "reuters-r8-train.tab")
    test = read(data / "reuters-r8-test.tab").select(range(TESTED))
    model = model_of(fetch(MINILM, ASSETS), rank)
    encoder = Encoder(model.tokenizer, TOKENS, append_end=False)
    parts = np.array_split(np.random.default_rng(0).permutation(len(examples)), clients)
    present = clients * copies
    multiplier = multiplier_for(epsilon, DELTA, rounds) if epsilon else 1.0
    noise = ClientNoise(bound=1.0, clip=clip, multiplier=multiplier, honest=present - TOLERATED)
    layout = complete.STRATEGY.layout(model, Terms(noise=noise), RoundTerms(key_id=b"", max_rank=rank))
    grid = noise.grid(DEFAULT, present)
    share = float(epsilon > 0) / np.sqrt(copies)
    model.initialise(OBFUSCATION)
    norms: list[float] = []
    if (saved := state.applied()) is not None:
        norms = json.loads(saved[0]["norms"])
        model.load(saved[1])
    begun = len(norms)
    for number in range(begun + 1, rounds + 1):
        if number > begun + at_most:
            raise typer.Exit(UNFINISHED)
        start, total, moved = model.weights(), Sum(), []
        added = noise_of(grid.deviation, share, np.random.default_rng(number))
        for index, part in enumerate(parts):
            model.load(start)
            run = TrainingRun(
                rates=[learning_rate * DECAY ** (number - 1)] * steps,
                batch_size=16,
                seed=1000 * number + index,
                micro_batch=MICRO_BATCH,
            )
            train(model, encoder, examples.select([int(i) for i in part]), run, lambda _: None)
            total.position = 0
            known = AgentContext(
                model=model,
                obfuscation=OBFUSCATION,
                round_number=number,
                summand=Summand(encryption=total, share=1.0, most_contributors=present),
                reference=start,
                draws=added,
            )
            trained = model.weights()
            moved.append(COMPLETE.norm(layout, trained, known))
            for _ in COMPLETE.protect(layout, trained, known):
                pass
        model.load(_opened(layout, total, start, number, (clients, present), rank, model.scaling))
        norms.append(float(np.median(moved)))
        state.save_applied({"norms": json.dumps(norms)}, model.weights())
        print(f"round {number}: norm {norms[-1]:.3g}", flush=True)
    found = evaluate(model, encoder, test, lambda _: None)
    return {
        "epsilon": epsilon,
        "delta": DELTA,
        "clients": clients,
        "copies": copies,
        "clip": clip,
        "rank": rank,
        "multiplier": multiplier if epsilon else 0.0,
        "values": sum(layout_values(layout)),
        "norms": norms,
        "accuracy": found.correct / found.count,
    }


def layout_values(layout: Layout) -> list[int]:
    """Values of each shard."""
    kinds = {kind.name: kind for kind in (SKETCHES_KIND, SUMS_KIND)}
    return [kinds[shard.kind].values(layout, shard) for shard in layout.shards]


def _opened(
    layout: Layout,
    total: Sum,
    start: Weights,
    number: int,
    counts: tuple[int, int],
    rank: int,
    scaling: float,
) -> Weights:
    """What every agent makes of the sum. Args: counts: of clients simulated, and that they stand for."""
    simulated, present = counts
    known = AgentContext(
        model=_Shapes(layout, rank, scaling),
        obfuscation=OBFUSCATION,
        round_number=number,
        opened=OpenedSum(
            opener=total, shares=simulated, noise=0.0, contributors=present, most_contributors=present
        ),
        reference=start,
    )
    contents = (
        ResultShardContent(
            shard=index, contributor_count=present, matrices=(), clear_tensors=(), ciphertexts=b""
        )
        for index in range(len(layout.shards))
    )
    return cut_to_rank(COMPLETE.restored(layout, contents, known), rank, scaling, OBFUSCATION)


@dataclass(frozen=True)
class _Shapes:
    layout: Layout
    rank: int
    scaling: float

    @property
    def matrices(self) -> Any:  # noqa: ANN401 - a port's
        return self.layout.matrices

    @property
    def tensors(self) -> Any:  # noqa: ANN401 - a port's
        return self.layout.tensors


if __name__ == "__main__":
    app()
