"""A round at the shapes of a large model, here a small one: every mode runs, and a whole model is its layers."""

from dataclasses import asdict

import pytest

from bench import shapes
from bench.scale import SENDERS, WAYS, Row, _measured, table
from bench.shapes import MODELS, Layer, Model

LAYERS = 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(layers=LAYERS, shapes={"q": (96, 96), "k": (32, 96), "up": (160, 96)}, source="here")
    monkeypatch.setattr(shapes, "MODELS", {"small": model})
    monkeypatch.setattr("bench.scale.MODELS", {"small": model})


def measured(mode: str, contributors: int) -> Row:
    return _measured(Layer(model="small", rank=2, clients=contributors, budget=0.05), mode)


@pytest.mark.parametrize("mode", WAYS)
def test_every_mode_is_measured_in_every_role(mode: str) -> None:
    row = measured(mode, SENDERS)
    figures = asdict(row)
    assert all(figures[name] > 0 for name in ("up", "down", "protect_s", "restore_s", "aggregate_s"))
    assert row.plain_bytes == LAYERS * 4 * 2 * (96 + 96 + 32 + 96 + 160 + 96)
    assert row.up < 2 * LAYERS * row.largest_shard * 2
    heading, _, line = table("small", [row]).splitlines()[2:]
    assert line.startswith(f"| {mode} | 2 | {SENDERS} |")
    assert line.count("|") == heading.count("|")


def test_more_contributors_than_senders_cost_a_client_nothing_more_and_change_no_parameters() -> None:
    few, many = measured("complete", SENDERS), measured("complete", 3 * SENDERS)
    assert many.parameters == few.parameters
    assert many.restore_s is None, "it does not depend on their number"
    assert many.up / few.up < 1.2
    assert many.largest_shard == few.largest_shard


def test_layers_of_the_models_have_the_parameters_that_their_authors_say() -> None:
    billions = {"llama-7b": 6.48e9, "llama-70b": 68.5e9, "mixtral-8x7b": 46.4e9}
    for name, count in billions.items():
        model = MODELS[name]
        linear = model.layers * sum(rows * columns for rows, columns in model.shapes.values())
        assert linear == pytest.approx(count, rel=0.01), name
