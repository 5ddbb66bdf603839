"""`python -m bench.privacy`: what a privacy budget costs in accuracy on Reuters R8, one client without a federation.

Adapters of the last layer and the head are trained; what lies below is computed once for every text, and kept.

It trains in rounds with an optimizer of their own, as in a federation. Every round and every training is written down
as it ends (`--folder`) and not repeated, so that a run can be interrupted. `compare` trains budgets side by side, one
core each, and draws those it was asked for (accuracy.png); `plot` draws whatever the folder holds.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import evaluate
from client_agent.model import AdaptedModel
from client_agent.noise import Randomness
from client_agent.privacy import Mechanism, epsilon_of, noise_for
from client_agent.private_training import train_privately
from client_agent.state import AgentState
from client_agent.training import TrainingRun, parts_of, train
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.split import LABELS, read_tab
from shelora.obfuscation import Obfuscation
from shelora.tasks import SEQUENCE_CLASSIFICATION

ASSETS: Final = Path("assets")
FOLDER: Final = Path("runs/privacy")
TOKENS: Final = 24
DECAY: Final = 0.8
"""Of the learning rate, a round: the demo's."""
MICRO_BATCH: Final = 64
TESTED: Final = 1000
"""Test examples, the first of 2 189."""
EPSILONS: Final = (8.0, 3.0, 1.0)
UNFINISHED: Final = 3
HIDDEN: Final = "hidden.safetensors"
"""What lies below, of every text."""
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training."""

    epsilon: float
    """0: without a budget."""
    rounds: int
    steps: int
    """A round."""
    batch_size: int
    learning_rate: float
    max_gradient_norm: float
    delta: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join(f"{key}{value:g}" for key, value in asdict(self).items())


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Data, model and where the model starts."""

    examples: Examples
    test: Examples
    model: AdaptedModel
    encoder: Encoder

    @classmethod
    def load(cls, kept: Path) -> "Bench":
        """Args: kept: file of what lies below, made if it is missing."""
        data = fetch(REUTERS, ASSETS)
        model = model_of(fetch(MINILM, ASSETS))
        bench = cls(
            examples=read(data / "reuters-r8-train.tab"),
            test=read(data / "reuters-r8-test.tab").select(range(TESTED)),
            model=model,
            encoder=Encoder(model.tokenizer, TOKENS, append_end=False),
        )
        if kept.exists():
            Lower.load(kept)
        else:
            bench._pass_once()
            Lower.save(kept)
        return bench

    def _pass_once(self) -> None:
        """Computes what lies below for every text, those of a length together."""
        module: Any = self.model.module
        lower = module.base_model.model.bert.embeddings
        for examples in (self.examples, self.test):
            order = sorted(range(len(examples)), key=lambda i: len(examples.texts[i]))
            for chosen in parts_of(order, MICRO_BATCH):
                lower(self.encoder.batch(examples.select(list(chosen))).input_ids)

    def run(self, setting: Setting, state: AgentState, most: int) -> dict[str, Any] | None:
        """Trains, from the last round that is written down, and tests on everything.

        Args: most: Rounds after which it breaks off, with None.
        """
        rate, steps = min(1.0, setting.batch_size / len(self.examples)), setting.rounds * setting.steps
        noise = noise_for(setting.epsilon, setting.delta, rate, steps) if setting.epsilon else 0.0
        mechanism = Mechanism(
            noise_multiplier=noise, sample_rate=rate, max_gradient_norm=setting.max_gradient_norm
        )
        self.model.initialise(Obfuscation(bytes(32), 1))
        done = 0
        if (saved := state.applied()) is not None:
            done = int(saved[0]["round"])
            self.model.load(saved[1])
        for number in range(done + 1, setting.rounds + 1):
            if number > done + most:
                return None
            self._round(setting, mechanism, number)
            state.save_applied({"round": str(number)}, self.model.weights())
            print(f"{setting.name}: round {number}", flush=True)
        found = evaluate(self.model, self.encoder, self.test, lambda _: None)
        spent = epsilon_of(((noise, rate, steps),), setting.delta) if setting.epsilon else None
        return asdict(setting) | {
            "noise_multiplier": noise,
            "spent": spent,
            "correct": found.correct,
            "count": found.count,
        }

    def _round(self, setting: Setting, mechanism: Mechanism, number: int) -> None:
        seed = 1000 * setting.seed + number
        rate = setting.learning_rate * DECAY ** (number - 1)
        run = TrainingRun(
            rates=[rate] * setting.steps,
            batch_size=setting.batch_size,
            seed=seed,
            micro_batch=MICRO_BATCH,
        )
        if not setting.epsilon:
            train(self.model, self.encoder, self.examples, run, lambda _: None)
            return
        randomness = Randomness(seed.to_bytes(32, "big"))
        train_privately(self.model, self.encoder, self.examples, run, mechanism, lambda _: None, randomness)


