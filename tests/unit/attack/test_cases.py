"""The grid of `make attack`, without running it: its federations can be created, its rows have their gates."""

from types import SimpleNamespace

import numpy as np
import pytest

from attack import assets, beside, cases, experiments, losses, malicious, simulated, statements, told, twins
from attack.findings import UNPROTECTED, Finding
from attack.labels import LabelLeak
from attack.stage import Performance
from examples.reuters.split import LABELS, Example

GATED = (
    experiments.TEXT,
    experiments.BY_B,
    experiments.MEMBERSHIP,
    experiments.LABELS,
    beside.BY_LOSS,
    beside.BY_REPORTS,
    beside.BESIDE,
)
"""What servers alone can try on `complete`, and on what is not protected."""
OF_COMPLETE = (beside.STATEMENTS, beside.ONE_KEY)
"""What there is in no other mode; the controls are tests."""


@pytest.fixture
def grid(monkeypatch, tmp_path):
    """All cases, over texts that are made up."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(90)]
    texts = [Example(" ".join(rng.choice(words, 12)), LABELS[i % len(LABELS)]) for i in range(900)]
    monkeypatch.setattr(assets, "reuters", lambda _: texts)
    monkeypatch.setattr(assets, "tomatoes", lambda _: texts)
    return list(cases.all_cases(tmp_path, 0, everything=True))


def test_every_scene_is_a_federation_that_can_be_created(grid):
    """Two had names with a point, which was found after a quarter of an hour."""
    specs = [case.scene.specification() for case in grid]
    assert len({spec.name for spec in specs}) == len(grid) > 25
    assert {spec.protection.mode for spec in specs} == {"none", "selective", "complete"}
    for case in grid:
        assert all(client.texts and client.data for client in case.scene.clients), case.name


@pytest.fixture
def rows(grid, monkeypatch):
    """The rows of all cases, of attackers that find nothing: what they look at is replaced, how they judge is not."""
    monkeypatch.setattr(experiments, "clear_parts", lambda round_, _: round_.clear)
    monkeypatch.setattr(
        experiments, "_decoder", lambda _: SimpleNamespace(text=lambda *_: [1], places=lambda *_: [])
    )
    monkeypatch.setattr(experiments, "_gradient", lambda *_: np.ones((2, 2)))
    monkeypatch.setattr(experiments, "_inputs", lambda *_: {1, 2})
    monkeypatch.setattr(experiments, "_tokens", lambda *_: {3, 4})
    monkeypatch.setattr(experiments, "_scores", lambda *given: dict.fromkeys(given[3], 0.0))
    monkeypatch.setattr(experiments, "_features", lambda *_, **__: np.ones(3))
    monkeypatch.setattr(losses, "scores", lambda _, scene, __, texts: no_scores(scene, texts))
    for name, found in (("losses", {}), ("differing", ["norm"]), ("unexpected", []), ("in_clear", 0.0)):
        monkeypatch.setattr(told, name, lambda _, found=found: found)
    monkeypatch.setattr(told, "reported", lambda _: np.ones((2, 2)))
    monkeypatch.setattr(statements, "exposure", lambda seen: NOTHING_STATED if seen.scene.sealed else None)
    monkeypatch.setattr(twins, "alike", lambda round_: None if round_.clear else (0.25, 10_000, 1))
    leak = LabelLeak(
        majority=0,
        majority_by_chance=0.2,
        distance=1,
        distance_by_chance=1,
        same_majority_auc=0.5,
        pairs=(21, 169),
    )
    for module in (experiments, beside):
        monkeypatch.setattr(module, "label_leak", lambda *_: leak)
    for name in ("spanned_by_A", "by_budget", "unmixed", "opened_by_a_member", "exact_sums"):
        monkeypatch.setattr(experiments, name, nothing(several=name in {"by_budget", "exact_sums"}))
    for module in (malicious, simulated):
        monkeypatch.setattr(module, "findings", nothing(several=True))
    public = SimpleNamespace(
        names=["layers.0.q_proj", "layers.29.q_proj"],
        first_inputs=np.ones((1000, 2)),
        ids=lambda _: [1, 2, 3],
    )
    return [finding for case in grid for finding in case.attacks(watched(case.scene), public)]


def no_scores(scene, texts):
    return {client.name: dict.fromkeys(texts, 0.0) for client in scene.clients}


NOTHING_STATED = statements.Exposure(readable=0.0, repeated=0.0, surplus=0.0, shares=9, keys=9, statements=9)


ROW = dict.fromkeys(("setting", "attacker", "data", "attack", "terms", "column"), "") | {"figures": {}}


def nothing(*, several):
    row = Finding(**ROW)
    return lambda *_, **__: iter(()) if several else row


def watched(scene):
    clear = {} if scene.mode == "complete" else {"layers.0.q_proj": "in the clear"}
    rounds = [SimpleNamespace(clear=clear, digest="") for _ in range(scene.rounds)]
    return Performance(scene=scene, rounds=rounds, insider=SimpleNamespace(secrets=lambda _: None))


def test_every_row_of_complete_is_a_claim_and_the_same_attack_has_a_control(rows):
    tried = [row for row in rows if row.attack in GATED]
    alone = [row for row in rows if row.attack in OF_COMPLETE]
    assert {row.attack for row in alone} == set(OF_COMPLETE)
    for row in (*tried, *alone):
        assert row.no_better_than_chance == (row.column == "complete"), row
        assert not row.no_better_than_chance or set(row.error) & set(row.figures), row
    controls = {row.attack for row in tried if row.at_least and row.column == UNPROTECTED}
    assert {row.attack for row in tried if row.column == "complete"} == controls == set(GATED)


def test_of_every_attack_on_complete_there_is_a_claim_that_can_fail(rows):
    """An AUC of four members is within four errors of chance, whatever leaks: beside it stands one of more."""
    claims = {row.attack for row in rows if row.no_better_than_chance}
    assert claims == {row.attack for row in rows if row.no_better_than_chance and row.can_leak}
    assert not Finding(**ROW, error={"auc": 0.15}, chance={"auc": 0.5}).can_leak


def test_a_mode_that_promises_is_held_to_it_though_something_travels_in_the_clear(grid, rows, monkeypatch):
    monkeypatch.setattr(
        experiments, "clear_parts", lambda *_: {"layers.0.q_proj": "in the clear, by a fault"}
    )
    scene = next(case.scene for case in grid if case.name == "text-complete")
    public = SimpleNamespace(
        names=["layers.29.q_proj"], first_inputs=np.ones((1000, 2)), ids=lambda _: [1, 2, 3]
    )
    for row in experiments.decoded(watched(scene), public, scene.clients):
        assert row.no_better_than_chance


def test_rows_of_all_modes_stand_beside_the_unprotected_one(rows):
    bare = {row.beside for row in rows if row.column == UNPROTECTED}
    assert [row for row in rows if row.attack in GATED and row.beside not in bare] == []
