"""The attacks on one captured federation each: from captured rounds to findings.

Truth (private texts, labels) is used to score guesses, and to tell an attacker what it is given by the usual measure:
how many distinct tokens a batch has (best-T recall), the first two tokens of a text.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

from attack import adam, bases, columns, insiders, tokens
from attack.capture import Round
from attack.decode import Decoder
from attack.findings import Finding
from attack.labels import label_leak
from attack.membership import CausalMembership, ClassifierMembership
from attack.opened import clear_parts, normalization, sketches_as_stored
from attack.public import Public
from attack.scores import auc, auc_error, recall, rouge, rouge_by_chance
from attack.spans import best
from attack.stage import Client, Performance, Scene
from client_agent.keys import EpochSecrets
from shelora.lora.shards import Float64
from shelora.tasks import CAUSAL_LM

TEXT = "text"
BY_B = "tokens by B"
BY_A = "tokens by A"
VISIBLE = "visible columns"
MEMBERSHIP = "membership"
LABELS = "labels"
UNMIXED = "columns of B"
IN_SUMS = "tokens in sums"
"""What is tried: each a part of the table."""
OPENING = 2
"""Tokens of a text that the decoder is given."""
GUESSES = 10
"""Guesses at the next token, all before it given, that are counted as success."""
RECALLED = 0.95
"""Recall that a control of DAGER's check must reach."""
TOLD = 0.85
"""AUC that a control of membership or of labels must reach."""
CONTROLS = 4
"""Texts from which on their decoding is a control: of two, one on which the search takes a wrong turn would fail it."""


def setting(scene: Scene, batch: int | None = 1, number: int = 1) -> str:
    """A scene in the table's words. Arguments as of `terms`."""
    partly = scene.strategy.needs_plan
    mode = f"{scene.mode} {_budget(scene)}, {scene.bits} bits" if partly else scene.mode
    hidden = scene.client_privacy
    form = f", client privacy of epsilon {hidden['epsilon']:g}" if hidden else ""
    return f"{mode}, {terms(scene, batch, number)}{form}"


def column(scene: Scene, *, basis: bool = False) -> str:
    """Where a scene stands in the short table: the mode, of `selective` the bits of its clear part."""
    mode = f"{scene.bits} bits" if scene.strategy.needs_plan else scene.mode
    return "basis" if basis else mode


def variant(scene: Scene) -> str:
    """What a scene has that the one beside it, under `none`, has not; empty for the mode as it is by default."""
    if scene.client_privacy:
        return f"epsilon {scene.client_privacy['epsilon']:g}"
    return _budget(scene) if any(client.budget < 1 for client in scene.clients) else ""


def _budget(scene: Scene) -> str:
    return "/".join(sorted({f"{100 * client.budget:g} %" for client in scene.clients}))


def terms(scene: Scene, batch: int | None = 1, number: int = 1) -> str:
    """A scene's words but for its mode. Args: batch: of the clients that the row is of; None for several sizes."""
    plural, later = "s" if scene.steps > 1 else "", f", round {number}" if number > 1 else ""
    size = "1 to " + str(scene.batch) if batch is None else str(batch)
    return f"{scene.steps} step{plural}, batch {size}{later}"


def decoded(
    performance: Performance, public: Public, clients: Sequence[Client], *, control: bool = False
) -> Iterator[Finding]:
    """Text from B of the last layer's query, or from the stored bytes if nothing is clear: a finding for every data.

    Args: clients: with one text each.
    """
    by_data: dict[str, list[Client]] = {}
    for client in clients:
        by_data.setdefault(client.data, []).append(client)
    for data, group in by_data.items():
        yield _decoded(performance, public, data, group, control=control)


