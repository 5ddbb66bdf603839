"""Which model a federation has: that of most of those who joined, whoever came first."""

import pytest

from coordinator import checks
from coordinator.records import Phase
from shelora.errors import DomainError, Reason
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.world import spec

ODD = [common_pb2.Matrix(name="x", out_features=1, in_features=1)]


async def join_oddly(fed, client: str) -> None:
    request = pb.JoinRequest(client_id=client, rank=1, budget=1.0, example_count=1, protocol_version=1)
    await fed.handlers.members.join("fed", checks.member(request, fed.now_ms), ODD, [])


async def test_a_hostile_first_joiner_fixes_nothing_and_is_told_by_name(fed):
    await fed.handlers.federations.create(spec(clients=3))
    await fed.handlers.federations.start("fed")
    await join_oddly(fed, "evil")
    for client in "ab":
        await fed.join(client)
    await fed.settle()
    record = await fed.federation()
    assert [matrix.name for matrix in record.model.matrices] == ["layer.0.query", "layer.0.value"]
    shown = {member.client_id: member.reason for member in (await fed.shown()).members}
    assert shown == {"a": "", "b": "", "evil": "MODEL_MISMATCH"}
    watch = fed.handlers.watching.watch("fed", "evil")
    with pytest.raises(DomainError) as unknown:
        await anext(watch)
    assert unknown.value.reason is Reason.CLIENT_UNKNOWN, "so that it joins again"
    with pytest.raises(DomainError, match=r"matrix x \[1, 1\] differs") as refused:
        await join_oddly(fed, "evil")
    assert refused.value.reason is Reason.MODEL_MISMATCH
    await fed.join("c")
    fed.silent = {"evil"}
    assert (await fed.play()).phase is Phase.FINISHED


async def test_without_a_majority_the_federation_waits_for_others(fed):
    await fed.handlers.federations.create(spec(clients=2))
    await fed.handlers.federations.start("fed")
    await join_oddly(fed, "evil")
    await fed.join("a")
    await fed.settle()
    assert (await fed.federation()).model is None
    assert "have different models" in (await fed.assignment("a")).wait.why
    assert [member.reason for member in (await fed.shown()).members] == ["MODEL_MISMATCH"] * 2
    await fed.join("b")
    await fed.settle()
    assert (await fed.assignment("a")).HasField("vote")


async def test_a_stream_that_is_open_when_the_model_is_fixed_ends_for_those_with_another(fed):
    await fed.handlers.federations.create(spec(clients=3))
    await join_oddly(fed, "evil")
    watch = fed.handlers.watching.watch("fed", "evil")
    await anext(watch)
    for client in "ab":
        await fed.join(client)
    await fed.handlers.federations.start("fed")
    await fed.settle()
    fed.changes.wake_all()
    with pytest.raises(DomainError) as unknown:
        await anext(watch)
    assert unknown.value.reason is Reason.CLIENT_UNKNOWN


async def test_a_revoked_members_model_is_forgotten(fed):
    await fed.handlers.federations.create(spec(clients=2))
    await fed.handlers.federations.start("fed")
    for client in ("evil", "evil-too"):
        await join_oddly(fed, client)
    record = await fed.federation()
    shapes = await fed.store.members.shapes("fed", "evil")
    await fed.store.federations.write(
        "fix_model", record.model_copy(update={"model": shapes}), await fed.store.federations.read("fed")
    )
    fed.revoked = {"evil": fed.now_ms, "evil-too": fed.now_ms}
    fed.now_ms += 1000
    await fed.settle()
    for client in "ab":
        await fed.join(client)
    assert (await fed.play()).phase is Phase.FINISHED


async def test_shapes_are_kept_until_the_first_round_only(fed):
    await fed.begin(spec())
    assert await fed.store.members.shapes("fed", "a") is not None
    await fed.settle()
    assert await fed.store.members.shapes("fed", "a") is None
    await fed.join("late")
    assert await fed.store.members.shapes("fed", "late") is None
