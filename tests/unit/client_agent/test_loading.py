"""Packages that do not load here are named, with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from client_agent.loading import check_loading
from client_agent.main import _exit_with
from shelora.errors import DomainError, Reason


def test_packages_that_load_pass() -> None:
    check_loading(("json", "yaml"))


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise ImportError('libcupti.so.13: cannot open shared object file')", "libcupti.so.13"),
    ],
)
def test_a_package_for_another_processor_is_named_with_what_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, seen: str
) -> None:
    (tmp_path / "built_elsewhere.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DomainError) as caught:
        check_loading(("json", "built_elsewhere"))
    assert caught.value.reason is Reason.PACKAGE_UNUSABLE
    assert "built_elsewhere cannot be loaded" in caught.value.message
    assert seen in caught.value.message


def test_an_agent_whose_package_does_not_load_is_not_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> int:
        raise ImportError("libtorch_cpu.so: undefined symbol", name="torch._C")

    with pytest.raises(SystemExit) as ended:
        _exit_with(action)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("client-agent: PACKAGE_UNUSABLE torch._C cannot be loaded")
    assert "Traceback" not in said


def test_what_is_imported_is_neither_collected_meanwhile_nor_at_the_end() -> None:
    code = (
        "import gc\n"
        "from client_agent.loading import uncollected\n"
        "with uncollected():\n"
        "    assert not gc.isenabled()\n"
        "    import atexit\n"
        "    atexit._run_exitfuncs()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
