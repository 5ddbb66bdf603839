"""Wraps paragraphs of documents that have too long a line, or verifies that none has.

Tables, code, headings and paragraphs that fit stay as they are.

python -m tools.prose write|verify
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

from tools.command import write_or_verify

WIDTH: Final = 110
"""Characters of a line."""
PLACES: Final = ("*.md", "docs/**/*.md", "deploy/**/*.md", "tests/**/*.md")
_WORD: Final = re.compile(r"(?:`[^`]*`|\]\([^)]*\)|\S)+")
"""What stays on one line: a word, a span of code, the target of a link."""
_MARKUP: Final = re.compile(r"(?:[-*+>#]|\d+[.)])$|[|<=]")
"""Words that would not be words at the beginning of a line."""


def wrapped(text: str) -> str:
    """A document whose paragraphs fit into lines."""
    lines = text.splitlines()
    for begin, end in reversed(list(_paragraphs(text))):
        if any(len(line) > WIDTH for line in lines[begin:end]):
            lines[begin:end] = _filled(lines[begin:end])
    return "".join(f"{line}\n" for line in lines)


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Numbers of the first line of each paragraph and of the line after it."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "paragraph_open" and token.map:
            yield token.map[0], token.map[1]


def _filled(paragraph: list[str]) -> list[str]:
    """A paragraph in lines as full as they may be; what follows an item's mark stands below its first word."""
    mark = re.match(r" *(?:(?:[-*+]|\d+[.)]) +)?", paragraph[0])
    assert mark is not None
    first = mark[0]
    lines = [first]
    for word in _WORD.findall(" ".join(paragraph)[len(first) :]):
        line = lines[-1]
        blank = " " if line.strip() and line != first else ""
        if not blank or len(line) + 1 + len(word) <= WIDTH or _MARKUP.match(word):
            lines[-1] = f"{line}{blank}{word}"
        else:
            lines.append(" " * len(first) + word)
    return lines


def _documents() -> list[Path]:
    return sorted(path for pattern in PLACES for path in Path().glob(pattern))


def write() -> None:
    """Wraps what is too long."""
    for path in _documents():
        text = path.read_text(encoding="utf-8")
        if wrapped(text) != text:
            path.write_text(wrapped(text), encoding="utf-8")


def differing() -> str:
    """Which documents have lines that are too long, in words; "" for none."""
    texts = {path: path.read_text(encoding="utf-8") for path in _documents()}
    wrong = [str(path) for path, text in texts.items() if wrapped(text) != text]
    return f"lines of prose over {WIDTH} characters: {', '.join(wrong)}; run `make fix`" if wrong else ""


if __name__ == "__main__":
    write_or_verify(__doc__, write, differing)
