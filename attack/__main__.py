"""`python -m attack`: runs federations, captures what servers store, attacks it, prints what came back."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import structlog
import torch
import typer
from rich.console import Console

from attack import assets, experiments, insiders, simulated
from attack.capture import Tap
from attack.findings import Finding, problems
from attack.public import Public
from attack.report import table, write
from attack.stage import SETTINGS, Client, Performance, Scene, perform
from examples.reuters.split import LABELS, Example
from shelora.cli.cluster import LocalCluster
from shelora.cli.supervision import interruptible
from shelora.errors import DomainError

FELLOWS: Final = (2, 3, 4, 8, 16)
OUTSIDERS: Final = 24
_CAUSAL: Final[dict[str, Any]] = {
    "task": "causal-lm",
    "max_tokens": 32,
    "learning_rate": 0.002,
    "modules": ("q_proj", "v_proj"),
}
_CLASSIFIER: Final[dict[str, Any]] = {
    "task": "sequence-classification",
    "max_tokens": 32,
    "learning_rate": 0.003,
    "modules": ("query", "value"),
    "rounds": 1,
}
console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A federation and what is tried on it."""

    scene: Scene
    data: str
    attacks: Callable[[Performance, Public, str], list[Finding]]


def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/attack"),
    downloads: Annotated[Path, typer.Option(help="Where models and data lie, or are fetched to.")] = Path(
        "assets"
    ),
    only: Annotated[str, typer.Option(help="Only cases whose name holds this.")] = "",
    seed: Annotated[int, typer.Option(help="Draws the clients' texts.")] = 0,
) -> None:
    """Attacks the messages of real federations in every protection mode and prints a table.

    Exits with 1 if an attack that must succeed on unprotected messages does not (the attack is broken then), or if one
    on servers' messages does better than chance in a mode that promises that none does.
    """
    _quiet()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with interruptible():
            findings = _findings(folder, downloads, only, seed)
    except DomainError as error:
        console.print(f"the run failed: {error.reason}\n{error.message}", markup=False, highlight=False)
        sys.exit(1)
    console.print(table(findings))
    write(findings, folder)
    found = problems(findings)
    for problem in found:
        console.print(problem, markup=False, highlight=False)
    sys.exit(1 if found else 0)


def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    torch.set_num_threads(1)


def _findings(folder: Path, downloads: Path, only: str, seed: int) -> list[Finding]:
    models = {"causal-lm": assets.smollm2(downloads), "sequence-classification": assets.minilm(downloads)}
    cases = [case for case in _cases(downloads, seed) if only in case.scene.name]
    findings = list(simulated.findings(models["sequence-classification"], downloads)) if not only else []
    public: dict[str, Public] = {}
    cluster = LocalCluster(folder / "cluster", fixed_ports=False, settings=SETTINGS)
    with cluster, Tap(folder / "cluster" / "redis") as tap:
        for number, case in enumerate(cases, 1):
            started = time.monotonic()
            model = models[case.scene.task]
            performance = perform(cluster, tap, case.scene, model, folder / "agents")
            ran = time.monotonic() - started
            if case.scene.task not in public:
                public[case.scene.task] = Public(case.scene, model)
            public[case.scene.task].scene = case.scene
            findings += case.attacks(performance, public[case.scene.task], case.data)
            attacked = time.monotonic() - started - ran
            line = f"{number}/{len(cases)} {case.scene.name}: ran {ran:.0f} s, attacked {attacked:.0f} s"
            console.print(line, highlight=False)
            shutil.rmtree(performance.homes, ignore_errors=True)
    return findings


def _cases(downloads: Path, seed: int) -> Iterator[Case]:
    everything = [e for e in assets.reuters(downloads) if len(e.text) >= 25]
    topics = [e for e in everything if len(e.text) <= 140]
    snippets = [e for e in assets.tomatoes(downloads) if 25 <= len(e.text) <= 70]
    rng = np.random.default_rng(seed)
    rng.shuffle(topics)
    rng.shuffle(snippets)
    private = [Example(text, "") for text in assets.PRIVATE]
    for mode in MODES:
        yield from _causal_cases(mode, private, snippets, topics)
        yield from _classifier_cases(mode, topics, everything)
    yield _fellows(snippets, steps=1)


MODES: Final = ("none", "selective", "complete")


