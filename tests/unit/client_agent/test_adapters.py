"""Adapters on disk: whole, the newest and the best, whatever an agent dies of."""

import fcntl
import json
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from client_agent import state as state_module
from client_agent.applying import Applier
from client_agent.state import AgentState, newest_adapter
from shelora.errors import DomainError, Reason
from shelora.v1 import common_pb2


def save(state: AgentState, content: str, round_id: str = "fed.a.1") -> None:
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "tokenizer.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(content)

    state.save_adapter(round_id, write)


def content_of(folder: Path) -> str:
    return (folder / "adapter_model.safetensors").read_text()


def test_an_adapter_is_replaced_as_a_whole(state):
    save(state, "1")
    (state.adapter_folder / "stale").write_text("")
    save(state, "2")
    assert content_of(state.adapter_folder) == "2"
    assert sorted(p.name for p in state.adapter_folder.iterdir()) == ["adapter_model.safetensors", "nested"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in state.adapter_folder.rglob("*") if p.is_file()}
    assert modes == {0o600}


def test_the_card_of_an_adapter_is_replaced_and_goes_into_the_best_one(state):
    state.replace_card("# none yet")
    assert not state.adapter_folder.exists()
    save(state, "1")
    state.replace_card("# 90 %")
    assert state.keep_if_best("fed.a.1", 0.5)
    assert (state.best_folder / "README.md").read_text() == "# 90 %"
    assert stat.S_IMODE((state.adapter_folder / "README.md").stat().st_mode) == 0o600


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(state):
    save(state, "1")

    def breaks(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(DomainError) as full, state.writing():
        state.save_adapter("fed.a.1", breaks)
    assert full.value.reason is Reason.DISK_UNAVAILABLE
    assert content_of(state.adapter_folder) == "1"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_agent_that_dies_while_it_saves_has_an_adapter_when_it_starts_again(
    state, tmp_path, monkeypatch, renames
):
    save(state, "1")
    real, left = Path.rename, [renames]

    def dying(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                save(state, "2")
        else:
            save(state, "2")
    fcntl.flock(state._lock, fcntl.LOCK_UN)  # as its death does
    again = AgentState(tmp_path / "state")
    assert content_of(again.adapter_folder) == ("2" if renames == 2 else "1")
    assert again.has_adapter_beside("fed.a.2") == (renames == 2), "of one whose note is lost nothing is known"
    note = ["adapter.json"] if renames == 2 else []
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["adapter", *note, "lock"]
    again.close()


def test_the_best_adapter_is_the_one_with_the_smallest_loss(state):
    kept = []
    for round_, loss in enumerate((2.0, 1.0, 1.5, float("nan"), 0.5)):
        save(state, str(round_))
        kept.append(state.keep_if_best(f"fed.1.{round_}", loss))
    assert kept == [True, True, False, False, True]
    assert content_of(state.best_folder) == content_of(state.adapter_folder) == "4"
    save(state, "5")
    assert not state.keep_if_best("fed.1.5", 0.7)
    assert (content_of(state.best_folder), content_of(state.adapter_folder)) == ("4", "5")


def test_an_adapter_of_another_federation_is_no_measure_even_if_that_had_the_same_name(state):
    save(state, "1", "fed.a.1")
    assert state.keep_if_best("fed.a.1", 0.1)
    assert not state.keep_if_best("fed.a.2", 9.0)
    assert state.has_adapter_beside("fed.a.2")
    for other in ("fed.b.2", "ward.a.2"):
        assert not state.has_adapter_beside(other)
        assert state.keep_if_best(other, 9.0)
    shutil.rmtree(state.adapter_folder)
    assert not state.has_adapter_beside("fed.a.2"), "somebody deleted it"


@dataclass
class Objecting:
    """Holds every result, and objects to it."""

    objection: str = "the loss is larger"

    def holds(self, _round_id):
        return True

    def save_adapter(self, folder, *, made):
        (folder / "adapter_model.safetensors").write_text(f"of round {made.number}")


async def run(call, *arguments):
    return call(*arguments)


async def nothing(*_arguments, **_named):
    pass


@pytest.mark.parametrize(
    ("before", "kept"), [("fed.a.1", "before"), ("fed.b.1", "of round 2"), (None, "of round 2")]
)
async def test_who_objects_to_the_last_result_keeps_the_adapter_before_it_if_that_is_of_this_federation(
    state, before, kept
):
    if before:
        save(state, "before", before)
    session, worker = SimpleNamespace(object_to_result=nothing), SimpleNamespace(run=run)
    applier = Applier(
        SimpleNamespace(protection=SimpleNamespace(mode="complete")),
        SimpleNamespace(learner=Objecting(), worker=worker, session=session, state=state),
        keyring=None,
        plans=None,
        resources=SimpleNamespace(require=nothing),
        committees=None,
    )
    await applier.keep(common_pb2.ResultRef(round_id="fed.a.2", round_number=2), None, None)
    assert content_of(state.adapter_folder) == kept


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": 2}',
        b'{"format":1,"round":"x.a.1","loss":0}',
        b'{"format":1,"round":3,"loss":0}',
    ],
)
def test_a_note_that_is_damaged_or_of_another_federation_does_not_keep_the_next_one_from_being_best(
    state, tmp_path, note
):
    save(state, "1")
    (tmp_path / "state" / "best.json").write_bytes(note)
    assert state.keep_if_best("fed.1.1", 9.0)
    assert json.loads((tmp_path / "state" / "best.json").read_bytes())["loss"] == 9.0


def test_what_is_not_there_is_named(state, tmp_path):
    with pytest.raises(DomainError, match="no round was published yet"):
        newest_adapter(tmp_path / "state")
    save(state, "1")
    assert newest_adapter(tmp_path / "state") == tmp_path / "state" / state_module.ADAPTER
    with pytest.raises(DomainError, match="none was evaluated on test examples yet"):
        newest_adapter(tmp_path / "state", best=True)
