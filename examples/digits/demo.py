"""The vision demo: three agents that see other digits each learn all ten, in complete mode.

    python -m examples.digits.demo

Fetches the images, trains a small base model on public ones, starts a cluster and the agents, and compares the result
with one model trained on everything. Leaves summary, plot and adapter in runs/vision; fails if the result is more than
two points below.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from examples.agents import HOME, Nowhere, Servers, agent_file
from examples.alone import evaluated, prepared, train_alone
from examples.digits.data import CLASSES, DIGITS, read_digits, write_agents, write_base, write_pooled
from examples.local import ASSETS, Meter, ends_well, finish, run_federation
from examples.report import plot_rounds
from examples.reuters.assets import fetch
from shelora.cli.supervision import clear
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.terminal import CommandLine, Terminal

HERE: Final = Path(__file__).parent
RANK, ALPHA = 8, 16
POINTS: Final = 0.02
"""Most by which the federation's accuracy may lie below that of pooled training."""

console = Terminal()
app = CommandLine(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/vision"),
) -> None:
    """Run a federation of three agents on handwritten digits, none of which sees all of them."""
    with ends_well(console):
        run(folder)


def run(folder: Path) -> dict[str, Any]:
    """The federation, then pooled training. Returns the summary. Raises: DomainError if it is too far behind."""
    meter = Meter()
    with console.stages("fetching images (about 9 MB the first time)") as tell:
        digits, model = read_digits(fetch(DIGITS, ASSETS)), ASSETS / "small-vit"
        tell("training a base model on 300 public digits")
        write_base(digits, model)
    clear(folder)
    counts = write_agents(digits, folder / HOME)
    write_pooled(digits, folder / "pooled")
    for agent, classes in CLASSES.items():
        console.say(f"{agent}: {counts[agent]} images of {', '.join(map(str, classes))}")
    spec = FederationSpec.from_yaml(HERE / "federation.yaml")
    agents = {name: partial(agent_config, name=name, model=model) for name in CLASSES}
    federation = run_federation(spec, agents, folder, console)
    with console.stages("training one model on everything, for comparison"):
        pooled = pooled_accuracy(folder, model, spec)
    ran = {"federation": spec.model_dump(mode="json"), "agents": CLASSES}
    summary = finish(federation, ran, folder, meter.spent(), console, adapter_of=next(iter(CLASSES)))
    summary["pooled_test_accuracy"] = pooled
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_rounds(summary, folder / "rounds.png", beside={"one model trained on everything": pooled})
    accuracy = summary["final_test_accuracy"]
    console.say(
        f"accuracy on {summary['final_test_examples']} digits of all classes: the federation {accuracy:.1%}, one model "
        f"trained on everything {pooled:.1%} · {summary['wall_s']:.0f} s\n"
        f"left in {folder}: summary.json, rounds.png, report.html, adapter/"
    )
    require_close(accuracy, pooled)
    return summary


def require_close(accuracy: float, pooled: float) -> None:
    """Raises: DomainError if the federation is more than two points behind pooled training."""
    if accuracy < pooled - POINTS:
        behind = 100 * (pooled - accuracy)
        raise DomainError(Reason.INTERNAL, f"the federation is {behind:.1f} points behind pooled training")


def agent_config(servers: Servers, *, name: str, model: Path) -> dict[str, Any]:
    """The content of an agent's YAML file; paths are relative to it."""
    return agent_file(servers, federation="digits", name=name, model=model) | {
        "data": {"train": "train", "test": "test"},
        "lora": {"rank": RANK, "alpha": ALPHA},
    }


def pooled_accuracy(folder: Path, model: Path, spec: FederationSpec) -> float:
    """Of one model that is trained on all images, for as many steps at the same rates as each agent trained."""
    file = agent_config(Nowhere(), name="pooled", model=model)
    ready = prepared(file, folder / "pooled" / "agent.yaml", spec)
    train_alone(ready, spec)
    found = evaluated(ready)
    return found.correct / found.count


if __name__ == "__main__":
    app()
