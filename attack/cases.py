"""The federations that `make attack` runs, and what is tried on each.

Clients of one federation have batches of different sizes: one that holds fewer examples than the batch has room for
takes all that it holds. Only those layers of causal models are adapted that the attacks look at, the first and the
last three: with B = 0 the gradients of the first step are the same, and most of what is encrypted and stored is not
paid for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attack import assets, beside, experiments, malicious, simulated
from attack.findings import Finding
from attack.public import Public
from attack.stage import Client, Performance, Scene
from examples.reuters.split import LABELS, Example
from shelora.strategies.registry import strategy_of

FELLOWS: Final = (2, 3, 4, 8, 16)
NOISED: Final = (4, 16)
"""Members, again under client privacy."""
DECEIVED: Final = 2
"""Members of the federation whose first client is then the victim of malicious servers."""
EPSILON: Final = 8.0
DELTA: Final = 1e-5
"""Of client privacy, for one sum."""
BUDGETS: Final = (0.001, 0.1)
"""Of `selective`, beside all."""
OUTSIDERS: Final = 24
SHORTEST: Final = 25
LONGEST_SNIPPET: Final = 70
LONGEST_TOPIC: Final = 140
"""Characters."""
BATCH: Final = 16
FEW: Final = 4
"""Examples of a batch whose mean loss still names it."""
BRANCHES: Final = 20
"""Clients whose labels are guessed: so many that an AUC over their pairs can exceed chance by enough."""
TESTS: Final = 32
"""Test examples of each of them, of its own labels."""
_CAUSAL: Final[dict[str, Any]] = {
    "task": "causal-lm",
    "max_tokens": 32,
    "learning_rate": 0.002,
    "modules": ("q_proj", "v_proj"),
    "layers": (0, 27, 28, 29),
}
_CLASSIFIER: Final[dict[str, Any]] = {
    "task": "sequence-classification",
    "max_tokens": 32,
    "learning_rate": 0.003,
    "modules": ("query", "value"),
}

Attacks = Callable[[Performance, Public], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A federation and what is tried on it."""

    scene: Scene
    attacks: Attacks

    @property
    def name(self) -> str:
        """That of its scene."""
        return self.scene.name

    @property
    def cost(self) -> int:
        """About how long it takes, beside others."""
        scene = self.scene
        steps = sum(8 + scene.steps * scene.batch_of(client) for client in scene.clients)
        return scene.rounds * steps * (5 if scene.task == "causal-lm" else 1)


@dataclass(frozen=True, slots=True)
class Mode:
    """A mode of protection, as a federation asks for it."""

    name: str
    mode: str
    clear_bits: int = 16

    @property
    def leaks(self) -> bool:
        """Whether anything is in the clear."""
        return strategy_of(self.mode).shows_factors


NONE: Final = Mode("none", "none")
PUBLISHED: Final = Mode("published", "selective", 32)
SELECTIVE: Final = Mode("selective", "selective")
COMPLETE: Final = Mode("complete", "complete")
COLLUDES: Final = "server and one colluding client: every A decrypted"
KNOWS_A: Final = (
    "server that knows the initial A: public in the authors' code, told by one colluding client in ours"
)


def all_cases(downloads: Path, seed: int, *, everything: bool) -> Iterator[Case]:
    """In the order of the table. Args: seed: draws the clients' texts; everything: sums of single steps, too."""
    texts = _Texts(downloads, seed)
    yield _first_step(NONE, texts)
    yield _first_step(PUBLISHED, texts)
    for mode in (SELECTIVE, COMPLETE):
        yield _first_step(mode, texts)
    for mode in (NONE, SELECTIVE, COMPLETE):
        for steps in (1, 10):
            yield _members(mode, texts, steps)
        yield from _classifiers(mode, texts)
    for budget in BUDGETS:
        yield _small_budget(texts, budget)
    yield _exact_sums(texts, 10)
    for size in FELLOWS:
        yield _fellows(texts, size)
    for size in NOISED:
        yield _fellows(texts, size, hidden=True)
    if everything:
        yield _exact_sums(texts, 1)


