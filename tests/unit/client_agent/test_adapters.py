"""Adapters on disk: whole, the newest and the best, whatever an agent dies of."""

import fcntl
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from client_agent.adapters import ADAPTER, ORIGIN, Newest
from client_agent.applying import Applier
from client_agent.state import AgentState, newest_adapter
from shelora.errors import DomainError, Reason
from shelora.v1 import common_pb2
from tests.unit.client_agent.notes import ranked


def save(state: AgentState, content: str, round_id: str = "fed.1.1") -> None:
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "tokenizer.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(content)

    state.adapters.save(round_id, write)


def dying_after(renames: int, real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """A rename that works so many times."""
    left = [renames]

    def dying(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, target)

    return dying


def as_note(federation: str, **others) -> bytes:
    """What is noted of a best adapter, with some fields changed."""
    return json.dumps({"format": 1, **asdict(ranked(federation, 1, 0.1)), **others}).encode()


def content_of(folder: Path) -> str:
    return (folder / "adapter_model.safetensors").read_text()


def test_an_adapter_is_replaced_as_a_whole(state):
    save(state, "1")
    (state.adapters.newest / "stale").write_text("")
    save(state, "2")
    assert content_of(state.adapters.newest) == "2"
    assert sorted(p.name for p in state.adapters.newest.iterdir()) == [
        "adapter_model.safetensors",
        "nested",
        ORIGIN,
    ]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in state.adapters.newest.rglob("*") if p.is_file()}
    assert modes == {0o600}


def test_the_card_of_an_adapter_is_replaced_and_goes_into_the_best_one(state):
    state.adapters.replace_card("# none yet")
    assert not state.adapters.newest.exists()
    save(state, "1")
    state.adapters.replace_card("# 90 %")
    assert state.adapters.keep_if_best(ranked("fed.1", 1, 0.5))
    assert (state.adapters.best / "README.md").read_text() == "# 90 %"
    assert stat.S_IMODE((state.adapters.newest / "README.md").stat().st_mode) == 0o600


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(state):
    save(state, "1")

    def breaks(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(DomainError) as full, state.writing():
        state.adapters.save("fed.1.1", breaks)
    assert full.value.reason is Reason.DISK_UNAVAILABLE
    assert content_of(state.adapters.newest) == "1"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_agent_that_dies_while_it_saves_has_an_adapter_when_it_starts_again(
    state, tmp_path, monkeypatch, renames
):
    save(state, "1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_after(renames, Path.rename))
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                save(state, "2")
        else:
            save(state, "2")
    fcntl.flock(state._lock, fcntl.LOCK_UN)  # as its death does
    again = AgentState(tmp_path / "state")
    assert content_of(again.adapters.newest) == ("2" if renames == 2 else "1")
    assert again.adapters.is_beside("fed.1.2")
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["adapter", "lock"]
    again.close()


def test_the_best_adapter_is_the_one_with_the_smallest_loss(state):
    kept = []
    for round_, loss in enumerate((2.0, 1.0, 1.5, float("nan"), 0.5)):
        save(state, str(round_))
        kept.append(state.adapters.keep_if_best(ranked("fed.1", round_, loss)))
    assert kept == [True, True, False, False, True]
    assert content_of(state.adapters.best) == content_of(state.adapters.newest) == "4"
    save(state, "5")
    assert not state.adapters.keep_if_best(ranked("fed.1", 5, 0.7))
    assert (content_of(state.adapters.best), content_of(state.adapters.newest)) == ("4", "5")


def test_an_adapter_of_another_federation_is_no_measure_even_if_that_had_the_same_name(state):
    save(state, "1", "fed.a.1")
    assert state.adapters.keep_if_best(ranked("fed.a", 1, 0.1))
    assert not state.adapters.keep_if_best(ranked("fed.a", 2, 9.0))
    assert state.adapters.is_beside("fed.a.2")
    for other in ("fed.b", "ward.a"):
        assert not state.adapters.is_beside(f"{other}.2")
        assert state.adapters.keep_if_best(ranked(other, 2, 9.0))
    shutil.rmtree(state.adapters.newest)
    assert not state.adapters.is_beside("fed.a.2"), "somebody deleted it"


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
    assert content_of(state.adapters.newest) == kept


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1, "round_id": "fed.1.1"}',
        b'{"format": 1, "round_id": 3}',
        as_note("fed.1", loss="0.1"),
        as_note("other.1", loss=0.1),
    ],
)
def test_a_note_that_is_damaged_or_of_another_federation_does_not_keep_the_next_one_from_being_best(
    state, note
):
    save(state, "1")
    assert state.adapters.keep_if_best(ranked("fed.1", 1, 0.1))
    (state.adapters.best / ORIGIN).write_bytes(note)
    assert state.adapters.keep_if_best(ranked("fed.1", 2, 9.0))
    assert json.loads((state.adapters.best / ORIGIN).read_bytes())["loss"] == 9.0
    assert not state.adapters.keep_if_best(ranked("fed.1", 3, 9.0)), "the control: a sound note counts"


