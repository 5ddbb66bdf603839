"""Generates shelora/v1 from protos/, or verifies that it is what protos/ generate.

python -m tools.stubs write|verify
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.command import write_or_verify

PROTOS: Final = Path("protos")
PACKAGE: Final = Path("shelora/v1")


def generate(target: Path) -> None:
    """Writes the stubs below `target`."""
    plugins = Path(sys.executable).parent
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    named = [f"--plugin={name}={plugins / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    files = [str(path) for path in sorted(PROTOS.rglob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *named, *outputs, *files]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # noqa: S603 - our own arguments


def write() -> None:
    """Replaces the stubs."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for path in (Path(scratch) / PACKAGE).iterdir():
            shutil.copy(path, PACKAGE / path.name)


def differing() -> str:
    """Which stubs are others, in words; "" for none."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / PACKAGE
        expected = {path.name for path in fresh.iterdir()}
        present = {path.name for path in PACKAGE.glob("*_pb2*")}
        altered = [n for n in expected & present if not filecmp.cmp(fresh / n, PACKAGE / n, shallow=False)]
    wrong = sorted({*altered, *(expected ^ present)})
    return f"not what protos/ generate: {', '.join(wrong)}; run `make protos`" if wrong else ""


if __name__ == "__main__":
    write_or_verify(__doc__, write, differing)