def _causal_cases(
    mode: str, private: list[Example], snippets: list[Example], topics: list[Example]
) -> Iterator[Case]:
    """Text: sentences by decoding and by spans, at one step; membership at more."""

    def text(performance: Performance, public: Public, data: str) -> list[Finding]:
        found = [experiments.decoded(performance, public, data, control=mode in {"none", "selective"})]
        if mode == "complete":
            return found
        secrets = insiders.secrets_of(performance, performance.scene.clients[0].name)
        who = "server" if mode == "none" else "server with one colluding client"
        return [*found, experiments.spanned(performance, public, data, secrets, who, control=True)]

    for data, texts in (("private sentences", private), ("Rotten Tomatoes", snippets), ("R8", topics)):
        count = 3 if data == "private sentences" else 2
        clients = _clients([[example] for example in texts[:count]], rank=32)
        yield Case(
            scene=_causal(f"text-{mode}-{data.split()[0].lower()}", mode, clients, 1, 1),
            data=data,
            attacks=text,
        )
    for batch, steps in ((1, 1), (4, 1), (4, 10)):
        clients = _clients(_cut(topics[200:], 3, batch), rank=8)
        scene = _causal(f"member-{mode}-{batch}-{steps}", mode, clients, steps, batch)
        yield Case(scene=scene, data="R8", attacks=_membership(topics, control=mode != "complete"))


def _classifier_cases(mode: str, topics: list[Example], everything: list[Example]) -> Iterator[Case]:
    for batch, steps in ((1, 1), (4, 10)):
        clients = _clients(_cut(topics[400:], 8, batch), rank=8)
        scene = Scene(
            name=f"class-{mode}-{batch}-{steps}",
            mode=mode,
            clients=clients,
            steps=steps,
            batch=batch,
            classes=LABELS,
            **_CLASSIFIER,
        )
        yield Case(
            scene=scene, data="R8", attacks=_membership(topics, control=mode != "complete" and steps == 1)
        )
    clients = _clients(_uneven(everything, 12, 16), rank=8)
    scene = Scene(
        name=f"labels-{mode}", mode=mode, clients=clients, steps=5, batch=8, classes=LABELS, **_CLASSIFIER
    )
    yield Case(
        scene=scene,
        data="R8, Dirichlet 0.3",
        attacks=lambda p, public, data: [experiments.labels(p, public, data)],
    )


def _membership(
    topics: list[Example], *, control: bool
) -> Callable[[Performance, Public, str], list[Finding]]:
    outsiders = [example.text for example in topics[-OUTSIDERS:]]
    return lambda p, public, data: [experiments.membership(p, public, data, outsiders, control=control)]


def _fellows(snippets: list[Example], steps: int) -> Case:
    def attacks(performance: Performance, public: Public, data: str) -> list[Finding]:
        secrets = insiders.secrets_of(performance, performance.scene.clients[0].name)
        return experiments.fellow(performance, public, data, secrets, FELLOWS)

    clients = _clients([[example] for example in snippets[100 : 100 + max(FELLOWS)]], rank=32)
    return Case(scene=_causal("fellows", "none", clients, steps, 1), data="Rotten Tomatoes", attacks=attacks)


def _causal(name: str, mode: str, clients: tuple[Client, ...], steps: int, batch: int) -> Scene:
    return Scene(name=name, mode=mode, clients=clients, steps=steps, batch=batch, rounds=1, **_CAUSAL)


def _clients(parts: Sequence[Sequence[Example]], rank: int) -> tuple[Client, ...]:
    return tuple(
        Client(
            name=f"client-{index:02d}",
            texts=tuple(e.text for e in part),
            labels=tuple(e.label for e in part),
            rank=rank,
            alpha=float(rank),
        )
        for index, part in enumerate(parts)
    )


def _cut(examples: Sequence[Example], clients: int, each: int) -> list[Sequence[Example]]:
    return [examples[i * each : (i + 1) * each] for i in range(clients)]


def _uneven(examples: Sequence[Example], clients: int, each: int) -> list[list[Example]]:
    """Clients whose labels are drawn from Dirichlet(0.3)."""
    rng = np.random.default_rng(1)
    by_label = {label: [e for e in examples if e.label == label] for label in LABELS}
    parts = []
    for shares in rng.dirichlet([0.3] * len(LABELS), clients):
        counts = rng.multinomial(each, shares)
        chosen = [
            by_label[label][i]
            for label, count in zip(LABELS, counts, strict=True)
            for i in rng.integers(0, len(by_label[label]), count)
        ]
        parts.append(chosen)
    return parts


if __name__ == "__main__":
    typer.run(main)
