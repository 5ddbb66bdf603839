"""The attacks on one captured federation each: from captured rounds to findings.

Truth (private texts, labels) is used to score guesses, and to tell an attacker what it is given by the usual measure:
how many distinct tokens a batch has (best-T recall), the first two tokens of a text.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from attack import adam, insiders, tokens
from attack.capture import Round
from attack.decode import Decoder
from attack.findings import Finding
from attack.labels import label_leak
from attack.membership import CausalMembership, ClassifierMembership
from attack.opened import clear_parts, normalization
from attack.public import Public
from attack.scores import auc, auc_error, recall, rouge
from attack.stage import Client, Performance, Scene
from client_agent.keys import EpochSecrets
from shelora.lora.shards import Float64

OPENING = 2
"""Tokens of a text that the decoder is given."""


def setting(scene: Scene) -> str:
    """A scene in the table's words."""
    budgets = {f"{100 * client.budget:g} %" for client in scene.clients}
    mode = f"{scene.mode} {'/'.join(sorted(budgets))}" if scene.mode == "selective" else scene.mode
    plural = "s" if scene.steps > 1 else ""
    return f"{mode}, {scene.steps} step{plural}, batch {scene.batch}"


def decoded(performance: Performance, public: Public, data: str, *, control: bool = False) -> Finding:
    """Text from the clear B of the last layer's query, by a server, or from the stored bytes if nothing is clear."""
    scene, round_ = performance.scene, performance.rounds[0]
    decoder = Decoder(public)
    name = next(n for n in reversed(public.names) if n.endswith("q_proj"))
    found: list[tuple[list[int], list[int]]] = []
    for client in scene.clients:
        true = public.ids(client.texts[0])
        even, rows, _ = adam.evened(_gradient(scene, round_, client, name, public))
        guess = decoder.text(even, rows, true[:OPENING], len(true) + 1, true[-1], client.rank)
        found.append((true, guess))
    clear = bool(clear_parts(round_, scene.clients[0].name))
    return Finding(
        setting=setting(scene),
        attacker="server: clear B, A unknown" if clear else "server: all it stored",
        data=data,
        figures={
            "exact": float(np.mean([true == guess for true, guess in found])),
            "rouge-1": float(np.mean([rouge(t[OPENING:], g[OPENING:], 1) for t, g in found])),
            "rouge-2": float(np.mean([rouge(t[OPENING:], g[OPENING:], 2) for t, g in found])),
        },
        counts={"texts": len(found)},
        chance={"exact": 0.0},
        error={"exact": 0.0},
        at_least={"rouge-1": 0.8} if control else {},
        no_better_than_chance=not clear,
        capture=round_.digest,
    )


def spanned(
    performance: Performance, public: Public, data: str, secrets: EpochSecrets, who: str, *, control: bool
) -> Finding:
    """DAGER's check on the opened update of each client, by whoever has `secrets`."""
    round_ = performance.rounds[0]
    figures = [
        recall(_tokens(public, performance.scene, client, round_, secrets), _inputs(public, client))
        for client in performance.scene.clients
    ]
    return Finding(
        setting=setting(performance.scene),
        attacker=who,
        data=data,
        figures={"recall": float(np.mean(figures))},
        counts={"clients": len(figures)},
        at_least={"recall": 0.95} if control else {},
        capture=round_.digest,
    )


def _tokens(public: Public, scene: Scene, client: Client, round_: Round, secrets: EpochSecrets) -> set[int]:
    """The tokens taken for a client's, from B of the first layer, with A known."""
    opened = insiders.opened_update(round_, client.name, secrets)
    count = len(_inputs(public, client))
    distances = []
    for name in _first_layer(public):
        factors = opened[name]
        A = insiders.initial_A(secrets, name, client.rank, factors.A.shape[1])
        B = factors.B * 2.0 ** -normalization(A)
        distances.append(tokens.by_B(public, B, A, count, steps=scene.steps))
    return tokens.guessed(distances, count)


def _first_layer(public: Public) -> list[str]:
    return [name for name in public.names if ".layers.0." in f".{name}"]


def _inputs(public: Public, client: Client) -> set[int]:
    """Distinct tokens that a client's gradient depends on: all but the last of each text."""
    return set(chain.from_iterable(public.ids(text)[:-1] for text in client.texts))