def _decoded(
    performance: Performance, public: Public, data: str, clients: Sequence[Client], *, control: bool
) -> Finding:
    scene, round_ = performance.scene, performance.rounds[0]
    decoder = _decoder(public)
    name = next(n for n in reversed(public.names) if n.endswith("q_proj"))
    found: list[tuple[list[int], list[int]]] = []
    places: list[int] = []
    for client in clients:
        true = public.ids(client.texts[0])
        even, rows, _ = adam.evened(_gradient(scene, round_, client, name), adam.step_of(scene.bits))
        guess = decoder.text(even, rows, true[:OPENING], len(true) + 1, true[-1], client.rank)
        found.append((true, guess))
        if scene.bits == adam.HALF_BITS:
            places += decoder.places(even, rows, true, OPENING, len(true) - OPENING)
    clear = bool(clear_parts(round_, scene.clients[0].name))
    lengths = [(len(t) - OPENING, max(len(g) - OPENING, 1)) for t, g in found]
    chance, error = rouge_by_chance(lengths, len(public.first_inputs))
    figures = {
        "exact": float(np.mean([true == guess for true, guess in found])),
        "rouge-1": float(np.mean([rouge(t[OPENING:], g[OPENING:], 1) for t, g in found])),
        "rouge-2": float(np.mean([rouge(t[OPENING:], g[OPENING:], 2) for t, g in found])),
    }
    if places:
        figures["next word in 10 guesses"] = float(np.mean(np.array(places) < GUESSES))
    return Finding(
        setting=setting(scene),
        attacker="server: clear B, A unknown" if clear else "server: all it stored",
        data=data,
        attack=TEXT,
        terms=terms(scene),
        column=column(scene),
        figures=figures,
        counts={"texts": len(found)},
        chance={"exact": 0.0, "rouge-1": chance}
        | ({"next word in 10 guesses": GUESSES / len(public.first_inputs)} if places else {}),
        error={"exact": 0.0, "rouge-1": error},
        at_least={"rouge-1": 0.8} if control and len(clients) >= CONTROLS else {},
        no_better_than_chance=scene.sealed,
        capture=round_.digest,
    )


def spanned(
    performance: Performance, public: Public, clients: Sequence[Client], who: str, *, control: bool
) -> Finding:
    """DAGER's check on the update of each client, by whoever has the secrets: on B, with the A that it began from.

    Args: clients: with batches of one size.
    """
    round_, scene, secrets = performance.rounds[0], performance.scene, performance.secrets
    size, data = scene.batch_of(clients[0]), data_of(scene, clients)
    figures = [recall(_tokens(public, scene, c, round_, secrets), _inputs(public, c)) for c in clients]
    chance, guesses = _chance(public, clients), sum(len(_inputs(public, client)) for client in clients)
    return Finding(
        setting=setting(scene, size),
        attacker=f"{who}; DAGER's check on B",
        data=data,
        attack=BY_B,
        terms=f"{terms(scene, size)}, rank {clients[0].rank}",
        column=column(scene),
        figures={"recall": float(np.mean(figures))},
        counts={"clients": len(figures), "tokens": guesses},
        chance={"recall": chance},
        error={"recall": float((chance / guesses) ** 0.5) + 1 / guesses},
        at_least={"recall": RECALLED} if control else {},
        no_better_than_chance=scene.sealed,
        capture=round_.digest,
    )


def spanned_by_A(performance: Performance, public: Public, clients: Sequence[Client], who: str) -> Finding:
    """DAGER's check on how A moved in a first round of several steps, by whoever can decrypt it.

    Args: clients: with batches of one size.
    """
    round_, scene, secrets = performance.rounds[0], performance.scene, performance.secrets
    size, data, found = scene.batch_of(clients[0]), data_of(scene, clients), []
    for client in clients:
        opened, true = insiders.opened_update(round_, client.name, secrets), _inputs(public, client)
        moved = np.vstack([opened[name].A for name in first_layer(public)])
        begun = np.vstack([_began(public, secrets, client, name) for name in first_layer(public)])
        found.append(recall(best(tokens.by_A(public, moved, len(true), begun), len(true)), true))
    return Finding(
        setting=setting(scene, size),
        attacker=f"{who}; DAGER's check on how A moved",
        data=data,
        attack=BY_A,
        terms=f"{terms(scene, size)}, rank {clients[0].rank}",
        column=column(scene),
        figures={"recall": float(np.mean(found))},
        counts={"clients": len(found), "tokens": sum(len(_inputs(public, client)) for client in clients)},
        chance={"recall": _chance(public, clients)},
        capture=round_.digest,
    )


