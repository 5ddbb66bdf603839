"""The attacks on what servers are told beside updates: by the coordinator, from reports and statements.

What clients report in every mode, and why, is said in docs/threat-model.md. Under `complete` all else must say nothing.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from attack import losses, statements, told, twins
from attack.experiments import (
    TOLD,
    candidates,
    column,
    data_of,
    label_shares,
    setting,
    terms,
    told_apart,
)
from attack.findings import Finding
from attack.labels import label_leak
from attack.public import Public
from attack.scores import auc, auc_error
from attack.stage import Client, Performance, Scene

BY_LOSS = "membership by loss"
BY_REPORTS = "labels by reports"
BESIDE = "beside updates"
STATEMENTS = "statements"
ONE_KEY = "one key"
"""What is tried: each a part of the table."""
TOLD_BY_REPORTS = 0.65
"""AUC that labels by what agents report of their own must reach: 0.79 to 0.81 in three runs, chance is 0.5 ± 0.07."""


def membership_by_loss(
    performance: Performance,
    public: Public,
    clients: Sequence[Client],
    outsiders: Sequence[str],
    *,
    control: bool = False,
) -> Finding:
    """Was a text in a client's batch? By the coordinator, from the mean loss that it was told of the first round."""
    scene, reported = performance.scene, told.losses(performance)
    texts = candidates(scene, outsiders)
    raw = losses.scores(public, scene, reported, texts)
    members, others = told_apart(scene, raw, clients, outsiders)
    sizes = {scene.batch_of(client) for client in clients}
    size = sizes.pop() if len(sizes) == 1 else None
    return Finding(
        setting=setting(scene, size),
        attacker="coordinator: the mean loss that a client reports",
        data=data_of(scene, clients),
        attack=BY_LOSS,
        terms=terms(scene, size),
        column=column(scene),
        figures={"auc": auc(members, others)},
        counts={"members": len(members), "others": len(others)},
        chance={"auc": 0.5},
        error={"auc": auc_error(len(members), len(others))},
        at_least={"auc": TOLD} if control else {},
        no_better_than_chance=scene.sealed,
        capture=performance.rounds[0].digest,
    )


def labels_by_reports(performance: Performance, *, control: bool = False) -> Finding:
    """What the coordinator learns of the clients' labels from the losses and accuracies that they report.

    Under `complete` these are means of all clients, the same from each: they must say nothing of one.
    """
    scene = performance.scene
    features = told.reported(performance)
    leak = label_leak(features, label_shares(scene))
    return Finding(
        setting=setting(scene, scene.batch),
        attacker="coordinator: losses and accuracies that clients report, others' labels known",
        data=data_of(scene, scene.clients),
        attack=BY_REPORTS,
        terms=terms(scene, scene.batch),
        column=column(scene),
        figures={"auc": leak.same_majority_auc, "majority": leak.majority, "closeness": 1 - leak.distance},
        counts={"clients": len(scene.clients), "numbers": features.shape[1]},
        chance={"auc": 0.5, "majority": leak.majority_by_chance, "closeness": 1 - leak.distance_by_chance},
        error={"auc": auc_error(*leak.pairs)},
        at_least={"auc": TOLD_BY_REPORTS} if control else {},
        no_better_than_chance=scene.sealed,
        capture=performance.rounds[0].digest,
    )


def recorded(performance: Performance) -> Finding:
    """Does anything that servers keep beside updates differ by client, and is no term? Does it hold texts?"""
    scene = performance.scene
    differing, unexpected = told.differing(performance), told.unexpected(performance)
    return Finding(
        setting=setting(scene, None),
        attacker="coordinator, aggregation: all that they stored beside updates",
        data=data_of(scene, scene.clients),
        attack=BESIDE,
        terms=terms(scene, None),
        column=column(scene),
        figures={
            "unexpected numbers": len(unexpected) / max(len(differing), 1),
            "texts in the clear": told.in_clear(performance),
        },
        counts={"numbers that differ": len(differing)},
        chance={"unexpected numbers": 0.0, "texts in the clear": 0.0},
        error={"unexpected numbers": 0.0, "texts in the clear": 0.0},
        at_least={} if scene.sealed else {"unexpected numbers": 1 / max(len(differing), 1)},
        no_better_than_chance=scene.sealed,
        capture=performance.rounds[0].digest,
    )


def stated(performance: Performance) -> Iterator[Finding]:
    """Of `complete`: what committees were dealt and stated, and whether two updates have one secret."""
    scene = performance.scene
    if found := statements.exposure(performance):
        zero = {"readable shares": 0.0, "repeated keys": 0.0, "statements with room": 0.0}
        figures = dict(zip(zero, (found.readable, found.repeated, found.surplus), strict=True))
        yield Finding(
            setting=setting(scene, None),
            attacker="coordinator: what committees were dealt and stated",
            data=data_of(scene, scene.clients),
            attack=STATEMENTS,
            terms=terms(scene, None),
            column=column(scene),
            figures=figures,
            counts={"shares": found.shares, "keys": found.keys, "statements": found.statements},
            chance=zero,
            error=zero,
            no_better_than_chance=scene.sealed,
            capture=performance.rounds[0].digest,
        )
    for number, round_ in enumerate(performance.rounds, 1):
        if (pairs := twins.alike(round_)) is not None:
            yield _twins(scene, round_.digest, number, *pairs)


def _twins(scene: Scene, digest: str, number: int, share: float, values: int, pairs: int) -> Finding:
    deviation = (twins.SMALL * (1 - twins.SMALL) / values) ** 0.5
    return Finding(
        setting=setting(scene, None, number),
        attacker="server: differences of two updates as they are stored",
        data=data_of(scene, scene.clients),
        attack=ONE_KEY,
        terms=terms(scene, None, number),
        column=column(scene),
        figures={"small differences": share},
        counts={"pairs": pairs, "values": values},
        chance={"small differences": twins.SMALL + deviation * (2 * np.log(max(pairs, 1))) ** 0.5},
        error={"small differences": deviation},
        no_better_than_chance=scene.sealed,
        capture=digest,
    )
