"""What people see: on any terminal, in any width, into pipes, whatever names and paths contain."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from client_agent.data import Examples
from client_agent.doctor import CheckResult, Finding
from client_agent.doctor import report as doctor_report
from client_agent.inspection import _examples_table
from shelora.cli.cluster import Addresses
from shelora.cli.main import _addresses_table, app
from shelora.cli.render import federation_view, federations_table, revocations_table
from shelora.cli.screen import FederationScreen
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.operator import shown
from shelora.terminal import Records, Terminal, make_forgiving
from shelora.text import printable, replaced
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import enrolment_pb2

REPOSITORY = Path(__file__).parents[2]
CASES = ["[/x]", "[bold]", "run[v2]/bad.yaml", "[fd00::12]:7101", ":smile:", "[link=file:/]"]
HOSTILE = "mal\x1b[2Jlory\r\u202e\x9b31m"
ADDRESSES = Addresses(
    coordinator="[fd00::12]:7101",
    key_authority="k:1",
    aggregation=("a:2",),
    redis_url="redis://r",
    enrolment="e:3",
    operator_identity="id [v2]",
    metrics={},
)


def federation(name: str = "[/x]") -> pb.Federation:
    member = pb.Member(client_id=name, rank=8, budget=1, example_count=10, stage="training", progress=0.5)
    drop = pb.DroppedUpdate(client_id=name, reason="NORM_OUTLIER", why=f"{name} has a norm above the median")
    current = pb.RoundSummary(
        kind=pb.ROUND_KIND_TRAIN, number=1, state=pb.ROUND_STATE_COLLECTING, cohort_count=2, dropped=[drop]
    )
    spec = pb.FederationSpec(
        name="f", training=pb.TrainingSpec(base_model=name), round=pb.RoundSpec(rounds=3, clients=2)
    )
    return pb.Federation(
        federation_id="f", spec=spec, phase=pb.PHASE_RUNNING, members=[member], current=current, failure=name
    )


VIEWS = {
    "show": lambda name: federation_view(federation(name)),
    "status": lambda name: federations_table([pb.Federation(federation_id=name)]),
    "revocations": lambda name: revocations_table([enrolment_pb2.Revocation(client_id=name)]),
    "check": lambda name: _examples_table(
        TrainingSpec(base_model="m", labels=(name, "b")),
        SimpleNamespace(examples=Examples(("t",), (0,)), test=None),
    ),
    "doctor": lambda name: doctor_report([Finding(name, CheckResult.FAILED, name, remedy=f"mend {name}")]),
    "up": lambda name: _addresses_table(ADDRESSES, Path(name)),
}


def lines(renderable: object, width: int = 100, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    make_forgiving(stream, {})
    Terminal(width=width, file=stream).print(renderable)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("view", VIEWS)
def test_square_brackets_are_text(view, name):
    assert name in "\n".join(lines(VIEWS[view](name)))


def test_control_another_console_takes_brackets_for_markup():
    console = Console(file=io.StringIO())
    console.print("run[v2]/bad.yaml")
    assert "[v2]" not in console.file.getvalue()


@pytest.mark.parametrize("view", sorted(set(VIEWS) - {"check"}))  # the specification refuses such labels
def test_control_characters_are_shown_and_not_obeyed(view):
    text = "\n".join(lines(VIEWS[view](HOSTILE), width=160))
    assert "mal\\x1b[2Jlory" in text
    assert printable(text, lines=True) == text


@pytest.mark.parametrize("view", VIEWS)
def test_an_ascii_terminal_gets_every_view(view):
    text = "\n".join(lines(VIEWS[view]("Müller … ·"), encoding="ascii", width=160))
    assert "M\\xfcller ~ -" in text
    assert not {"?", "\ufffd"} & set(text)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("view", VIEWS)
def test_forty_columns_lose_nothing(view, encoding):
    name = "a-name-of-some-thirty-characters"
    found = lines(VIEWS[view](name), width=40, encoding=encoding)
    assert max(map(len, found)) <= 40
    whole = "".join(line.strip() for line in found).replace(" ", "")
    assert name in whole
    assert "…" not in whole
    assert not whole.count("~")


def test_a_table_that_is_too_wide_names_every_value():
    records = Records("agent", "reason")
    records.add("a" * 30, "b" * 30)
    assert lines(records, width=70)[0].split() == ["agent", "reason"]
    narrow = [line.split() for line in lines(records, width=45)]
    assert narrow == [["agent", "a" * 30], ["reason", "b" * 30]]


def test_a_member_cannot_forge_a_row():
    seen = shown(federation("mallory\nalice  8  100%"))
    assert seen.members[0].client_id == "mallory\\nalice  8  100%"
    assert seen.spec.training.base_model == seen.current.dropped[0].client_id == seen.failure
    assert not any(line.startswith("alice") for line in lines(federation_view(seen)))


def test_progress_into_a_pipe_is_a_line_a_stage():
    stream = io.StringIO()
    console = Terminal(file=stream)
    with console.stages("starting [/a]") as tell:
        tell("starting redis")
        tell("starting redis")
    assert stream.getvalue().splitlines() == ["starting [/a]", "starting redis"]


def test_a_federation_into_a_pipe_is_a_line_a_stage_not_a_line_a_second():
    stream, seen = io.StringIO(), federation()
    with FederationScreen(Terminal(file=stream)) as screen:
        for count in range(50):
            seen.current.update_count = count
            screen.show(seen)
        seen.current.state = pb.ROUND_STATE_AGGREGATING
        screen.show(seen)
    told = stream.getvalue().splitlines()
    assert len(told) == 2
    assert "aggregating" in told[1]


def test_a_refusal_is_one_line_in_a_pipe_and_shows_the_path():
    stream = io.StringIO()
    refused = DomainError(Reason.CONFIGURATION_INVALID, f"run[v2]/bad.yaml {'is wrong ' * 30}")
    Terminal(file=stream, width=40).refuse(refused)
    assert stream.getvalue().startswith("CONFIGURATION_INVALID run[v2]/bad.yaml is wrong")
    assert stream.getvalue().count("\n") == 1


def test_no_color_is_obeyed(monkeypatch):
    def colored() -> bool:
        stream = io.StringIO()
        Terminal(file=stream).print(Text("x", style="red"))
        return "\x1b[31m" in stream.getvalue()

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colored()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colored()


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("x\udce9", "x\\udce9"),
        ("Zoë 数据 👩‍🔬 ·", "Zoë 数据 👩‍🔬 ·"),
    ],
)
def test_printable(raw, safe):
    assert printable(raw) == safe
    assert printable(safe) == safe
    assert printable("a\nb", lines=True) == "a\nb"


def test_what_stands_for_lines_and_signs_takes_as_much_room():
    assert replaced("┏━┳━┓│…·×–█⠋") == "+-+-+|~-x-##"


@pytest.mark.parametrize(
    ("module", "locale"),
    [("shelora.cli.main", {"LC_ALL": "C"}), ("client_agent.main", {"PYTHONIOENCODING": "ascii"})],
)
def test_help_appears_on_an_ascii_terminal(module, locale):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env={**os.environ, **locale, "COLUMNS": "40"},
        capture_output=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.isascii()
    assert b"Usage" in done.stdout


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({"LC_ALL": "C"}, "ascii"),
        ({"LANG": "POSIX"}, "ascii"),
        ({"LANG": "C", "PYTHONUTF8": "1"}, "utf-8"),
        ({"LANG": "C", "LC_ALL": "de_DE.UTF-8"}, "utf-8"),
        ({}, "utf-8"),
    ],
)
def test_the_locale_c_means_ascii(environment, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    make_forgiving(stream, environment)
    assert stream.encoding == encoding
    stream.write("·\udce9")
    stream.flush()
    assert stream.buffer.getvalue() == ("-" if encoding == "ascii" else "·").encode() + b"\\udce9"


@pytest.mark.parametrize("arguments", [["status", "[/x]"], ["[/x]"], ["federation", "show", "--[/x]", "y"]])
def test_a_mistyped_argument_is_shown_as_it_is(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "[/x]" in done.stderr


def test_a_file_whose_path_has_brackets_is_named_rightly(tmp_path):
    bad = tmp_path / "run[v2]" / "bad [x].yaml"
    bad.parent.mkdir()
    bad.write_text('name: "[/x]"\n')
    done = CliRunner().invoke(app, ["federation", "create", str(bad)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"CONFIGURATION_INVALID {bad} is not a valid federation")
    assert "name = '[/x]'" in done.stderr


SPEAKS = """
import sys
from shelora.errors import DomainError, Reason
from shelora.terminal import CommandLine, Terminal
app = CommandLine(add_completion=False)
@app.command()
def run() -> None:
    Terminal().print("said " * 5000)
    Terminal(stderr=True).refuse(DomainError(Reason.DATA_INVALID, "it is refused"))
    sys.exit(2)
app()
"""


@pytest.mark.parametrize(
    ("output", "code", "told"),
    [
        (">/dev/full", 1, "the output, or a file, cannot be written: No space left on device\n"),
        ("1</dev/null", 1, "the output, or a file, cannot be written: Bad file descriptor\n"),
        ("--help >/dev/full", 1, "the output, or a file, cannot be written: No space left on device\n"),
        ("2>/dev/full", 2, ""),
        ("2>&-", 2, ""),
        (">&- 2>&- <&-", 2, ""),
        (">&-", 2, "DATA_INVALID it is refused\n"),
    ],
)
def test_an_output_that_cannot_be_written_is_no_traceback(output: str, code: int, told: str) -> None:
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(SPEAKS)} {output}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, told)