def begun_from(number: int, of: int | None = None, name: str = "") -> Newest:
    """Args: of: the number of the result that this one was made from; None: not known."""
    start = "" if of is None else f"{of:064x}"
    return Newest(round_id=name or f"fed.1.{number}", number=number, start=start)


def ranked_best(state: AgentState, number: int, loss: float, *, settled: bool = False) -> bool:
    save(state, str(number))
    return state.adapters.keep_if_best(ranked("fed.1", number, loss, settled=settled))


def test_a_best_adapter_whose_result_is_taken_back_gives_way_to_the_one_before(state):
    assert ranked_best(state, 1, 1.0)
    assert not state.adapters.follow(begun_from(2, of=1))
    assert ranked_best(state, 2, 0.5)
    assert state.adapters.follow(begun_from(1)), "the federation goes on from the result before"
    assert content_of(state.adapters.best) == "1"
    assert ranked_best(state, 2, 0.9), "what counts is the loss of the one before"


def test_of_a_first_result_that_is_taken_back_the_loss_does_not_count_any_more(state):
    assert ranked_best(state, 1, 0.1)
    assert state.adapters.follow(Newest(round_id="fed.1.9", number=0))
    assert ranked_best(state, 1, 2.0)
    assert content_of(state.adapters.best) == "1"


def test_a_best_adapter_stays_once_a_result_was_made_from_its_own(state):
    for number, loss in ((1, 1.0), (2, 0.5)):
        assert ranked_best(state, number, loss)
        assert not state.adapters.follow(begun_from(number + 1, of=number))
    for later in (begun_from(4, of=3), begun_from(5, of=77), begun_from(9)):
        assert not state.adapters.follow(later)
    assert content_of(state.adapters.best) == "2"
    assert sorted(path.name for path in state.adapters.best.parent.iterdir()) == [
        "adapter",
        "adapter-best",
        "lock",
    ]


def test_a_best_adapter_is_given_up_if_its_result_was_taken_back_while_the_client_was_away(state):
    for newest in (begun_from(3, of=99), begun_from(4, of=3), begun_from(2, name="fed.1.7")):
        assert ranked_best(state, 1, 1.0, settled=True)
        assert ranked_best(state, 2, 0.5)
        assert state.adapters.follow(newest)
        assert content_of(state.adapters.best) == "1"
        shutil.rmtree(state.adapters.best)


def test_where_nothing_is_taken_back_a_best_adapter_stays(state):
    assert ranked_best(state, 1, 0.1, settled=True)
    assert not state.adapters.follow(begun_from(4))
    assert not ranked_best(state, 4, 0.2, settled=True)
    assert not state.adapters.follow(Newest(round_id="fed.2.1", number=0)), "another federation"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_agent_that_dies_while_it_keeps_the_best_has_it_or_the_one_before(
    state, tmp_path, monkeypatch, renames
):
    ranked_best(state, 1, 1.0)
    state.adapters.follow(begun_from(2, of=1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_after(renames, Path.rename))
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                state.adapters.keep_if_best(ranked("fed.1", 2, 0.5))
        else:
            assert state.adapters.keep_if_best(ranked("fed.1", 2, 0.5))
    fcntl.flock(state._lock, fcntl.LOCK_UN)  # as its death does
    again = AgentState(tmp_path / "state")
    note = json.loads((again.adapters.best / ORIGIN).read_bytes())
    assert note["number"] == (2 if renames == 2 else 1)
    assert again.adapters.follow(begun_from(1)) is (renames == 2)
    assert json.loads((again.adapters.best / ORIGIN).read_bytes())["number"] == 1
    again.close()


def test_what_is_not_there_is_named(state, tmp_path):
    with pytest.raises(DomainError, match="no round was published yet"):
        newest_adapter(tmp_path / "state")
    save(state, "1")
    assert newest_adapter(tmp_path / "state") == tmp_path / "state" / ADAPTER
    with pytest.raises(DomainError, match="none was evaluated on test examples yet"):
        newest_adapter(tmp_path / "state", best=True)
