"""What is installed from the wheel is whole: a cluster starts from it, away from the checkout."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
    assert (unpacked / "shelora/dashboard/templates/base.html").is_file()
    assert not (unpacked / "tests").exists()


def test_every_server_starts_from_it(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    python = [sys.executable, "-P"]  # as servers are started; the checkout is not asked
    for name in ("shelora", "coordinator", "services", "client_agent"):
        asked = [*python, "-c", f"import {name}; print(*{name}.__path__)"]
        found = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
        assert Path(found.strip()) == unpacked / name
    folder = tmp_path / "cluster"
    command = [*python, "-m", "shelora.cli.main", "up", "--any-ports", "--workers", "1", "--folder", folder]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as up:
        try:
            while not (folder / "cluster.json").exists() and up.poll() is None:
                time.sleep(0.05)
            assert json.loads((folder / "cluster.json").read_text())["coordinator"]
        finally:
            up.terminate()
    assert up.returncode == 0