@app.command()
def compare(
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Budgets, 0 for none; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a round.")] = 12,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step, on average.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 0.02,
    clip: Annotated[float, typer.Option(help="Norm that each example's gradient is scaled down to.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Of every budget; below 1 / 5485.")] = 1e-5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where trainings are written down.")] = FOLDER,
    at_most: Annotated[
        int, typer.Option(min=1, help="Rounds after which a training breaks off, with exit status 3.")
    ] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at once, one core each.")] = 2,
) -> None:
    """Trains the demo's classifier without a budget and with each, unless that is written down; prints all."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [
        Setting(
            epsilon=epsilon,
            rounds=rounds,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_gradient_norm=clip if epsilon else 0.0,
            delta=delta,
            seed=seed,
        )
        for seed in range(seeds)
        for epsilon in ((*EPSILONS, 0.0) if epsilons is None else epsilons)
    ]
    if not _all_trained(asked, folder, at_most, workers):
        raise typer.Exit(UNFINISHED)
    written = {w["name"]: w for w in _written(folder)}
    Console().print(_table(list(written.values())))
    draw([written[setting.name] for setting in asked], folder / "accuracy.png")


def _all_trained(settings: Sequence[Setting], folder: Path, at_most: int, workers: int) -> bool:
    """Trains what is not written down, side by side; whether none broke off."""
    missing = [setting for setting in settings if not _file(folder, setting).exists()]
    if not missing:
        return True
    with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn")) as pool:
        pool.submit(_bench, folder).result()  # by one process, for all
        return all(pool.map(partial(_trained, folder=folder, at_most=at_most), missing))


def _trained(setting: Setting, *, folder: Path, at_most: int) -> bool:
    """Trains and writes down, in a process of a pool; whether it came to its end."""
    torch.set_num_threads(1)
    state = AgentState(folder / "states" / setting.name)
    try:
        found = _bench(folder).run(setting, state, at_most)
    finally:
        state.close()
    if found is not None:
        _file(folder, setting).write_text(json.dumps(found, indent=1))
    return found is not None


@lru_cache(maxsize=1)
def _bench(folder: Path) -> Bench:
    return Bench.load(folder / HIDDEN)


def _file(folder: Path, setting: Setting) -> Path:
    return folder / f"{setting.name}.json"


@app.command()
def plot(
    picture: Annotated[Path, typer.Argument(help="PNG file to write.")],
    folder: Annotated[Path, typer.Option(help="Where trainings are written down.")] = FOLDER,
) -> None:
    """Draws accuracy against epsilon, of the trainings that are written down."""
    draw(list(_written(folder)), picture)


def draw(trainings: Sequence[dict[str, Any]], picture: Path, what: str = "adapters and head") -> None:
    """Accuracy against epsilon; means over trainings of a budget. Args: what: is trained."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra of its own

    found: dict[float, list[float]] = {}
    for training in trainings:
        share = 100 * training["correct"] / training["count"]
        found.setdefault(training["epsilon"], []).append(share)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    budgets = sorted(epsilon for epsilon in found if epsilon)
    means = [mean(found[epsilon]) for epsilon in budgets]
    axes.plot(range(len(budgets)), means, "o-", label=f"DP-SGD, {what}")
    for place, value in enumerate(means):
        axes.annotate(f"{value:.1f}", (place, value), (0, -16), textcoords="offset points", ha="center")
    if plain := found.get(0.0):
        axes.axhline(mean(plain), linestyle="--", color="gray", label=f"without: {mean(plain):.1f}")
    axes.set_xticks(range(len(budgets)), [f"{epsilon:g}" for epsilon in budgets])
    axes.set(
        xlabel="epsilon at delta = 1e-5",
        ylabel="accuracy, %",
        ylim=(40, 100),
        xlim=(-0.3, len(budgets) - 0.7),
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=150)


