"""`python -m attack`: runs federations, captures what servers store, attacks it, prints what came back."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
THREADS: Final = 2
"""Of an attack; agents have one each."""
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
}
console = Console()


Attacks = Callable[[Performance, Public], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A federation and what is tried on it."""

    scene: Scene
    attacks: Attacks


def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/attack"),
    downloads: Annotated[Path, typer.Option(help="Where models and data lie, or are fetched to.")] = Path(
        "assets"
    ),
    only: Annotated[str, typer.Option(help="Only cases whose name holds this.")] = "",
    seed: Annotated[int, typer.Option(help="Draws the clients' texts.")] = 0,
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="More batches and steps, and small budgets: an hour.")
    ] = False,
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
            findings = _findings(folder, downloads, only, _cases(downloads, seed, everything=everything))
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


def _findings(folder: Path, downloads: Path, only: str, every: Iterable[Case]) -> list[Finding]:
    models = {"causal-lm": assets.smollm2(downloads), "sequence-classification": assets.minilm(downloads)}
    cases = [case for case in every if only in case.scene.name]
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
            torch.set_num_threads(THREADS)
            findings += case.attacks(performance, public[case.scene.task])
            attacked = time.monotonic() - started - ran
            line = f"{number}/{len(cases)} {case.scene.name}: ran {ran:.0f} s, attacked {attacked:.0f} s"
            console.print(line, highlight=False)
            shutil.rmtree(performance.homes, ignore_errors=True)
    return findings


def _cases(downloads: Path, seed: int, *, everything: bool) -> Iterator[Case]:
    news = [e for e in assets.reuters(downloads) if len(e.text) >= SHORTEST]
    topics = [e for e in news if len(e.text) <= LONGEST_TOPIC]
    snippets = [e for e in assets.tomatoes(downloads) if SHORTEST <= len(e.text) <= LONGEST_SNIPPET]
    rng = np.random.default_rng(seed)
    rng.shuffle(topics)
    rng.shuffle(snippets)
    for mode in (NONE, PUBLISHED, SELECTIVE, COMPLETE):
        yield _texts(mode, snippets, topics)
        if mode is not PUBLISHED or everything:  # of B in 32 bits, as under `none`
            yield from _members(mode, topics, everything=everything)
            yield from _classifiers(mode, topics, news, everything=everything)
    yield _fellows(snippets, 10)
    yield _colluding(snippets)
    if everything:
        yield _fellows(snippets, 1)
        yield from _budgets(topics)


@dataclass(frozen=True, slots=True)
class Mode:
    """A mode of protection, as a federation asks for it."""

    name: str
    mode: str
    clear_bits: int = 16

    @property
    def leaks(self) -> bool:
        """Whether anything is in the clear."""
        return self.mode != "complete"


NONE: Final = Mode("none", "none")
PUBLISHED: Final = Mode("published", "selective", 32)
SELECTIVE: Final = Mode("selective", "selective")
COMPLETE: Final = Mode("complete", "complete")
SHORTEST: Final = 25
LONGEST_SNIPPET: Final = 70
LONGEST_TOPIC: Final = 140
"""Characters."""


def _texts(mode: Mode, snippets: list[Example], topics: list[Example]) -> Case:
    """Sentences, one a client: by decoding, by spans, and by columns of A in the second round."""
    exact = mode.leaks and mode is not SELECTIVE
    sources = (
        ("private sentences", [Example(text, "") for text in assets.PRIVATE]),
        ("Rotten Tomatoes", snippets[:2]),
        ("R8", topics[:2]),
    )
    clients = tuple(
        replace(client, name=f"{data[:2].lower()}-{client.name}", data=data)
        for data, examples in sources
        for client in _clients([[example] for example in examples], 32)
    )
    scene = _causal(f"text-{mode.name}", mode, clients, 1, 1, rounds=2 if mode is NONE else 1)

    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        most = len(assets.PRIVATE) if mode in {PUBLISHED, SELECTIVE} else 1
        yield from experiments.decoded(performance, public, most=most, control=exact)
        if mode.leaks:
            secrets = insiders.secrets_of(performance, scene.clients[0].name)
            who = "server" if mode is NONE else KNOWS_A
            yield experiments.spanned(performance, public, secrets, who, control=exact)
        if mode is NONE:
            yield from experiments.by_budget(performance, public)
            yield experiments.unmixed(performance, public)

    return Case(scene=scene, attacks=attacks)


KNOWS_A: Final = "server that knows the initial A (public in the authors' code), or with one colluding client"


