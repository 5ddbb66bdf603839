"""What is installed from the wheel is whole: a server starts from it, away from the checkout."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel's contents, built from the files that git knows."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, names):
        file = ROOT / os.fsdecode(name)
        if file.is_file():
            target = source / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            wheels,
            ".",
        ],
        cwd=source,
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (wheel,) = wheels.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_it_holds_samples_and_types_and_no_tests(unpacked):
    assert (unpacked / "client_agent/sample.yaml").is_file()
    assert all(
        (unpacked / name / "py.typed").is_file()
        for name in ("shelora", "coordinator", "services", "client_agent")
    )
    assert not (unpacked / "tests").exists()


def test_a_key_authority_starts_from_it(unpacked, tmp_path):
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "services.key_authority.main"]
    flags = ["--data-dir", tmp_path / "data", "--ready-file", ready, "--listen", "127.0.0.1:0"]
    more = ["--enrolment-listen", "127.0.0.1:0", "--metrics-port", "-1"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "SHELORA_KEY_AUTHORITY_SEALING_KEY": "07" * 32}
    with subprocess.Popen([*command, *flags, *more], cwd=tmp_path, env=environment) as server:
        try:
            until = time.monotonic() + PATIENCE_S
            while not ready.exists() and server.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            assert json.loads(ready.read_text())["pid"] == server.pid
        finally:
            server.terminate()
    assert server.returncode == 0
