"""Cells are kept one by one, tuned before they are run, and shown only when every seed is there."""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compare import __main__ as command
from compare import report, settings
from compare.__main__ import METHODS as NAMED
from compare.cells import Place, chosen_rate, complete, missing
from compare.datasets.registry import DATASETS
from compare.methods.registry import METHODS
from compare.metrics import LOSS
from compare.run import Result
from compare.settings import DATA, GRID, SEEDS, Cell, Cohort, tuning

COHORT = Cohort(data="r8", clients=20)
ANSWERS = Cohort.on("instructions", 4, uneven=True, mixed=True)
RESULT = {
    "early": 0.5, "accuracy": 0.8, "worst": 0.6, "effective_rank": 2.0,
    "up": 1e5, "down": 2e5, "server_s": 0.01, "wall_s": 3.0,
}  # fmt: skip


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(runs=tmp_path)


def fill(place, methods, best=3e-3):
    """Runs everything, as far as a table is concerned."""
    while cells := missing([COHORT], methods, place):
        for cell in cells:
            drop = 0.0 if cell.learning_rate == best else 0.1
            gain = 0.01 * (cell.method == "exact") + 0.001 * cell.seed
            place.keep(cell, RESULT | {"accuracy": RESULT["accuracy"] - drop + gain})


def test_the_command_names_the_methods_there_are():
    assert set(NAMED) == set(METHODS) == set(report.TITLES)


def test_every_data_set_has_a_setting():
    assert set(DATA) == set(DATASETS)
    assert len({data.file for data in DATASETS.values()}) == len(DATASETS)


def test_cells_of_earlier_data_sets_are_those_that_were_kept():
    assert Cohort.on("tomatoes", 4, uneven=True, mixed=False) == Cohort(
        data="tomatoes", clients=4, uneven=True, mixed=False, rounds=18, steps=16, batch=16
    )
    cell = Cell(
        cohort=Cohort.on("r8", 4, uneven=True, mixed=True), method="exact", seed=0, learning_rate=1e-2
    )
    assert cell.identity() == {
        "edition": 1, "method": "exact", "seed": 0, "learning_rate": 0.01,
        "cohort": {
            "data": "r8", "clients": 4, "uneven": True, "mixed": True, "rounds": 6, "steps": 16, "batch": 16,
        },
    }  # fmt: skip


def test_the_final_figure_is_kept_under_the_name_of_its_metric():
    result = Result(
        metric="loss", early=3.0, final=2.0, worst=2.5, effective_rank=1.0, up=1.0, down=2.0, server_s=0.1, wall_s=4.0
    )  # fmt: skip
    assert result.record() == {
        "early": 3.0, "loss": 2.0, "worst": 2.5, "effective_rank": 1.0,
        "up": 1.0, "down": 2.0, "server_s": 0.1, "wall_s": 4.0,
    }  # fmt: skip


def test_learning_rates_are_tuned_on_a_seed_that_is_not_reported(place):
    first = missing([COHORT], ["exact"], place)
    assert [cell.learning_rate for cell in first] == list(GRID)
    assert {cell.seed for cell in first}.isdisjoint(SEEDS)
    for cell in first:
        assert chosen_rate(cell, place) is None
        place.keep(cell, RESULT | {"accuracy": cell.learning_rate})
    assert chosen_rate(first[0], place) == max(GRID)
    seeds = missing([COHORT], ["exact"], place)
    assert [cell.seed for cell in seeds] == list(SEEDS)
    assert {cell.learning_rate for cell in seeds} == {max(GRID)}


def test_what_has_run_does_not_run_again_unless_it_was_another_cell(place, monkeypatch):
    fill(place, ["exact"])
    assert complete([COHORT], ["exact"], place)
    cell = replace(tuning(Cell(cohort=COHORT, method="exact", seed=0, learning_rate=0))[0])
    place.path(cell).write_text("{ torn", encoding="utf-8")
    assert missing([COHORT], ["exact"], place) == [cell]
    place.keep(cell, RESULT)
    longer = replace(COHORT, steps=99)
    assert len(missing([longer], ["exact"], place)) == len(GRID), "of another length under the same name"
    monkeypatch.setattr(settings, "EDITION", -1)
    assert len(missing([COHORT], ["exact"], place)) == len(GRID)


def test_a_killed_process_is_told_and_what_is_finished_stays(place, monkeypatch):
    def killed(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr(command, "run_missing", killed)
    result = CliRunner().invoke(command.app, ["run", "--data", "r8", "--runs", str(place.runs)])
    assert result.exit_code == 1
    assert "run again to go on" in result.stdout


def test_an_unknown_method_or_data_set_is_refused_with_those_there_are():
    for option in ("--methods", "--data"):
        result = CliRunner().invoke(command.app, ["run", option, "fedprox"])
        assert result.exit_code == 2
        assert "fedprox" in result.output


def test_the_page_shows_methods_of_which_every_seed_has_run(place, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "comparison.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    fill(place, ["complete", "exact", "alone"])
    lacking = replace(Cell(cohort=COHORT, method="alone", seed=SEEDS[1], learning_rate=3e-3))
    place.path(lacking).unlink()
    report.write([COHORT], NAMED, place, docs)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "20 clients, labels by Dirichlet(0.3), ranks 2, 4, 8, 16" in text
    assert "| **complete** | nothing | 50.0 ± 0.0 | 80.1 ± 0.1 |" in text
    assert "each client alone" not in text
    assert "-1.0 ± 0.0 points in accuracy against exact sum (FlexLoRA)" in " ".join(text.split())
    report.write([COHORT], NAMED, place, docs)
    assert page.read_text(encoding="utf-8") == text, "writing again changes nothing"
    assert (docs / "images" / "comparison.svg").stat().st_size > 1000


def fill_losses(place) -> None:
    """`complete` ends at a loss of 2.01 nats, and the best in the clear at 2.0; so do their worst clients."""
    extra = {"complete": 0.01, "exact": 0.0, "fedit": 0.5}
    while cells := missing([ANSWERS], list(extra), place):
        for cell in cells:
            more = extra[cell.method] + (cell.learning_rate != min(ANSWERS.setting.grid))
            rest = {name: value for name, value in RESULT.items() if name != "accuracy"}
            place.keep(cell, rest | {"loss": 2.0 + more, "worst": 3.0 + more, "early": 4.0})


def test_of_a_loss_the_lowest_is_the_best_and_the_highest_the_worst(place, tmp_path):
    fill_losses(place)
    cell = Cell(cohort=ANSWERS, method="exact", seed=0, learning_rate=0)
    assert chosen_rate(cell, place) == min(ANSWERS.setting.grid)
    assert LOSS.worst([2.0, 3.0, 1.0]) == 3.0
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "comparison.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    report.write([ANSWERS], NAMED, place, docs)
    text = page.read_text(encoding="utf-8")
    assert "topics by Dirichlet(0.3)" in text
    assert "| **complete** | nothing | 4.000 ± 0.000 | 2.010 ± 0.000 | 3.010 ± 0.000 |" in text
    words = " ".join(text.split())
    assert "+0.010 ± 0.000 nats in loss (lower is better) against exact sum (FlexLoRA)" in words
    assert "+0.010 ± 0.000 nats in the worst client against exact sum (FlexLoRA)" in words
    assert "lower is better" in (docs / "images" / "comparison.svg").read_text(encoding="utf-8")