def fellow(
    performance: Performance, public: Public, data: str, secrets: EpochSecrets, sizes: Iterable[int]
) -> list[Finding]:
    """What a member finds out of the decrypted sum of a federation of each size, its own part taken out."""
    scene, round_ = performance.scene, performance.rounds[0]
    opened = {c.name: insiders.opened_update(round_, c.name, secrets) for c in scene.clients}
    rng, found = np.random.default_rng(0), []
    for size in sizes:
        victims = scene.clients[1:size]
        true = set().union(*(_inputs(public, client) for client in victims))
        distances = []
        for name in _first_layer(public):
            total = np.sum(
                [c.alpha / c.rank * opened[c.name][name].B @ opened[c.name][name].A for c in victims], axis=0
            )
            total = total + rng.standard_normal(total.shape) * 1e-6 * np.abs(total).max()
            rank = max(client.rank for client in victims)
            A = insiders.initial_A(secrets, name, rank, total.shape[1])
            B = total @ np.linalg.pinv(A)
            steps = scene.steps if size == 2 else 0  # Adam's step is undone for a single victim alone
            distances.append(tokens.by_B(public, B, A, len(true), steps=steps))
        guess = tokens.guessed(distances, len(true))
        chance = len(true) / len(public.first_inputs)
        found.append(
            Finding(
                setting=f"any mode, {scene.steps} step{'s' if scene.steps > 1 else ''}, batch {scene.batch}",
                attacker=f"fellow member, {size} in all: the decrypted sum",
                data=data,
                figures={"recall": recall(guess, true)},
                counts={"tokens": len(true)},
                chance={"recall": chance},
                capture=round_.digest,
            )
        )
    return found


def membership(
    performance: Performance, public: Public, data: str, outsiders: Sequence[str], *, control: bool = False
) -> Finding:
    """Was a sentence in a client's batch? By a server, from clear B, or from the stored bytes if nothing is clear."""
    scene, round_ = performance.scene, performance.rounds[0]
    attack = (CausalMembership if scene.task == "causal-lm" else ClassifierMembership)(public)
    members: list[float] = []
    others: list[float] = []
    for client in scene.clients:
        gradients = {name: _gradient(scene, round_, client, name, public) for name in attack.names}
        members += [attack.score(gradients, text) for text in client.texts[: scene.batch]]
        others += [attack.score(gradients, text) for text in outsiders]
    clear = bool(clear_parts(round_, scene.clients[0].name))
    return Finding(
        setting=setting(scene),
        attacker="server: clear B, A unknown" if clear else "server: all it stored",
        data=data,
        figures={"auc": auc(members, others)},
        counts={"members": len(members), "others": len(others)},
        chance={"auc": 0.5},
        error={"auc": auc_error(len(members), len(others))},
        at_least={"auc": 0.85} if control else {},
        no_better_than_chance=not clear,
        capture=round_.digest,
    )


def _gradient(scene: Scene, round_: Round, client: Client, name: str, public: Public) -> Float64:
    """B of one matrix as a gradient; the stored bytes as numbers in its place if it did not travel in the clear."""
    seen = clear_parts(round_, client.name).get(name)
    if seen is None:
        return _noise(round_, client, public, name)
    if scene.steps > 1:
        return seen.B
    return adam.gradient(adam.unscaled(seen.B, scene.learning_rate), scene.learning_rate)


def _noise(round_: Round, client: Client, public: Public, name: str) -> Float64:
    """A client's stored bytes, read as 16-bit integers into the shape of B."""
    rows = next(m.out_features for m in public.model.matrices if m.name == name)
    stored = b"".join(content for _, content in sorted(round_.of(client.name).items()))
    values = np.frombuffer(stored[: len(stored) // 2 * 2], "<i2").astype(np.float64)
    place = public.names.index(name) * rows * client.rank
    return np.resize(np.roll(values, -place), (rows, client.rank))


def labels(performance: Performance, public: Public, data: str) -> Finding:
    """What servers learn of the clients' label distributions."""
    scene, round_ = performance.scene, performance.rounds[0]
    features = np.stack([_features(scene, round_, client, public) for client in scene.clients])
    shares = np.array(
        [[c.labels.count(label) / len(c.labels) for label in scene.classes] for c in scene.clients]
    )
    leak = label_leak(features, shares)
    clear = bool(clear_parts(round_, scene.clients[0].name))
    clients = len(scene.clients)
    spread = (leak.majority_by_chance * (1 - leak.majority_by_chance) / clients) ** 0.5
    return Finding(
        setting=setting(scene),
        attacker="server: clear B, others' labels known"
        if clear
        else "server: all it stored, others' labels known",
        data=data,
        figures={"auc": leak.same_majority_auc, "majority": leak.majority, "closeness": 1 - leak.distance},
        counts={"clients": clients},
        chance={"auc": 0.5, "majority": leak.majority_by_chance, "closeness": 1 - leak.distance_by_chance},
        error={"auc": auc_error(*leak.pairs), "majority": spread, "closeness": 0.1},
        no_better_than_chance=not clear,
        capture=round_.digest,
    )


def _features(scene: Scene, round_: Round, client: Client, public: Public) -> Float64:
    parts = [_gradient(scene, round_, client, name, public) for name in public.names]
    return np.concatenate([(part / max(float(np.linalg.norm(part)), 1e-30)).ravel() for part in parts])
