"""The benchmark on tiny matrices: every way runs whole, and the summary has its fields."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench import baselines, complete, ours, published, sketches
from bench.figures import TARGETS, Run
from bench.memory import Memory
from bench.report import Report
from bench.sketches import SPECTRA, choices, errors, recorded, rows
from bench.workload import Workload

TINY = Workload(matrices=2, features=96, rank=2, clients=3, budget=0.05)


@pytest.fixture(scope="module")
def run():
    mine, theirs, sums = (way.Measurement(TINY) for way in (ours, published, complete))
    for index in range(2):
        mine.part()
        sums.part()
        theirs.part(index, 1, lambda: None)
    mine.compare(lambda: None)
    sums.compare(lambda: None)
    return Run(
        workload=TINY,
        published=theirs.found,
        ours=mine.found,
        usual=ours.measure_once(TINY, TINY.budget),
        everything=ours.measure_once(TINY, 1.0),
        complete=sums.found,
        memory=Memory(protecting=1, aggregating=1, restoring=1, largest_shard=1),
        others=baselines.measure(TINY),
    )


def test_the_summary_has_every_target_and_what_was_measured(run, tmp_path):
    run.write(tmp_path / "deep" / "summary.json")
    summary = json.loads((tmp_path / "deep" / "summary.json").read_text())
    assert TARGETS.keys() <= summary.keys()
    assert {name for name in TARGETS if name.startswith("complete_")} == {
        "complete_upload_bytes",
        "complete_download_bytes",
        "complete_encrypt_us_per_value",
        "complete_aggregate_ns_per_value_and_client",
        "complete_relative_error",
    }
    assert all(np.isfinite(summary[name]) for name in TARGETS)
    for way in ("usual", "encrypt_all"):
        assert 0 < summary[way]["max_abs_error"] < summary[way]["largest_entry"] / 64, (
            "clear parts have 16 bits"
        )
    assert summary["complete"]["protection"]["count"] == 2
    assert {"published", "ours", "encrypt_all", "workload", "versions", "machine", "missed"} <= summary.keys()


def test_the_complete_mode_restores_what_its_sketches_hold(run):
    found = run.complete
    assert 0 < found.relative_error < 1e-3
    assert found.clipped == 0
    assert found.best_cut_error <= found.cut_error < 1
    assert found.upload_bytes > found.values * 2.75
    assert found.download_bytes > found.values * 2.75


def test_what_others_protect_costs_bytes_and_is_off_by_what_it_averages_or_drops(run):
    found = baselines.measure(Workload(matrices=16, features=600, rank=4, clients=3, budget=0.05))
    full, some, dropped, published_code = found
    assert full.up > 10 * dropped.up
    assert some.up < full.up / 3
    assert (full.clear, full.error) == ("nothing", some.error)
    assert 0 < full.error < min(dropped.error, published_code.error) <= 1
    assert len(baselines.table(run.others).rows) == len(found)


def test_a_wrong_sum_shows_in_the_error():
    measurement = complete.Measurement(TINY)
    measurement.part()
    measurement.part()
    round_, results, opening = measurement._last
    measurement._factors[0] = measurement._factors[1]
    measurement._last = round_, results, opening
    measurement.compare(lambda: None)
    assert measurement.found.relative_error > 0.1


def test_tables_and_notes_are_written_for_all_ways(run):
    assert [len(table.rows) for table in (Report(run).table(), Report(run).ways())] == [15, 4]
    assert any("k = 4, l = 4, s = 10" in note for note in Report(run).notes())


def test_the_clients_of_the_workload_start_from_one_A_and_differ():
    first, second = (TINY.factors(client, "layer-0") for client in (0, 1))
    assert 0 < np.abs(first.A - second.A).max() < 0.02 < np.abs(first.A).max()
    assert 0.3 < np.corrcoef(first.B.ravel(), second.B.ravel())[0, 1] < 0.7
    again = TINY.factors(0, "layer-0")
    assert again.A.tobytes() == first.A.tobytes()


def test_the_choice_in_use_is_near_the_best_cut_and_more_bits_add_less_noise(monkeypatch):
    monkeypatch.setattr(sketches, "FEATURES", 120)
    make = SPECTRA["1 / i²"]
    (_, used), *others = choices()
    found = errors(used, make(np.random.default_rng(0)), 1)
    assert found.best < found.cut < 4 * found.best
    assert found.added < 1e-3
    assert errors(others[1][1], make(np.random.default_rng(0)), 1).added < found.added


def test_recorded_factors_can_be_given(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"q.B": rng.standard_normal((2, 60, 3)), "q.A": rng.standard_normal((2, 3, 50))}
    save_file(tensors, tmp_path / "factors.safetensors")
    found = recorded(tmp_path / "factors.safetensors")
    assert list(found) == ["q"]
    assert len(list(rows(found, 1))) == len(choices())