def _began(public: Public, secrets: EpochSecrets, client: Client, name: str) -> Float64:
    """The A that a client began the first round from."""
    return insiders.initial_A(secrets, name, client.rank, public.first_inputs.shape[1])


def by_budget(
    performance: Performance, public: Public, clients: Sequence[Client], bits: int = 32
) -> Iterator[Finding]:
    """What visible columns of A give away in the second round, at every budget, places known and secret.

    Args: bits: as of `columns.movement`.
    """
    scene, round_, number = performance.scene, performance.rounds[1], 2
    floor = columns.HALF_FLOOR if bits == adam.HALF_BITS else columns.FLOOR
    rng = np.random.default_rng(0)
    found: dict[tuple[float, str, bool], list[float]] = {}
    for client in clients:
        start, true = columns.start_of(performance, public, client, number), _inputs(public, client)
        moved = np.vstack(
            [columns.movement(performance, start, client, n, number, bits) for n in first_layer(public)]
        )
        for view in columns.views(moved, public, len(true), rng, floor=floor):
            guess = best(view.distances, len(true))
            found.setdefault((view.budget, view.who, view.control), []).append(recall(guess, true))
    for (budget, who, control), figures in found.items():
        yield Finding(
            setting=f"none, {100 * budget:g} % of the columns of A left out, the rest in {bits} bits, "
            + terms(scene, number=number),
            attacker=f"server: {who}",
            data=data_of(scene, clients),
            attack=VISIBLE,
            terms=f"{who}, {bits} bits",
            column=f"{100 * budget:g} %",
            figures={"recall": float(np.mean(figures))},
            counts={"clients": len(figures)},
            chance={"recall": _chance(public, clients)},
            at_least={"recall": RECALLED} if control and bits > adam.HALF_BITS else {},
            capture=round_.digest,
        )


def data_of(scene: Scene, clients: Iterable[Client]) -> str:
    """What clients hold, in the table's words."""
    data = ", ".join(dict.fromkeys(client.data for client in clients))
    return data if scene.task == CAUSAL_LM else f"{data}, classifier"


def _chance(public: Public, clients: Sequence[Client]) -> float:
    """Recall of guessing as many tokens of the vocabulary as a batch has."""
    return float(np.mean([len(_inputs(public, c)) for c in clients])) / len(public.first_inputs)


def _tokens(public: Public, scene: Scene, client: Client, round_: Round, secrets: EpochSecrets) -> set[int]:
    """The tokens taken for a client's, from B of the first layer, with A known; from Ψ B if nothing is clear."""
    count, clear = len(_inputs(public, client)), clear_parts(round_, client.name)
    stored = {} if clear else sketches_as_stored(round_, client.name)
    distances = []
    for name in first_layer(public):
        A = _began(public, secrets, client, name)
        if clear:
            B = clear[name].B * 2.0 ** -normalization(A)
            distances.append(tokens.by_B(public, B, A, count, steps=scene.steps, bits=scene.bits))
        else:
            distances.append(tokens.by_B(public, stored[name].N @ np.linalg.pinv(A), A, count, steps=0))
    return tokens.in_all(distances, count)


def first_layer(public: Public) -> list[str]:
    """Names of the first layer's matrices."""
    return [name for name in public.names if ".layers.0." in f".{name}"]


def _inputs(public: Public, client: Client) -> set[int]:
    """Distinct tokens that a client's gradient depends on: all but the last of each text."""
    return set(chain.from_iterable(public.ids(text)[:-1] for text in client.texts))


