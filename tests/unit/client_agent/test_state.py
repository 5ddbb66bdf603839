import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from client_agent.learning import Weights
from client_agent.state import AgentState
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.lora.shards import LoraFactors
from shelora.lora.sketches import Exponents
from shelora.transport.pieces import Digest
from tests.disk import no_file_larger_than
from tests.unit.client_agent.notes import NOTE

KEY = {"round": "films/1", "rank": "2"}


def some_weights() -> Weights:
    rng = np.random.default_rng(1)
    factors = LoraFactors(rng.random((5, 2), dtype=np.float32), rng.random((2, 3), dtype=np.float32))
    frozen = LoraFactors(rng.random((5, 1), dtype=np.float32), rng.random((1, 3), dtype=np.float32))
    tensors = {"head.bias": rng.random(4, dtype=np.float32)}
    bounds, changes = {"layer.q": Exponents(-3, 12)}, {"layer.q": (0.5, 1.0), "head.bias": ()}
    return Weights(
        factors={"layer.q": factors},
        tensors=tensors,
        frozen={"layer.q": frozen},
        exponents=bounds,
        changes=changes,
    )


def fill(state: AgentState) -> None:
    writer = state.begin_spool(NOTE.round_id)
    writer.add(b"one")
    writer.add(b"two!")
    writer.finish(NOTE)


def test_weights_come_back_as_they_were(state: AgentState) -> None:
    weights = some_weights()
    state.save_applied(KEY, weights)
    loaded = state.applied()
    assert loaded is not None
    key, back = loaded
    assert key == KEY
    np.testing.assert_array_equal(back.factors["layer.q"].A, weights.factors["layer.q"].A)
    np.testing.assert_array_equal(back.factors["layer.q"].B, weights.factors["layer.q"].B)
    np.testing.assert_array_equal(back.tensors["head.bias"], weights.tensors["head.bias"])
    np.testing.assert_array_equal(back.frozen["layer.q"].A, weights.frozen["layer.q"].A)
    np.testing.assert_array_equal(back.frozen["layer.q"].B, weights.frozen["layer.q"].B)
    assert back.exponents == weights.exponents
    assert back.changes == weights.changes


def test_an_applied_result_makes_earlier_training_obsolete(state: AgentState) -> None:
    state.save_trained(KEY, some_weights())
    assert state.trained() is not None
    state.save_applied(KEY, some_weights())
    assert state.trained() is None


def test_the_common_start_leaves_nothing_applied_and_what_was_trained(state: AgentState) -> None:
    for number in (1, 2):
        state.save_applied({"round": f"films/{number}"}, some_weights())
    state.save_trained(KEY, some_weights())
    state.forget_applied()
    assert (state.applied(), state.applied_before()) == (None, None)
    assert state.trained() is not None


def test_who_goes_back_still_knows_that_result_by_its_bytes(state: AgentState) -> None:
    for number in range(1, 5):  # the second round is repeated twice
        state.note_result(f"films/{number}", bytes([number]) * 32)
    state.require_result("films/1", bytes([1]) * 32)
    with pytest.raises(DomainError, match="another result of films/1") as refused:
        state.require_result("films/1", bytes([9]) * 32)
    assert refused.value.reason is Reason.COMMITTEE_REFUSED


def test_a_spool_survives_a_restart(tmp_path: Path) -> None:
    first = AgentState(tmp_path / "state")
    fill(first)
    first.close()
    second = AgentState(tmp_path / "state")
    spool = second.spool(NOTE.round_id, NOTE.layout_digest)
    second.close()
    assert spool is not None
    assert spool.note == NOTE
    assert spool.shards == (Digest.of(b"one"), Digest.of(b"two!"))
    assert [spool.read(0), spool.read(1)] == [b"one", b"two!"]
    assert spool.total_bytes == 7


def test_a_spool_without_its_manifest_does_not_count(state: AgentState) -> None:
    state.begin_spool(NOTE.round_id).add(b"one")
    assert state.spool(NOTE.round_id, NOTE.layout_digest) is None


@pytest.mark.parametrize("damage", [b"onX", b"on", None])
def test_a_spool_with_a_damaged_shard_does_not_count(
    state: AgentState, tmp_path: Path, damage: bytes | None
) -> None:
    fill(state)
    (shard,) = (tmp_path / "state").glob("spool/*/00000.shard")
    shard.unlink() if damage is None else shard.write_bytes(damage)
    assert state.spool(NOTE.round_id, NOTE.layout_digest) is None


def test_a_spool_of_another_round_or_layout_does_not_count(state: AgentState) -> None:
    fill(state)
    assert state.spool("films/2", NOTE.layout_digest) is None
    assert state.spool(NOTE.round_id, b"e" * 32) is None


def test_a_new_spool_deletes_the_old_one(state: AgentState) -> None:
    fill(state)
    state.begin_spool("films/2")
    assert state.spool(NOTE.round_id, NOTE.layout_digest) is None


def test_damaged_weights_count_as_none(state: AgentState, tmp_path: Path) -> None:
    state.save_applied(KEY, some_weights())
    file = tmp_path / "state" / "applied.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert state.applied() is None


def test_the_weights_before_the_last_result_are_kept_and_can_be_gone_back_to(state: AgentState) -> None:
    for name in ("1", "2", "3"):
        state.save_applied({"round": name}, some_weights())
    state.save_trained({"start": "3"}, some_weights())
    assert state.applied_before()[0] == {"round": "2"}
    state.take_back()
    assert state.applied()[0] == {"round": "2"}
    assert state.applied_before() is None
    assert state.trained() is None, "it was trained from what was taken back"
    state.save_applied({"round": "4"}, some_weights())
    assert state.applied_before()[0] == {"round": "2"}


