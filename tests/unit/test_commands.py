"""Every command that a document shows in a block is run by a test, or is marked here with what running it takes.

That its targets, subcommands and options exist is checked by test_docs.py.
"""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.unit.test_docs import NAMES, ROOT, read

CLI = "tests/e2e/test_cli.py"
AUTHORITY = "tests/integration/key_authority/test_commands.py"
RUN = {
    r"shelora federation (create|start|show|rotate|stop|extend|export|report|delete)\b": (
        CLI,
        '"federation", "{}"',
    ),
    r"shelora (status|revocations)\b": (CLI, 'shelora("{}"'),
    r"shelora (token) create\b": (CLI, '"{}", "create"'),
    r"shelora (enroll)\b": (CLI, '["{}", "--authority"'),
    r"shelora (revoke)\b": (CLI, 'shelora("{}"'),
    r"shelora audit (show|verify)\b": (AUTHORITY, 'audit("{}"'),
    r"shelora (dashboard)\b": ("shelora/cli/page.py", '"{}"'),  # for make demo and tests/dashboard
    r"shelora-key-authority (make-sealing-key|reseal)\b": (AUTHORITY, '"{}"'),
    r"shelora-key-authority --data-dir\b": (
        "tests/integration/key_authority/test_process.py",
        '"services.key_authority.main"',
    ),
    r"client-agent (enroll)\b": (CLI, '"client_agent.main", "{}"'),
    r"client-agent (check)\b": ("tests/unit/client_agent/test_main.py", '["{}"'),
    r"client-agent doctor\b": ("tests/unit/client_agent/test_doctor.py", "examine("),
    r"client-agent (run)\b": ("tests/e2e/agents.py", '"{}", "--config"'),
    r"client-agent (export)\b": ("tests/unit/client_agent/test_merging.py", '"{}", "--config"'),
    r"make (demo-chat|demo-vision)\b": ("tests/demos/demo_guides.py", "make {}"),
    r"make (static|test|test-helm)\b": (".ci/run", "make {}"),
    r"python(?:3\.11)? -m (tests\.simulation)\b": ("tests/simulation/test_engine.py", "{}"),
    r"python -m examples\.own_trainer\.(script)\b": (
        "tests/e2e/test_own_trainer.py",
        '"examples.own_trainer.{}"',
    ),
    r"python -m examples\.(lite0)\b": ("tests/models/test_lite0.py", "write_{}("),
    r"helm install\b": ("deploy/helm/tests/test_chart.py", "def test_"),
}
"""By what a command begins with: the file that runs it, or the same code with the same words, and words in it."""
MARKED = {
    r"make (setup|check|fix|docs|up)\b": "what developers run all the time",
    r"make (demo(?!-)|bench|compare|load|simulate|attack)\b": "minutes or hours; documents give its figures",
    r"python -m (bench|compare|load)\b": "the same",
    r"make (images|push)\b|docker compose\b": "a container engine: make test-compose runs the cluster",
    r"kubectl\b": "a cluster: make test-pods runs the pods",
    r"(deploy/edge/install\.sh|systemctl|journalctl)\b": "root and systemd",
    r"(python3\.11 -m tests\.vectors|git)\b": "a machine of another architecture",
    r"pip install\b": "a package index",
    r"python llama\.cpp/": "a copy of llama.cpp, and its packages",
    r"cd\b": "nothing",
}
"""By what a command begins with: what running it takes."""
PROGRAM = re.compile(
    r"(?:shelora(?:-[a-z-]+)?|client-agent|make|python[\d.]*|helm|kubectl|docker|sudo|systemctl|journalctl|pip|git|cd"
    r"|deploy/\S+)\s(?![A-Z])"
)


def commands(text: str) -> list[str]:
    """The command lines in the blocks of a document, without what stands before their programs."""
    blocks = [t.content for t in MarkdownIt("commonmark").parse(text) if t.type in {"fence", "code_block"}]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split(" && ")]
    plain = [re.sub(r"^(?:sudo (?:-u \S+ )?|[A-Z_]+=\S+ |\$ |\S*\.?venv/bin/)+", "", part) for part in parts]
    return [part for part in plain if PROGRAM.match(f"{part} ")]


def begins(command: str) -> list[str]:
    return [one for one in (*RUN, *MARKED) if re.match(one, command)]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_a_document_is_run_or_marked(name):
    assert [command for command in commands(read(ROOT / name)) if len(begins(command)) != 1] == []


def test_what_is_said_to_run_a_command_has_its_words():
    for one, (place, words) in RUN.items():
        choices = re.search(r"\(([\w|.\\-]+)\)", one)
        for choice in choices[1].replace("\\", "").split("|") if choices else [""]:
            assert words.format(choice) in Path(ROOT, place).read_text(), (
                f"{one}: {place} does not run {choice}"
            )


def test_no_mark_is_left_without_a_command():
    shown = [command for name in NAMES for command in commands(read(ROOT / name))]
    assert [one for one in (*RUN, *MARKED) if not any(re.match(one, command) for command in shown)] == []


def test_a_command_that_nobody_knows_is_found():
    text = (
        "    sudo -u me /opt/venv/bin/shelora dance --fast  # well\n    a = b\n    PORT=1 make tea && cd /\n"
    )
    assert commands(text) == ["shelora dance --fast", "make tea", "cd /"]
    assert [begins(command) for command in commands(text)] == [[], [], [r"cd\b"]]