def _written(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("epsilon*.json")):
        yield {"name": path.stem, **json.loads(path.read_text())}


def _grouped(trainings: Sequence[dict[str, Any]]) -> dict[tuple[float, ...], list[dict[str, Any]]]:
    groups: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    keys = ("epsilon", "rounds", "steps", "batch_size", "learning_rate", "max_gradient_norm")
    for training in trainings:
        groups.setdefault(tuple(training[key] for key in keys), []).append(training)
    return groups


def _table(trainings: Sequence[dict[str, Any]]) -> Table:
    table = Table("epsilon", "steps", "batch", "rate", "clip", "noise", "accuracy", "trainings")
    for (epsilon, rounds, steps, batch, rate, clip), group in sorted(_grouped(trainings).items()):
        accuracies = [training["correct"] / training["count"] for training in group]
        spread = f" ± {stdev(accuracies):.1%}" if len(group) > 1 else ""
        table.add_row(
            f"{epsilon:g}" if epsilon else "none",
            f"{rounds:g} x {steps:g}",
            f"{batch:g}",
            f"{rate:g}",
            f"{clip:g}" if epsilon else "",
            f"{group[0]['noise_multiplier']:.2f}" if epsilon else "",
            f"{mean(accuracies):.1%}{spread}",
            f"{len(group)}",
        )
    return table


class Lower(torch.nn.Module):
    """The layers below the adapted one, in place of a model's embeddings: frozen, so each text passes them once."""

    known: Final[dict[tuple[int, ...], torch.Tensor]] = {}
    """Hidden states by token ids, of this process: there is one base model."""

    @classmethod
    def save(cls, path: Path) -> None:
        """Writes what is known, one text after the other."""
        ids = torch.tensor([i for row in cls.known for i in row], dtype=torch.int32)
        lengths = torch.tensor([len(row) for row in cls.known], dtype=torch.int32)
        states = torch.cat(list(cls.known.values()))
        draft = path.with_suffix(".draft")
        save_file({"ids": ids, "lengths": lengths, "states": states}, draft)
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> None:
        """Reads what `save` wrote."""
        kept = load_file(path)
        lengths = kept["lengths"].tolist()
        parts = (torch.split(kept[name], lengths) for name in ("ids", "states"))
        cls.known.update({tuple(ids.tolist()): states for ids, states in zip(*parts, strict=True)})

    def __init__(self, bert: Any, padding: int) -> None:  # noqa: ANN401 - transformers' BertModel
        super().__init__()
        self.word_embeddings = bert.embeddings.word_embeddings
        self._bert = [bert.eval().requires_grad_(requires_grad=False)]  # in a list: nobody adapts it
        self._padding = padding

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        """Hidden states [texts, tokens, width] of token ids [texts, tokens]; zero behind a text's end."""
        rows = [tuple(int(i) for i in row if i != self._padding) for row in input_ids]
        unknown = [row for row in rows if row not in self.known]
        if unknown:
            mask = input_ids != self._padding
            with torch.no_grad():
                hidden = self._bert[0](input_ids, attention_mask=mask).last_hidden_state
            self.known.update({row: states[: len(row)] for row, states in zip(rows, hidden, strict=True)})
        width = input_ids.shape[1]
        return torch.stack([torch.nn.functional.pad(self.known[r], (0, 0, 0, width - len(r))) for r in rows])


def read(path: Path) -> Examples:
    """The examples of a tab file."""
    rows = read_tab(path)
    return Examples(tuple(row.text for row in rows), tuple(LABELS.index(row.label) for row in rows))


def model_of(folder: Path, rank: int = LoraSettings().rank) -> AdaptedModel:
    """The demo's model with adapters in its last layer alone; alpha is twice the rank."""
    checkpoint = load_checkpoint(str(folder), SEQUENCE_CLASSIFICATION, LABELS)
    bert = checkpoint.model.bert
    lower = copy.deepcopy(bert)
    lower.encoder.layer = lower.encoder.layer[:-1]
    bert.encoder.layer = bert.encoder.layer[-1:]
    bert.embeddings = Lower(lower, checkpoint.tokenizer.pad_token_id)
    return AdaptedModel(
        checkpoint,
        task=SEQUENCE_CLASSIFICATION,
        target_modules=("query", "value"),
        lora=LoraSettings(rank=rank, alpha=2 * rank),
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    app()
