"""What documents say exists: linked files and headings, commands that are shown, pictures drawn from tables."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

from client_agent.main import app as agent
from coordinator.main import app as coordinator
from services.aggregation.main import app as aggregation
from services.key_authority.main import app as key_authority
from shelora.cli.main import app as operator
from shelora.rounds import TRANSITIONS, Event, RoundState
from tools import diagrams, prose

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
PROGRAMS = {
    "shelora": operator,
    "client-agent": agent,
    "shelora-key-authority": key_authority,
    "shelora-coordinator": coordinator,
    "shelora-aggregation": aggregation,
}


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(path: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Names of headings, as the usual hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken(path: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(without_code(path)):
        place, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        leads = (path.parent / place).resolve() if place else path
        heads = leads / "README.md" if leads.is_dir() else leads
        if not leads.exists() or (anchor and heads.suffix == ".md" and anchor not in anchors(heads)):
            found.append(target)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert not broken(ROOT / name)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n[a](#one-two-three) [b](#four) [c](other.md)\n```\n[d](no.md)\n```\n"
    )
    assert broken(page) == ["#four", "other.md"]


@pytest.mark.parametrize("name", NAMES)
def test_prose_fits_into_its_lines(name):
    assert prose.wrapped(read(ROOT / name)) == read(ROOT / name), "run `make fix`"


def test_what_is_wrapped_reads_the_same_and_means_the_same():
    text = (
        f"# {'heading ' * 20}\n\n{'word ' * 30}`a span of code` and {'more ' * 12}- not an item\n\n"
        f"1. {'item ' * 40}\n   [a link]({'x' * 120})\n\n| {'cell ' * 40} |\n|---|\n\n    {'code ' * 40}\n"
    )
    lines = prose.wrapped(text).splitlines()
    assert " ".join("\n".join(lines).split()) == " ".join(text.split())
    assert max(len(line) for line in lines if re.match(r"[a-z]|1\.|   \S*item", line)) <= prose.WIDTH
    assert [line for line in lines if line.startswith(("#", "|", "    "))] == [
        line for line in text.splitlines() if line.startswith(("#", "|", "    "))
    ]
    assert not any(line.startswith("- ") for line in lines)
    assert prose.wrapped(prose.wrapped(text)) == prose.wrapped(text)


def code(path: Path) -> list[str]:
    """Lines of blocks of code, and code within lines; a backslash joins lines."""
    text = read(path).replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^(?: {4}|\t)(.+)$", text, flags=re.MULTILINE)
    return [
        *(line for block in blocks for line in block.splitlines()),
        *indented,
        *re.findall(r"`([^`\n]+)`", text),
    ]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_and_modules_that_are_shown_exist(name):
    shown = "\n".join(code(ROOT / name))
    unknown = set(re.findall(r"^\s*(?:sudo )?make ([a-z][a-z-]*)", shown, flags=re.MULTILINE)) - targets()
    assert not unknown
    calls = re.findall(r"^\s*make [a-z-]+((?: [A-Z_]+=\S*)+)", shown, flags=re.MULTILINE)
    variables = {variable for call in calls for variable in re.findall(r" ([A-Z_]+)=", call)}
    assert variables <= set(re.findall(r"\$\(([A-Z_]+)", read(ROOT / "Makefile")))
    for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z0-9_]+)*)", shown):
        place = ROOT.joinpath(*module.split("."))
        if (ROOT / module.split(".")[0]).is_dir():
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def unknown_options(line: str) -> list[str]:
    """Long options of a line with `python -m MODULE` that no source of our module knows, by its own name or typer's."""
    command = re.search(r"python -m ([a-z_]+(?:\.[a-z0-9_]+)*)(.*)", line)
    if not command:
        return []
    module, arguments = command[1], command[2].partition("#")[0]
    place = ROOT.joinpath(*module.split("."))
    sources = [*place.glob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    if not sources or not sources[0].exists():  # not ours
        return []
    text = "\n".join(map(read, sources))
    options = re.findall(r"(?<!\S)--(?:no-)?([a-z][a-z-]*)", arguments)
    return [
        f"--{name}"
        for name in options
        if f'"--{name}"' not in text and not re.search(rf"\b{name.replace('-', '_')}\b\s*:", text)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_options_of_our_modules_that_are_shown_exist(name):
    assert [option for line in code(ROOT / name) for option in unknown_options(line)] == []


def test_an_option_that_a_module_does_not_have_is_found():
    assert unknown_options("python -m load --agents 4 --speed 9  # --no-such") == ["--speed"]
    assert unknown_options("python -m pip --whatever") == []


def unknown_command(words: list[str]) -> str:
    """What of a command line our programs do not have; "" if they have it all."""
    group = typer.main.get_command(PROGRAMS[Path(words[0]).name])
    for position, word in enumerate(words[1:], start=1):
        commands = getattr(group, "commands", None)
        if not commands or word.startswith("--"):
            options = {
                option
                for parameter in group.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            long = [w.partition("=")[0] for w in words[position:] if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", w)]
            return next((w for w in long if w not in {*options, "--help"}), "")
        if not re.fullmatch(r"[a-z][a-z-]*", word):
            return ""
        if word not in commands:
            return word
        group = commands[word]
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_our_programs_that_are_shown_exist_with_their_options(name):
    for line in code(ROOT / name):
        command = re.match(
            r"\s*(?:\$ )?(?:docker compose exec \w+ )?((?:\.venv/bin/)?"
            rf"(?:{'|'.join(PROGRAMS)}) [a-z-].*)",
            line,
        )
        if not command:
            continue
        try:
            words = shlex.split(command[1], comments=True)
        except ValueError:  # prose in the middle of a line
            continue
        end = next((i for i, w in enumerate(words) if w in {"|", "&&", ">", "||", ";"}), len(words))
        assert not unknown_command(words[:end]), line


def test_a_command_or_an_option_that_does_not_exist_is_found():
    assert unknown_command(["shelora", "federation", "explode"]) == "explode"
    assert unknown_command(["shelora", "federation", "show", "x", "--wach"]) == "--wach"
    assert unknown_command(["shelora-key-authority", "--data-dirs", "x"]) == "--data-dirs"
    assert not unknown_command(["shelora", "federation", "show", "x", "--watch"])


def test_pictures_of_the_state_machines_are_drawn_from_the_tables():
    assert diagrams.differing() == ""


def test_a_table_that_is_no_path_is_not_drawn_as_one():
    for change in (
        {(RoundState.COLLECTING, Event.ABANDON): RoundState.SELECTING},
        {(RoundState.PUBLISHED, Event.OPEN): RoundState.COLLECTING},
        {(RoundState.AGGREGATING, Event.CERTIFY): RoundState.KEYING},
    ):
        with pytest.raises(ValueError, match="no longer a path"):
            diagrams.path_of({**TRANSITIONS, **change})
    less = {k: v for k, v in TRANSITIONS.items() if k != (RoundState.SELECTING, Event.ABANDON)}
    with pytest.raises(ValueError, match="no longer a path"):
        diagrams.path_of(less)


def test_every_state_and_event_of_a_table_is_in_its_picture():
    for name, table in diagrams.MACHINES.items():
        picture = read(ROOT / diagrams.IMAGES / name)
        words = {word for (state, event), target in table.items() for word in (state, event, target)}
        assert words <= set(re.findall(r">([A-Z]+)<", picture))