def opened_by_a_member(performance: Performance, public: Public) -> Finding:
    """What a client of `complete` finds in the sum that it opened, its own part taken out."""
    scene, first = performance.scene, first_layer(public)
    sums = insiders.sum_of_others(performance, first)
    who = f"fellow member, {len(scene.clients)} in all, with or without every server: the sum that it opened"
    return in_sums(performance, public, sums, scene.clients[1:], (setting(scene), who))


def exact_sums(performance: Performance, public: Public, sizes: Iterable[int]) -> Iterator[Finding]:
    """The same from exact sums, of updates of one federation under `none`: what `selective` decrypts is as exact."""
    scene, round_, secrets = performance.scene, performance.rounds[0], performance.secrets
    opened = {c.name: insiders.opened_update(round_, c.name, secrets) for c in scene.clients}
    for size in sizes:
        victims = scene.clients[1:size]
        parts = {n: [(c.alpha / c.rank, opened[c.name][n]) for c in victims] for n in first_layer(public)}
        sums = {n: np.sum([s * f.B @ f.A for s, f in of], axis=0) for n, of in parts.items()}
        who = f"fellow member, {size} in all: the exact sum of their captured updates"
        yield in_sums(performance, public, sums, victims, (setting(scene), who))


def in_sums(
    performance: Performance,
    public: Public,
    sums: Mapping[str, Float64],
    victims: Sequence[Client],
    words: tuple[str, str],
) -> Finding:
    """Tokens of all victims together, from the sums of s B A of the first layer's matrices.

    Two ways: what lies outside the A that all began from, as far as A moved; and B by that A.

    Args: words: setting and attacker.
    """
    scene, rng = performance.scene, np.random.default_rng(0)
    true = set().union(*(_inputs(public, client) for client in victims))
    ranks = sum(client.rank for client in victims)
    outside, across = [], []
    for name, total in sums.items():
        noisy = total + rng.standard_normal(total.shape) * 1e-6 * np.abs(total).max()
        rank = max(client.rank for client in victims)
        A = insiders.initial_A(performance.secrets, name, rank, total.shape[1])
        steps = scene.steps if len(victims) == 1 else 0  # Adam's step is undone for a single victim alone
        across.append(tokens.by_B(public, noisy @ np.linalg.pinv(A), A, len(true), steps=steps))
        if scene.steps > 1:
            outside.append(tokens.by_A(public, noisy, min(len(true), ranks), A))
    figures = {"recall": recall(tokens.in_any(outside or across, len(true)), true)}
    if outside:
        figures["recall by B"] = recall(tokens.in_any(across, len(true)), true)
    return Finding(
        setting=words[0],
        attacker=words[1],
        data=data_of(scene, victims),
        attack=IN_SUMS,
        terms=f"{len(victims) + 1} members, {terms(scene)}",
        column=column(scene),
        variant=variant(scene),
        figures=figures,
        counts={"tokens": len(true)},
        chance={"recall": len(true) / len(public.first_inputs)},
        capture=performance.rounds[0].digest,
    )


@lru_cache(maxsize=4)
def _decoder(public: Public) -> Decoder:
    return Decoder(public)


@lru_cache(maxsize=4)
def _membership(public: Public) -> CausalMembership | ClassifierMembership:
    """Keeps what candidates say from one federation to the next."""
    return (CausalMembership if public.scene.task == "causal-lm" else ClassifierMembership)(public)