def _members(mode: Mode, topics: list[Example], *, everything: bool) -> Iterator[Case]:
    for batch, steps in ((1, 1), (4, 1), (4, 10), *(((16, 1), (16, 10), (1, 10)) if everything else ())):
        clients = _clients(_cut(topics[200:], 3, batch), rank=8, data="R8")
        scene = _causal(f"member-{mode.name}-{batch}-{steps}", mode, clients, steps, batch)
        yield Case(
            scene=scene,
            attacks=_membership(topics, control=mode is NONE and steps == batch == 1, basis=mode is NONE),
        )


def _classifiers(
    mode: Mode, topics: list[Example], news: list[Example], *, everything: bool
) -> Iterator[Case]:
    for batch, steps in ((1, 1), (4, 10), *(((4, 1), (16, 1), (16, 10)) if everything else ())):
        clients = _clients(_cut(topics[400:], 8, batch), rank=8, data="R8")
        scene = _classifier(f"class-{mode.name}-{batch}-{steps}", mode, clients, steps, batch)
        yield Case(
            scene=scene,
            attacks=_membership(topics, control=mode is NONE and steps == batch == 1, basis=mode is NONE),
        )
    clients = _clients(_uneven(news, 12, 16), rank=8, data="R8, Dirichlet 0.3")
    forms = (False, True) if mode is NONE else (False,)
    yield Case(
        scene=_classifier(f"labels-{mode.name}", mode, clients, 5, 8),
        attacks=lambda p, public: [experiments.labels(p, public, basis=basis) for basis in forms],
    )


def _membership(topics: list[Example], *, control: bool, basis: bool) -> Attacks:
    """Args: basis: also from an orthonormal basis of B, by the same capture."""
    outsiders = [example.text for example in topics[-OUTSIDERS:]]

    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        yield experiments.membership(performance, public, outsiders, control=control)
        if basis:
            yield experiments.membership(performance, public, outsiders, basis=True)

    return attacks


def _fellows(snippets: list[Example], steps: int) -> Case:
    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        secrets = insiders.secrets_of(performance, performance.scene.clients[0].name)
        yield from experiments.fellow(performance, public, secrets, FELLOWS)

    clients = _clients([[e] for e in snippets[100 : 100 + max(FELLOWS)]], 16, data="Rotten Tomatoes")
    return Case(scene=_causal(f"fellows-{steps}", NONE, clients, steps, 1), attacks=attacks)


def _colluding(snippets: list[Example]) -> Case:
    def attacks(performance: Performance, public: Public) -> list[Finding]:
        secrets = insiders.secrets_of(performance, performance.scene.clients[0].name)
        return [experiments.colluding(performance, public, secrets)]

    clients = _clients([[e] for e in snippets[100:103]], 16, data="Rotten Tomatoes")
    return Case(scene=_causal("colluding-complete", COMPLETE, clients, 10, 1), attacks=attacks)


def _budgets(topics: list[Example]) -> Iterator[Case]:
    """Federations whose clients really encrypt less."""
    for budget in (0.001, 0.1):
        clients = tuple(replace(c, budget=budget) for c in _clients(_cut(topics[200:], 3, 1), 8, data="R8"))
        scene = _causal(f"budget-{budget:g}", SELECTIVE, clients, 1, 1)
        yield Case(scene=scene, attacks=_membership(topics, control=False, basis=False))


def _causal(
    name: str, mode: Mode, clients: tuple[Client, ...], steps: int, batch: int, rounds: int = 1
) -> Scene:
    terms: dict[str, Any] = {"mode": mode.mode, "clear_bits": mode.clear_bits, "rounds": rounds} | _CAUSAL
    return Scene(name=name, clients=clients, steps=steps, batch=batch, **terms)


def _classifier(name: str, mode: Mode, clients: tuple[Client, ...], steps: int, batch: int) -> Scene:
    terms: dict[str, Any] = {"mode": mode.mode, "clear_bits": mode.clear_bits, "rounds": 1} | _CLASSIFIER
    return Scene(name=name, clients=clients, steps=steps, batch=batch, classes=LABELS, **terms)


def _clients(parts: Sequence[Sequence[Example]], rank: int, data: str = "") -> tuple[Client, ...]:
    return tuple(
        Client(
            name=f"client-{index:02d}",
            texts=tuple(e.text for e in part),
            labels=tuple(e.label for e in part),
            rank=rank,
            alpha=float(rank),
            data=data,
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
