"""Hooks of mkdocs: the README is the first page, and links to files outside docs/ become their names.

The documents are written to be read in a repository. In the site a link to a source file leads nowhere, so its text
stays and the link goes; `tests/unit/test_docs.py` checks that the file exists.
"""

import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).parents[1]
LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:  # noqa: ANN401 - mkdocs' hooks
    """Adds the README as the first page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401 - mkdocs' hooks
    """Rewrites the links of a page."""
    source = ROOT / ("README.md" if page.file.src_uri == "index.md" else f"docs/{page.file.src_uri}")
    here = (ROOT / "docs" / page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        found = (source.parent / path).resolve()
        if found == ROOT / "README.md":
            found = ROOT / "docs" / "index.md"
        inside = found.is_relative_to(ROOT / "docs")
        if not inside or found.is_dir():
            return text
        return f"{image}[{text}]({_relative(found, here)}{mark}{anchor})"

    return LINK.sub(rewritten, markdown)


def _relative(target: Path, start: Path) -> str:
    steps = len(start.relative_to(ROOT / "docs").parts)
    return "../" * steps + target.relative_to(ROOT / "docs").as_posix()