def membership(
    performance: Performance,
    public: Public,
    clients: Sequence[Client],
    outsiders: Sequence[str],
    *,
    number: int = 1,
    control: bool = False,
    basis: bool = False,
) -> Finding:
    """Was a sentence in a client's batch? By a server, from clear B, or from the stored bytes if nothing is clear.

    Args: number: of the round; basis: from what an orthonormal basis of the first round's B would tell.
    """
    scene, round_ = performance.scene, performance.rounds[number - 1]
    data = data_of(scene, clients)
    texts = candidates(scene, outsiders)
    raw = {c.name: _scores(performance, public, c, texts, number, basis) for c in scene.clients}
    members, others = told_apart(scene, raw, clients, outsiders)
    clear = bool(clear_parts(round_, clients[0].name))
    sizes = {scene.batch_of(client) for client in clients}
    size = sizes.pop() if len(sizes) == 1 else None
    return Finding(
        setting=_form(setting(scene, size, number), basis=basis),
        attacker="server: clear B, A unknown" if clear else "server: all it stored",
        data=data,
        attack=MEMBERSHIP,
        terms=terms(scene, size, number),
        column=column(scene, basis=basis),
        variant=variant(scene),
        figures={"auc": auc(members, others)},
        counts={"members": len(members), "others": len(others)},
        chance={"auc": 0.5},
        error={"auc": auc_error(len(members), len(others))},
        at_least={"auc": TOLD} if control else {},
        no_better_than_chance=scene.sealed,
        capture=round_.digest,
    )


def candidates(scene: Scene, outsiders: Sequence[str]) -> tuple[str, ...]:
    """The texts that are asked for, each once."""
    return tuple(dict.fromkeys(chain(outsiders, *(c.texts[: scene.batch] for c in scene.clients))))


def told_apart(
    scene: Scene,
    raw: Mapping[str, Mapping[str, float]],
    clients: Sequence[Client],
    outsiders: Sequence[str],
) -> tuple[list[float], list[float]]:
    """Scores of the members of these clients' batches, and of texts that no client has."""
    held = {client.name: set(client.texts) for client in scene.clients}
    scores = standardized(calibrated(raw, held), outsiders)
    members = [scores[client.name][text] for client in clients for text in client.texts[: scene.batch]]
    return members, [scores[client.name][text] for client in clients for text in outsiders]


def calibrated(
    scores: Mapping[str, Mapping[str, float]], held: Mapping[str, Collection[str]]
) -> dict[str, dict[str, float]]:
    """Scores of texts by client, each less its mean over the other clients that do not hold the text.

    Some texts lie in most spans, whoever holds them (difficulty calibration; Watson et al., ICLR 2022). Without it the
    outsiders' scores of one text would not be independent either, and an AUC's error larger than it is taken for.
    """
    found: dict[str, dict[str, float]] = {}
    for client, own in scores.items():
        found[client] = {
            text: score
            - float(np.mean([scores[o][text] for o in scores if o != client and text not in held[o]]))
            for text, score in own.items()
        }
    return found