class _Texts:
    """What clients hold, in an order of its own for each seed."""

    def __init__(self, downloads: Path, seed: int) -> None:
        self.news = [e for e in assets.reuters(downloads) if len(e.text) >= SHORTEST]
        self.topics = [e for e in self.news if len(e.text) <= LONGEST_TOPIC]
        self.snippets = [e for e in assets.tomatoes(downloads) if SHORTEST <= len(e.text) <= LONGEST_SNIPPET]
        rng = np.random.default_rng(seed)
        rng.shuffle(self.topics)
        rng.shuffle(self.snippets)

    @property
    def outsiders(self) -> list[str]:
        """Texts that no client has."""
        return [example.text for example in self.topics[-OUTSIDERS:]]

    def batches(self, clients: int, four: int, sixteen: int) -> list[Sequence[Example]]:
        """Texts of so many clients with one, with four, with sixteen."""
        sizes = [1] * clients + [4] * four + [16] * sixteen
        ends = np.cumsum(sizes) + 200
        return [self.topics[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _first_step(mode: Mode, texts: _Texts) -> Case:
    """One step of a sentence each: by decoding, by spans, by columns of A in the second round."""
    exact = mode.leaks and mode is not SELECTIVE
    sources = (
        ("private sentences", [Example(text, "") for text in assets.PRIVATE]),
        ("Rotten Tomatoes", texts.snippets[:2]),
        ("R8", texts.topics[:2]),
    )
    sentences = tuple(
        replace(client, name=f"{data[:2].lower()}-{client.name}", data=data)
        for data, examples in sources
        for client in _clients([[example] for example in examples], 32)
    )
    scene = _causal(f"text-{mode.name}", mode, sentences, 1, rounds=2 if mode is NONE else 1)

    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        yield from experiments.decoded(performance, public, sentences, control=exact)
        who = "server" if mode is NONE else KNOWS_A
        yield experiments.spanned(performance, public, sentences, who, control=exact)
        if mode is NONE:
            yield from experiments.by_budget(performance, public, sentences)
            yield from experiments.by_budget(performance, public, sentences[::3], bits=16)
            yield experiments.unmixed(performance, public, sentences)

    return Case(scene=scene, attacks=attacks)


def _members(mode: Mode, texts: _Texts, steps: int) -> Case:
    """Batches of three sizes: their members; tokens by B, and by A where somebody can decrypt it and it has moved."""
    clients = _clients(texts.batches(4, 2, 1), 8, data="R8")
    scene = _causal(f"member-{mode.name}-{steps}", mode, clients, steps, rounds=2 if steps == 1 else 1)

    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        if mode is NONE and steps > 1:
            yield from experiments.decoded(performance, public, clients[:2])
        for group in _by_size(scene, clients):
            who = "server" if mode is NONE else KNOWS_A
            yield experiments.spanned(performance, public, group, who, control=False)
            if mode.leaks and steps > 1:
                who = "server" if mode is NONE else COLLUDES
                yield experiments.spanned_by_A(performance, public, group, who)
        yield from _told(performance, public, clients, texts, mode)
        if steps == 1:
            yield from _by_loss(performance, public, clients, texts, mode)
        yield from _beside(performance)

    return Case(scene=scene, attacks=attacks)


def _told(
    performance: Performance, public: Public, clients: Sequence[Client], texts: _Texts, mode: Mode
) -> Iterator[Finding]:
    """Membership by round, by size of batch and of all sizes together: of few members no AUC is beyond chance."""
    scene = performance.scene
    groups = _by_size(scene, clients)
    for number in range(1, scene.rounds + 1):
        for group in (*groups, clients):
            control = mode is NONE and scene.steps == number == 1 and group is groups[0]
            yield experiments.membership(
                performance, public, group, texts.outsiders, number=number, control=control
            )
            if mode is NONE and number == 1:
                yield experiments.membership(performance, public, group, texts.outsiders, basis=True)


def _by_loss(
    performance: Performance, public: Public, clients: Sequence[Client], texts: _Texts, mode: Mode
) -> Iterator[Finding]:
    """By size of batch, and those together of which a mean loss can tell."""
    scene = performance.scene
    few = [client for client in clients if scene.batch_of(client) <= FEW]
    for group in (*_by_size(scene, clients), few):
        control = mode is NONE and group is few
        yield beside.membership_by_loss(performance, public, group, texts.outsiders, control=control)


def _beside(performance: Performance) -> Iterator[Finding]:
    """What servers are told beside updates."""
    yield beside.recorded(performance)
    yield from beside.stated(performance)


def _by_size(scene: Scene, clients: Sequence[Client]) -> list[Sequence[Client]]:
    """Clients with batches of a size together, the smallest first."""
    sizes = sorted({scene.batch_of(client) for client in clients})
    return [[client for client in clients if scene.batch_of(client) == size] for size in sizes]


def _classifiers(mode: Mode, texts: _Texts) -> Iterator[Case]:
    clients = _clients(texts.batches(8, 3, 1), 8, data="R8")
    for steps in (1, 10):

        def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
            yield from _told(performance, public, clients, texts, mode)
            yield from _beside(performance)

        scene = _classifier(f"class-{mode.name}-{steps}", mode, clients, steps)
        yield Case(scene=replace(scene, rounds=2 if steps == 1 else 1), attacks=attacks)
    branches = _branches(texts.news)

    def by_labels(performance: Performance, public: Public) -> Iterator[Finding]:
        for basis in (False, True) if mode is NONE else (False,):
            control = mode is NONE and not basis
            yield experiments.labels(performance, public, control=control, basis=basis)
        yield beside.labels_by_reports(performance, control=mode is NONE)
        yield from _beside(performance)
        if mode is NONE:
            yield from simulated.findings(public, [example.text for example in texts.news[: simulated.TEXTS]])

    scene = _classifier(f"labels-{mode.name}", mode, branches, 5, batch=8)
    # How good the first result is, the second round's sum tells.
    yield Case(scene=replace(scene, rounds=1 if mode.leaks else 2), attacks=by_labels)


def _fellows(texts: _Texts, size: int, *, hidden: bool = False) -> Case:
    """What a member reads in the sum that it opened."""
    clients = _clients([[e] for e in texts.snippets[100 : 100 + size]], 16, data="Rotten Tomatoes")
    scene = _causal(f"fellows-{size}{'-hidden' if hidden else ''}", COMPLETE, clients, 10)
    if hidden:
        scene = replace(scene, client_privacy={"epsilon": EPSILON, "delta": DELTA, "clip": 1.0})

    def attacks(performance: Performance, public: Public) -> Iterator[Finding]:
        yield experiments.opened_by_a_member(performance, public)
        if size == DECEIVED and not hidden:
            yield from malicious.findings(performance, public, experiments.first_layer(public))

    return Case(scene=scene, attacks=attacks)


def _exact_sums(texts: _Texts, steps: int) -> Case:
    clients = _clients([[e] for e in texts.snippets[100 : 100 + max(FELLOWS)]], 16, data="Rotten Tomatoes")
    return Case(
        scene=_causal(f"sums-{steps}", NONE, clients, steps),
        attacks=lambda p, public: experiments.exact_sums(p, public, FELLOWS),
    )


def _small_budget(texts: _Texts, budget: float) -> Case:
    """A federation whose clients really encrypt less."""
    drawn = _clients(texts.batches(8, 3, 1), 8, data="R8")
    clients = tuple(replace(client, budget=budget) for client in drawn)
    return Case(
        scene=_classifier(f"budget-{round(1000 * budget)}-per-mille", SELECTIVE, clients, 1),
        attacks=lambda performance, public: _told(performance, public, clients, texts, SELECTIVE),
    )


def _causal(name: str, mode: Mode, clients: tuple[Client, ...], steps: int, rounds: int = 1) -> Scene:
    terms: dict[str, Any] = {"mode": mode.mode, "clear_bits": mode.clear_bits, "rounds": rounds} | _CAUSAL
    return Scene(name=name, clients=clients, steps=steps, batch=BATCH, **terms)


def _classifier(name: str, mode: Mode, clients: tuple[Client, ...], steps: int, batch: int = BATCH) -> Scene:
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


def _branches(examples: Sequence[Example]) -> tuple[Client, ...]:
    """Clients whose labels are drawn from Dirichlet(0.3), to train on and to test by."""
    rng, apart = np.random.default_rng(1), np.random.default_rng(2)
    trained, tested = [], []
    for shares in rng.dirichlet([0.3] * len(LABELS), BRANCHES):
        trained.append(_drawn(examples, shares, 16, rng))
        tested.append(tuple((e.text, e.label) for e in _drawn(examples, shares, TESTS, apart)))
    clients = _clients(trained, 8, data="R8, Dirichlet 0.3")
    return tuple(replace(client, tests=tests) for client, tests in zip(clients, tested, strict=True))


def _drawn(
    examples: Sequence[Example], shares: NDArray[np.float64], count: int, rng: np.random.Generator
) -> list[Example]:
    by_label = {label: [e for e in examples if e.label == label] for label in LABELS}
    return [
        by_label[label][i]
        for label, of in zip(LABELS, rng.multinomial(count, shares), strict=True)
        for i in rng.integers(0, len(by_label[label]), of)
    ]
