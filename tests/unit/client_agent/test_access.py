from pathlib import Path

import pytest

from client_agent import access
from client_agent.access import denial
from client_agent.checkpoint import load_checkpoint
from client_agent.data import read_examples
from shelora.errors import DomainError, Reason
from shelora.tasks import SEQUENCE_CLASSIFICATION


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like one that its owner copied: all may read its configuration, one alone its weights."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is that of a user without a name, who may not read weights: tests may run as root, who may."""
    monkeypatch.setattr(access.os, "access", lambda path, _mode: Path(path).suffix != ".safetensors")
    monkeypatch.setattr(access.os, "geteuid", lambda: 2**31 - 7)


def test_what_may_be_read_and_what_is_not_there_is_not_denied(model: Path):
    assert denial(model) == ""
    assert denial(model / "config.json") == ""
    assert denial(model / "nothing") == ""


@pytest.mark.usefixtures("stranger")
def test_weights_that_this_user_may_not_read_are_named_with_user_and_remedy(model: Path):
    assert denial(model).startswith(
        f"{model / 'model.safetensors'} may not be read by the user {2**31 - 7}: give it"
    )
    with pytest.raises(DomainError, match=r"model\.path: .*model\.safetensors may not be read") as caught:
        load_checkpoint(str(model), SEQUENCE_CLASSIFICATION, ("cold", "warm"))
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_folder_that_this_user_may_not_look_into_is_named(model: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert denial(model).startswith(f"{model} may not be read by the user ")


def test_examples_that_this_user_may_not_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(path: Path, *_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DomainError, match=r"train\.jsonl may not be read by the user .*chown") as caught:
        read_examples(tmp_path / "train.jsonl", "text", "label", ())
    assert caught.value.reason is Reason.DATA_INVALID
