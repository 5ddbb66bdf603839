"""What a run of the attacks leaves on disk, and when it is done again."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from attack import __main__ as command
from attack import captures, experiments, report, runner
from attack.capture import Round, Update
from attack.cases import Case
from attack.findings import Finding
from attack.stage import Client, Credulous, Insider, Performance, Scene
from client_agent.judging import Judge
from client_agent.learning import Weights
from client_agent.plausibility import Motion
from shelora.errors import DomainError
from shelora.lora.shards import LoraFactors
from shelora.terminal import Terminal

SCENE = Scene(
    name="text-none",
    task="causal-lm",
    mode="none",
    clients=(Client(name="ward/7", texts=("a secret",)),),
    steps=1,
    batch=1,
    rounds=1,
    max_tokens=32,
    learning_rate=0.002,
    modules=("q",),
)


def found(**row):
    form = {
        "setting": "s",
        "attacker": "a",
        "data": "d",
        "attack": "text",
        "terms": "1 step",
        "column": "none",
    }
    return Finding(**(form | row))


@pytest.fixture
def performance(some_layout):
    updates = [Update(client="ward/7", shard=0, content=b"first"), Update(client="b", shard=0, content=b"")]
    weights = Weights(
        factors={"q": LoraFactors(np.ones((4, 2), np.float32), np.ones((2, 6), np.float32))}, tensors={}
    )
    insider = Insider(released=b"", trained=weights, applied=weights)
    return Performance(scene=SCENE, rounds=[Round(some_layout, updates, {0: b"sum"})], insider=insider)


def test_a_capture_comes_back_as_it_was(performance, tmp_path):
    captures.save(performance, tmp_path / "c")
    found = captures.load(SCENE, tmp_path / "c")
    assert found.rounds[0].digest == performance.rounds[0].digest
    assert found.rounds[0].layout.digest == performance.rounds[0].layout.digest
    assert found.rounds[0].of("ward/7") == {0: b"first"}
    assert found.rounds[0].results == {0: b"sum"}
    assert (found.insider.applied.factors["q"].B == 1).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "capture.json").unlink(),
        lambda folder: (folder / "capture.json").write_text("[]"),
        lambda folder: (folder / "rounds" / "1" / "update" / "b" / "0").write_bytes(b"other"),
        lambda folder: (folder / "rounds" / "1" / "update" / "b" / "0").unlink(),
        lambda folder: (folder / "rounds" / "1" / "layout").write_bytes(b"\xff\xff"),
        lambda folder: (folder / "insider" / "applied" / "applied.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_capture_is_none(performance, tmp_path, spoil):
    captures.save(performance, tmp_path / "c")
    spoil(tmp_path / "c")
    assert captures.load(SCENE, tmp_path / "c") is None


def test_a_capture_of_another_scene_or_product_is_none(performance, tmp_path, monkeypatch):
    captures.save(performance, tmp_path / "c")
    assert captures.load(replace(SCENE, steps=2), tmp_path / "c") is None
    monkeypatch.setattr(captures, "sources", lambda *_: "another product")
    assert captures.load(SCENE, tmp_path / "c") is None


@pytest.fixture
def plan(performance, tmp_path, monkeypatch):
    """One case whose capture is there; `tried` counts how often it is attacked, and a federation cannot be run."""
    tried = []

    def attacks(seen, _):
        tried.append(seen.rounds[0].digest)
        return [found(figures={"recall": 1.0})]

    monkeypatch.setattr(runner, "all_cases", lambda *_, **__: [Case(scene=SCENE, attacks=attacks)])
    monkeypatch.setattr(runner, "Public", lambda *_: SimpleNamespace())
    monkeypatch.setattr(runner.Plan, "model", lambda *_: tmp_path)
    made = runner.Plan(folder=tmp_path, downloads=tmp_path, only="", seed=0, everything=False)
    (case,) = made.cases()
    captures.save(performance, made.capture(case))
    return SimpleNamespace(made=made, case=case, tried=tried)


def test_what_was_found_is_not_tried_again(plan, monkeypatch):
    runner.work(plan.made)
    runner.work(plan.made)
    monkeypatch.setattr(runner, "_work_side_by_side", lambda *_: pytest.fail("nothing is left to do"))
    (finding,) = runner.run(plan.made, 2)
    assert (finding.figures, len(plan.tried)) == ({"recall": 1.0}, 1)


def test_a_changed_attack_is_tried_again_on_the_same_capture(plan, monkeypatch):
    runner.work(plan.made)
    same = captures.sources
    monkeypatch.setattr(captures, "sources", lambda *places: "changed" if places else same())
    runner.work(plan.made)
    assert len(plan.tried) == 2


def test_findings_that_cannot_be_read_are_made_again(plan):
    runner.work(plan.made)
    for content in ("", "{}", '{"key": 1, "findings": [{}]}'):
        plan.made.findings(plan.case).write_text(content)
        runner.work(plan.made)
    assert len(plan.tried) == 4


def test_a_case_that_another_process_is_at_is_left_to_it(plan):
    with runner._claimed(plan.made, plan.case) as mine:
        assert mine
        runner.work(plan.made)
    assert plan.tried == []


def test_a_process_that_leaves_a_case_undone_fails_the_run(plan, monkeypatch):
    monkeypatch.setattr(runner, "_work_side_by_side", lambda *_: None)
    with pytest.raises(DomainError, match="no findings of text-none"):
        runner.run(plan.made, 2)


def test_a_row_shows_what_the_same_attack_finds_where_nothing_is_protected():
    rows = [
        found(figures={"exact": 1.0}),
        found(column="basis", figures={"exact": 0.5}),
        found(column="complete", variant="epsilon 8", figures={"exact": 0.0}),
        found(column="complete", terms="10 steps", figures={"exact": 0.0}),
    ]
    shown = [row[report.HEADINGS.index("the same under none")] for row in report.rows(rows)]
    assert shown == ["", "exact 1.00", "exact 1.00", ""]
    assert report.markdown(rows).count("\n") == 2 + len(rows)


@pytest.mark.parametrize("width", [80, 200])
def test_what_is_printed_stands_side_by_side_and_ends_in_a_verdict(width):
    noise = {"chance": {"auc": 0.5}, "error": {"auc": 0.1}}
    many = {"attack": experiments.MEMBERSHIP, **noise}
    rows = [
        found(figures={"auc": 0.98, "extra": 1.0}, at_least={"auc": 0.85}, **many),
        found(column="16 bits", figures={"auc": 0.97}, **many),
        found(column="16 bits", variant="0.1 %", figures={"auc": 0.96}, **many),
        found(column="complete", figures={"auc": 0.55}, no_better_than_chance=True, **many),
    ]
    shown = printed(rows, width)
    assert all(len(line) <= width for line in shown[: shown.index(report.LEGEND)])
    assert "auc, 1 step 0.98 0.97 0.55 0.50" in [" ".join(line.split()) for line in shown]
    assert "auc, 1 step, 0.1 % 0.98 0.96 0.50" in [" ".join(line.split()) for line in shown], "none beside it"
    assert "extra" not in " ".join(shown), "no chance to hold it against"
    assert shown[-2].startswith("1 controls")
    assert "none did better than chance" in shown[-1]

    shown = printed(
        [*rows, found(column="complete", figures={"auc": 0.95}, no_better_than_chance=True, **many)], width
    )
    assert "1 of 2 attacks on what servers hold under complete did better than chance." in shown[-1]


def printed(rows, width):
    file = StringIO()
    report.show(rows, Path("runs/attack"), Terminal(width=width, file=file))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"figures": {"recall": 0.96}, "at_least": {"recall": 0.95}}, 0),
        ({"figures": {"recall": 0.94}, "at_least": {"recall": 0.95}}, 1),
        ({"figures": {"auc": 0.8}, "no_better_than_chance": True}, 1),
        ({"figures": {"auc": 0.6}, "no_better_than_chance": True}, 0),
    ],
)
def test_the_command_fails_where_a_control_or_a_claim_does(monkeypatch, tmp_path, row, code):
    noise = {"chance": {"auc": 0.5}, "error": {"auc": 0.05}}
    finding = found(**noise, **row)
    monkeypatch.setattr(command, "run", lambda *_: [finding])
    with pytest.raises(SystemExit) as ended:
        command.main(folder=tmp_path, downloads=tmp_path, everything=False, fresh=False, one_of_many=False)
    assert ended.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "findings.json", "attack.png"}


def test_agents_on_stage_take_a_result_that_others_object_to():
    """Clients with a sentence each teach the others nothing: what they object to would be taken back."""
    moderator = SimpleNamespace(
        contributors=16, own=None, before="before", motion=Motion(), own_share=0.0, rounds=1
    )
    losses = {"before": 1.0, "sum": 50.0}
    verdict = {"start": "c.1", "round_id": "c.2", "overruled": False}
    assert Judge(losses.__getitem__).objection("sum", moderator, **verdict)
    assert Credulous(losses.__getitem__).objection("sum", moderator, **verdict) == ""