def standardized(
    scores: Mapping[str, Mapping[str, float]], outsiders: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores of texts by client, less the mean of that client's outsiders and over their standard deviation.

    Some updates score all texts high, or far apart. Over several clients that would hide what the texts differ by, and
    their scores would not be independent: on random bytes the error of an AUC over 12 clients was 1.4 times what it is
    taken for.
    """
    found: dict[str, dict[str, float]] = {}
    for client, own in scores.items():
        known = np.array([own[text] for text in outsiders])
        middle, spread = float(known.mean()), max(float(known.std()), 1e-30)
        found[client] = {text: (score - middle) / spread for text, score in own.items()}
    return found


@lru_cache(maxsize=128)
def _scores(
    performance: Performance,
    public: Public,
    client: Client,
    texts: Sequence[str],
    number: int,
    basis: bool,  # noqa: FBT001 - a key of the cache
) -> dict[str, float]:
    """What membership scores each text with one client's update."""
    attack = _membership(public)
    gradients = _gradients(performance, public, client, attack.names, number)
    if basis:
        gradients = {name: bases.as_basis(gradient) for name, gradient in gradients.items()}
    return {text: attack.score(gradients, text) for text in texts}


def _gradients(
    performance: Performance, public: Public, client: Client, names: Iterable[str], number: int
) -> dict[str, Float64]:
    """By matrix, what a server has of the gradients of B in a round."""
    scene, round_ = performance.scene, performance.rounds[number - 1]
    if number == 1 or not clear_parts(round_, client.name):
        return {name: _gradient(scene, round_, client, name) for name in names}
    if scene.strategy.needs_keys:
        return {name: columns.beside_last_result(performance, client, name, number) for name in names}
    start = columns.start_of(performance, public, client, number)
    moved = {name: columns.movement_of_B(performance, start, client, name, number) for name in names}
    if scene.steps > 1:
        return moved
    rate = scene.learning_rate
    return {name: adam.gradient(step, rate, columns.FLOOR) for name, step in moved.items()}


def _gradient(scene: Scene, round_: Round, client: Client, name: str) -> Float64:
    """B of one matrix as a gradient; if it did not travel in the clear, P, whose columns B spans, as it was stored."""
    seen = clear_parts(round_, client.name).get(name)
    if seen is None:
        return sketches_as_stored(round_, client.name)[name].P
    if scene.steps > 1:
        return seen.B
    step = adam.unscaled(seen.B, scene.learning_rate)
    return adam.gradient(step, scene.learning_rate, adam.step_of(scene.bits))


def _form(terms: str, *, basis: bool) -> str:
    """The setting, of a capture under `none` that is looked at as if B had travelled as a basis."""
    return terms.replace("none", "none, B made an orthonormal basis") if basis else terms


def unmixed(performance: Performance, public: Public, clients: Sequence[Client]) -> Finding:
    """How much of B comes back from an orthonormal basis of its columns: the last layer's query, one step."""
    scene, round_ = performance.scene, performance.rounds[0]
    name = next(n for n in reversed(public.names) if n.endswith("q_proj"))
    seen = [clear_parts(round_, client.name)[name].B for client in clients]
    return Finding(
        setting=_form(setting(scene), basis=True),
        attacker="server: vectors of even magnitudes in the span",
        data=data_of(scene, clients),
        attack=UNMIXED,
        terms=terms(scene),
        column=column(scene, basis=True),
        figures={"columns of B": float(np.mean([bases.found_again(B) for B in seen]))},
        counts={"clients": len(seen)},
        chance={"columns of B": 0.0},
        capture=round_.digest,
    )


def labels(
    performance: Performance, public: Public, *, control: bool = False, basis: bool = False
) -> Finding:
    """What servers learn of the clients' label distributions; `basis` as of `membership`."""
    scene, round_ = performance.scene, performance.rounds[0]
    features = np.stack([_features(scene, round_, client, public, basis=basis) for client in scene.clients])
    leak = label_leak(features, label_shares(scene))
    clear = bool(clear_parts(round_, scene.clients[0].name))
    clients = len(scene.clients)
    spread = (leak.majority_by_chance * (1 - leak.majority_by_chance) / clients) ** 0.5
    return Finding(
        setting=_form(setting(scene, scene.batch), basis=basis),
        attacker="server: clear B, others' labels known"
        if clear
        else "server: all it stored, others' labels known",
        data=data_of(scene, scene.clients),
        attack=LABELS,
        terms=terms(scene, scene.batch),
        column=column(scene, basis=basis),
        figures={"auc": leak.same_majority_auc, "majority": leak.majority, "closeness": 1 - leak.distance},
        counts={"clients": clients},
        chance={"auc": 0.5, "majority": leak.majority_by_chance, "closeness": 1 - leak.distance_by_chance},
        error={"auc": auc_error(*leak.pairs), "majority": spread, "closeness": 0.1},
        at_least={"auc": TOLD} if control else {},
        no_better_than_chance=scene.sealed,
        capture=round_.digest,
    )


def label_shares(scene: Scene) -> Float64:
    """Label distributions, [clients, labels]."""
    return np.array(
        [[c.labels.count(label) / len(c.labels) for label in scene.classes] for c in scene.clients]
    )


def _features(scene: Scene, round_: Round, client: Client, public: Public, *, basis: bool) -> Float64:
    parts = [_gradient(scene, round_, client, name) for name in public.names]
    if basis:
        parts = [bases.projection(bases.as_basis(part)) for part in parts]
    return np.concatenate([(part / max(float(np.linalg.norm(part)), 1e-30)).ravel() for part in parts])
