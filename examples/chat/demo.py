"""The chat demo: three agents with questions of other topics tune SmolLM2-135M-Instruct together, in complete mode.

    python -m examples.chat.demo

Fetches model and questions, starts a cluster and the agents, and then trains each agent alone for as many steps.
Leaves summary, plot, adapter and samples in runs/chat; fails unless the federation's perplexity on held-out answers of
all topics is below that of every agent alone.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from examples.agents import HOME, Nowhere, Servers, agent_file
from examples.alone import evaluated, prepared, train_alone
from examples.chat.data import CORPUS, TOPICS, write_agents
from examples.local import ASSETS, Meter, ends_well, finish, run_federation
from examples.report import PERPLEXITY, plot_rounds
from examples.reuters.assets import fetch
from examples.smollm2 import smollm2
from shelora.cli.supervision import clear
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.terminal import CommandLine, Records, Terminal

HERE: Final = Path(__file__).parent
RANK, ALPHA = 8, 16
BEFORE: Final = "before training"
WRITER: Final = next(iter(TOPICS))
"""The agent whose samples are shown."""
PROMPTS: Final = (
    "what is a linked list?",
    "What is the capital of Australia?",
    "you are impatient",
)
"""One of each topic."""

console = Terminal()
app = CommandLine(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/chat"),
) -> None:
    """Run a federation of three agents whose questions and answers are of other topics."""
    with ends_well(console):
        run(folder)


def run(folder: Path) -> dict[str, Any]:
    """The federation, then each agent alone. Returns the summary. Raises: DomainError unless the federation is best."""
    meter = Meter()
    with console.stages("fetching questions and model (about 100 MB the first time)") as tell:
        source = fetch(CORPUS, ASSETS)
        tell("unpacking the model")
        model = smollm2(ASSETS)
    clear(folder)
    for agent, (train, test) in write_agents(source, folder / HOME).items():
        console.say(
            f"{agent}: {train} questions of {' and '.join(TOPICS[agent])}, {test} of all topics for tests"
        )
    spec = FederationSpec.from_yaml(HERE / "federation.yaml")
    agents = {name: partial(agent_config, name=name, model=model) for name in TOPICS}
    federation = run_federation(spec, agents, folder, console)
    with console.stages("training each agent alone, for comparison") as tell:
        others = perplexities(folder, model, spec, tell)
    ran = {"federation": spec.model_dump(mode="json"), "agents": TOPICS}
    summary = finish(federation, ran, folder, meter.spent(), console, adapter_of=WRITER)
    perplexity = PERPLEXITY.value(summary["rounds"][-1])
    summary |= {"final_test_perplexity": perplexity, "other_test_perplexities": others}
    summary["samples"] = show_samples(folder / HOME / WRITER / "state" / "samples", spec.round.rounds)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    plot_rounds(summary, folder / "rounds.png", PERPLEXITY, {name: others[name] for name in TOPICS})
    show_perplexities(perplexity, others)
    console.say(
        f"{summary['wall_s']:.0f} s · left in {folder}: summary.json, rounds.png, report.html, adapter/"
    )
    require_best(perplexity, others)
    return summary


def agent_config(servers: Servers, *, name: str, model: Path) -> dict[str, Any]:
    """The content of an agent's YAML file; paths are relative to it."""
    file = agent_file(servers, federation="assistant", name=name, model=model) | {
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "lora": {"rank": RANK, "alpha": ALPHA},
    }
    return file | ({"samples": {"prompts": list(PROMPTS), "max_new_tokens": 24}} if name == WRITER else {})


def perplexities(folder: Path, model: Path, spec: FederationSpec, tell: Any) -> dict[str, float]:  # noqa: ANN401 - of stages
    """On the held-out answers of all topics: before any training, and of each agent alone after as many steps."""
    found: dict[str, float] = {}
    for name in TOPICS:
        tell(f"training {name} alone")
        file = agent_config(Nowhere(), name=name, model=model)
        data = {"train": f"../../{HOME}/{name}/train.jsonl", "test": f"../../{HOME}/test.jsonl"}
        file |= {"data": data, "samples": {}, "resources": {"threads": 0}}
        ready = prepared(file, folder / "alone" / name / "agent.yaml", spec)
        if BEFORE not in found:
            found[BEFORE] = math.exp(evaluated(ready).loss)
        train_alone(ready, spec)
        found[name] = math.exp(evaluated(ready).loss)
    return found


def show_perplexities(federated: float, others: Mapping[str, float]) -> None:
    """A row for each model."""
    table = Records("model", "perplexity", title="\nheld-out answers of all topics", numbers=["perplexity"])
    for name, value in others.items():
        table.add(name if name == BEFORE else f"{name} alone", f"{value:.2f}")
    table.add("the federation", f"{federated:.2f}")
    console.print(table)


def show_samples(folder: Path, rounds: int) -> list[dict[str, str]]:
    """What the model wrote before the first round and after the last one, to each prompt."""
    before, after = (written(folder / f"round-{number:04}.json") for number in (0, rounds))
    pairs = [side_by_side(*both) for both in zip(before, after, strict=True)]
    for pair in pairs:
        for what, text in pair.items():
            console.say(f"{what:>7}  {' '.join(text.split())}")
        console.say("")
    return pairs


def written(path: Path) -> list[dict[str, str]]:
    """The samples of a round: prompt and text."""
    samples: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["samples"]
    return samples


def side_by_side(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """The two answers to a prompt."""
    return {"prompt": before["prompt"], "before": before["text"], "after": after["text"]}


def require_best(federated: float, others: Mapping[str, float]) -> None:
    """Raises: DomainError unless the federation's perplexity is below that of every other model."""
    better = [name for name, value in others.items() if value <= federated]
    if better:
        raise DomainError(
            Reason.INTERNAL, f"the federation's perplexity is not below that of: {', '.join(better)}"
        )


if __name__ == "__main__":
    app()
