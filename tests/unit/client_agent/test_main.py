import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import client_agent
from client_agent.data import Examples
from client_agent.inspection import MOST_LABELS, _examples_table
from client_agent.link import Link
from client_agent.main import app
from shelora.terminal import Terminal

SAMPLE = Path(client_agent.__file__).parent / "sample.yaml"


def test_an_offline_check_shows_data_and_model(agent_folder: Path) -> None:
    result = CliRunner().invoke(app, ["check", "--offline", "--config", str(agent_folder / "agent.yaml")])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    for expected in (
        "bad │ 10 │ 10",
        "all │ 20 │ 20",
        "adapted matrices │ 4",
        "query x 2, key x 2, value x 2, dense x 7",
        "32 x 32",
        "1,090",
        "MB",
        "encrypted │ everything",
        "MB, where another client's rank is larger",
        "longest │ 6",
        "cut │ 0 of 20 (0.0%)",
        "[CLS] the movie was good [SEP]",
    ):
        assert expected in shown, shown


def test_a_check_without_its_coordinator_says_what_to_do(
    agent_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Link.__call__, "__kwdefaults__", {"timeout_s": 5.0, "retry_s": 0.0})
    with pytest.raises(SystemExit) as caught:
        app(["check", "--config", str(agent_folder / "agent.yaml")], standalone_mode=False)
    assert caught.value.code == 1
    assert "--offline" in capsys.readouterr().err


def test_a_refused_configuration_ends_with_its_own_code_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.yaml").write_text(SAMPLE.read_text().replace("budget: 1.0", "budget: 2.0"))
    with pytest.raises(SystemExit) as caught:
        app(["run", "--config", str(tmp_path / "agent.yaml")], standalone_mode=False)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "budget = 2.0: " in error
    assert "Traceback" not in error


REFUSED = [
    (
        "train.jsonl",
        '{"text": "Wheat \\ud83d exports", "label": "good"}',
        "DATA_INVALID",
        "train.jsonl, line 1: field 'text'",
    ),
    ("test.jsonl", '{"text": null, "label": "good"}', "DATA_INVALID", "test.jsonl, line 1: 'text' is null"),
    ("train.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "DATA_INVALID", "line 1: field 'label'"),
    ("train.jsonl", '{"text": "a", "label": "good"}', "DATA_INVALID", "holds one label in 'label', good,"),
]


@pytest.mark.parametrize(("name", "line", "reason", "said"), REFUSED)
def test_data_that_run_would_refuse_ends_check_with_one_line_and_its_own_code(
    agent_folder: Path, capsys: pytest.CaptureFixture[str], name: str, line: str, reason: str, said: str
) -> None:
    before = (agent_folder / name).read_text() if "holds" not in said else ""
    (agent_folder / name).write_text(line + "\n" + before)
    with pytest.raises(SystemExit) as caught:
        app(["check", "--offline", "--config", str(agent_folder / "agent.yaml")], standalone_mode=False)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"client-agent: {reason} " in error
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_help_names_both_commands_and_the_sample() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    for expected in ("check", "run", "sample.yaml", "SHELORA_AGENT__LORA__RANK"):
        assert expected in output


def test_an_agent_enrols_with_its_token_only_while_it_has_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled: list[tuple[str, str, Path, str]] = []
    monkeypatch.setattr("client_agent.main._enroll", lambda *given: enrolled.append(given))
    monkeypatch.setattr("client_agent.main._run", lambda _: 0)
    (tmp_path / "agent.yaml").write_text(SAMPLE.read_text())
    (tmp_path / "token").write_text("shelora-token-abc\n")
    command = ["run", "--config", str(tmp_path / "agent.yaml"), "--token-file", str(tmp_path / "token")]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            app([*command, "--authority", "keys:7099"], standalone_mode=False)
        assert ended.value.code == 0
        (tmp_path / "state" / "identity").mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / "identity" / "identity.pem").touch()
    assert enrolled == [("shelora-token-abc\n", "keys:7099", tmp_path / "state", "newsroom-1")]


@pytest.mark.parametrize(
    ("options", "remedy"), [([], "--authority"), (["--authority", "keys:7099"], "token file")]
)
def test_a_token_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], remedy: str
) -> None:
    (tmp_path / "agent.yaml").write_text(SAMPLE.read_text())
    command = ["run", "--config", str(tmp_path / "agent.yaml"), "--token-file", str(tmp_path / "absent")]
    with pytest.raises(SystemExit) as ended:
        app([*command, *options], standalone_mode=False)
    assert ended.value.code == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("make", [Path.touch, lambda place: place.symlink_to(place)])
def test_a_check_finds_a_folder_of_state_that_cannot_be_used(
    agent_folder: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = agent_folder / "agent.yaml"
    config.write_text(config.read_text().replace("state_dir: state", "state_dir: elsewhere/state"))
    make(agent_folder / "elsewhere")
    for command in (["check", "--offline"], ["run"]):
        with pytest.raises(SystemExit) as caught:
            app([*command, "--config", str(config)], standalone_mode=False)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"state_dir: {agent_folder}/elsewhere/state cannot be used: " in line


def test_of_a_column_that_has_a_label_a_row_the_first_are_shown() -> None:
    labels = [f"label {number}" for number in range(MOST_LABELS + 7)]
    prepared = SimpleNamespace(examples=Examples(tuple(labels), tuple(range(len(labels)))), test=None)
    out = StringIO()
    Terminal(file=out).print(_examples_table(SimpleNamespace(labels=labels), prepared))
    shown = out.getvalue()
    assert "label 99 " in shown
    assert "label 100" not in shown
    assert "and 7 more labels" in shown
    assert "107" in shown


def test_a_device_without_a_folder_for_temporary_files_is_told_what_to_do(
    agent_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(SystemExit) as caught:
        app(["check", "--offline", "--config", str(agent_folder / "agent.yaml")], standalone_mode=False)
    assert caught.value.code == 1
    assert "set TMPDIR to a folder that can" in capsys.readouterr().err