@pytest.mark.parametrize("bounds", [[1.0], [1.0, 2.0, 3.0], [np.nan, 0.0], [np.inf, 0.0], [[1.0, 2.0]]])
def test_bounds_that_are_none_make_the_file_count_as_none(
    state: AgentState, tmp_path: Path, bounds: list[float]
) -> None:
    state.save_applied(KEY, some_weights())
    file = tmp_path / "state" / "applied.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays["exponents/layer.q"] = np.array(bounds, dtype=np.float32)
    safetensors.numpy.save_file(arrays, file, metadata=KEY)
    assert state.applied() is None


def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.replace(path, b"old")

    def power_cut(_descriptor: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="no power"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old"


def test_only_this_user_can_read_the_state(state: AgentState, tmp_path: Path) -> None:
    fill(state)
    state.save_applied(KEY, some_weights())
    for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_serves_one_agent_at_a_time(state: AgentState, tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="another agent uses it") as caught:
        AgentState(tmp_path / "state")
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


def test_round_names_cannot_leave_the_state_folder(state: AgentState, tmp_path: Path) -> None:
    state.begin_spool("../../outside")
    state.open_inbox("/outside")
    assert {p.name for p in tmp_path.iterdir()} == {"state"}


def test_a_download_is_accepted_only_with_its_announced_bytes(state: AgentState) -> None:
    inbox = state.open_inbox("films/1")
    digest = Digest.of(b"result")
    for wrong, reason in ((b"resul", Reason.TRANSFER_TRUNCATED), (b"resulT", Reason.DIGEST_MISMATCH)):
        inbox.partial(0).write_bytes(wrong)
        with pytest.raises(DomainError) as caught:
            inbox.accept(0, digest)
        assert caught.value.reason is reason
        assert not inbox.partial(0).exists()
    inbox.partial(0).write_bytes(b"result")
    inbox.accept(0, digest)
    assert inbox.has(0, digest)
    assert inbox.read(0) == b"result"


def test_an_inbox_of_another_result_is_deleted(state: AgentState, tmp_path: Path) -> None:
    state.open_inbox("films/1").partial(0).write_bytes(b"re")
    state.open_inbox("films/1")
    assert len(list((tmp_path / "state" / "inbox").rglob("*.part"))) == 1
    state.open_inbox("films/2")
    assert not list((tmp_path / "state" / "inbox").rglob("*.part"))


def large_weights() -> Weights:
    return Weights(factors={}, tensors={"head": np.ones(100_000, dtype=np.float32)})


WRITERS: dict[str, Callable[[AgentState], object]] = {
    "applied": lambda state: state.save_applied(KEY, large_weights()),
    "trained": lambda state: state.save_trained(KEY, large_weights()),
    "spool": lambda state: state.begin_spool("films/2").add(bytes(200_000)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_write_that_fails_is_named_and_leaves_what_was_finished_and_nothing_half_done(
    state: AgentState, tmp_path: Path, write: Callable[[AgentState], object]
) -> None:
    state.save_applied(KEY, some_weights())
    state.save_trained(KEY, some_weights())
    named = pytest.raises(DomainError, match="File too large; make room")
    with named as caught, no_file_larger_than(50_000), state.writing():
        write(state)
    assert caught.value.reason is Reason.DISK_UNAVAILABLE
    for saved in (state.applied(), state.trained()):
        assert saved is not None
        assert saved[0] == KEY
    kept = {"applied.safetensors", "trained.safetensors", "lock"}
    found = {path.name for path in (tmp_path / "state").rglob("*") if path.is_file()}
    assert found - {"before.safetensors"} == kept


def test_drafts_of_a_crash_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    AgentState(tmp_path / "state").close()
    (tmp_path / "state" / ".applied.safetensors.0123.draft").write_bytes(b"half")
    AgentState(tmp_path / "state").close()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["lock"]


def test_a_disk_with_too_little_room_is_named_with_both_numbers(tmp_path: Path) -> None:
    state = AgentState(tmp_path / "state", free_bytes=lambda _: 5_000_000)
    state.require_room(5_000_000)
    with pytest.raises(DomainError, match=r"5\.0 MB are free, .* 6\.0 MB; make room") as caught:
        state.require_room(6_000_000)
    assert caught.value.reason is Reason.DISK_UNAVAILABLE
    state.close()


def test_what_has_arrived_of_a_result_is_counted(state: AgentState) -> None:
    assert state.arrived_bytes("films/1") == 0
    state.open_inbox("films/1").partial(0).write_bytes(b"half")
    assert state.arrived_bytes("films/1") == 4


def test_the_strongest_protection_is_remembered_and_a_damaged_promise_is_not_forgotten(
    state: AgentState, tmp_path: Path
) -> None:
    assert state.promise() is None
    known = [(Level.SELECTIVE_OPE, Level.SELECTIVE_OPE), (Level.COMPLETE, Level.COMPLETE)]
    for level, strongest in (*known, (Level.NONE, Level.COMPLETE)):
        state.save_promise(level)
        assert state.promise() is strongest
    (tmp_path / "state" / "promise.json").write_text("{")
    with pytest.raises(DomainError, match=r"promise\.json is damaged; delete it"):
        state.promise()
