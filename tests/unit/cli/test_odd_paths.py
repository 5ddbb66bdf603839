"""Names that are not a file, not a folder, or hold something else: one line and exit 2, no traceback."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from shelora.cli.folder import ADDRESSES
from shelora.cli.main import DEFAULT_FOLDER, app
from shelora.cli.reporting import reported

NOWHERE = ("--coordinator", "127.0.0.1:1", "--identity", "id")


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b'{"coordinator": 1}', b'{"a":', b"[" * 100_000],
    ids=["empty", "nothing", "list", "null", "no text", "one field", "cut", "deep"],
)
def test_addresses_of_a_cluster_that_are_none(content: bytes, tmp_path: Path) -> None:
    """Each was a traceback of json, or of what was made of it."""
    (tmp_path / DEFAULT_FOLDER).mkdir(parents=True)
    (tmp_path / DEFAULT_FOLDER / ADDRESSES).write_bytes(content)
    assert "cluster.json is not what `shelora up` writes" in refusal("status")


def test_a_folder_in_place_of_the_addresses(tmp_path: Path) -> None:
    (tmp_path / DEFAULT_FOLDER / ADDRESSES).mkdir(parents=True)
    assert "cluster.json: Is a directory" in refusal("status")


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/self/none", "n" * 300])
def test_a_cluster_where_no_folder_can_be(folder: str) -> None:
    assert "CONFIGURATION_INVALID" in refusal("up", "--folder", folder)


@pytest.mark.parametrize("path", ["none", ".", "file", "n" * 300, "file/below", "/dev/zero"])
@pytest.mark.parametrize(
    "command",
    [
        ("federation", "create", "PATH", *NOWHERE),
        ("enroll", "--authority", "127.0.0.1:1", "--identity", "id", "--token-file", "PATH"),
        ("status", "--coordinator", "127.0.0.1:1", "--identity", "PATH"),
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_is_none(command: tuple[str, ...], path: str) -> None:
    assert refusal(*(path if word == "PATH" else word for word in command))


def test_an_error_that_is_of_no_file_stays_one() -> None:
    with pytest.raises(ConnectionResetError), reported():
        raise ConnectionResetError
