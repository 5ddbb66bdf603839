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


def write() -> int:
    """Replaces the stubs."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for path in (Path(scratch) / PACKAGE).iterdir():
            shutil.copy(path, PACKAGE / path.name)
    return 0


def verify() -> int:
    """Compares; prints what differs."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / PACKAGE
        expected = {path.name for path in fresh.iterdir()}
        present = {path.name for path in PACKAGE.glob("*_pb2*")}
        differing = [n for n in expected & present if not filecmp.cmp(fresh / n, PACKAGE / n, shallow=False)]
    wrong = sorted({*differing, *(expected ^ present)})
    if wrong:
        sys.stderr.write(f"not what protos/ generate: {', '.join(wrong)}; run `make protos`\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    actions = {"write": write, "verify": verify}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(str(__doc__))
    sys.exit(actions[sys.argv[1]]())
