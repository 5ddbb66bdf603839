"""A member that rejects plans, never trains, gives up, or comes first with another model: the others finish."""

import asyncio
import time

import pytest

from shelora.errors import Reason
from shelora.transport.channel import call
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.insiders.lab import Hostile, Lab, refusal

DEADLINE_S = 3600


async def reject_every_plan(hostile: Hostile) -> int:
    """Rejects the plan of every round. Returns how many it rejected."""
    rejected = 0
    watch = hostile.coordinator.Watch(
        pb.WatchRequest(federation_id=hostile.federation, client_id=hostile.name)
    )
    async for assignment in watch:
        match assignment.WhichOneof("work"):
            case "train":
                plan = assignment.train.plan
                request = pb.RejectPlanRequest(
                    federation_id=hostile.federation,
                    client_id=hostile.name,
                    plan_number=plan.plan_number,
                    sha256=plan.digest.sha256,
                    why="\x1b[31mno\x1b[0m\nforged log line",
                )
                await call(hostile.coordinator.RejectPlan, request, retry_s=0)
                rejected += 1
            case "finish" | "halt":
                break
    return rejected


@pytest.mark.parametrize("negotiation", ["sealed", "ope"])
async def test_one_that_rejects_every_plan_of_four_is_named_and_sits_out(lab: Lab, negotiation: str):
    spec = await lab.create(
        f"rejected-{negotiation}",
        round={"rounds": 2, "clients": 4},
        protection={"negotiation": negotiation},
    )
    async with (
        lab.running(spec, "a", "b", "c") as members,
        lab.hostile(spec, "zz-evil") as hostile,
        hostile.member(),
    ):
        rejected = asyncio.create_task(reject_every_plan(hostile))
        # It joins, so that it is in the cohort, and does not vote: the vote closes without it.
        assert await members == ["finished"] * 3
        assert await rejected >= 1, "the attack took place"
    shown = await lab.view(spec)
    assert (shown.phase, shown.trained_rounds) == (pb.PHASE_FINISHED, 2)
    (said,) = [member for member in shown.members if member.client_id == "zz-evil"]
    assert said.reason == "PLAN_REFUSED"
    assert "\x1b" not in said.why


async def test_one_that_joins_beats_and_never_trains_costs_a_grace_and_no_deadline(lab: Lab):
    spec = await lab.create("idle", round={"rounds": 2, "clients": 4, "deadline_s": DEADLINE_S})
    begun = time.monotonic()
    async with lab.running(spec, "a", "b", "c") as members, lab.hostile(spec) as hostile, hostile.member():
        assert await members == ["finished"] * 3
    shown = await lab.view(spec)
    assert shown.phase == pb.PHASE_FINISHED
    assert [r.update_count for r in shown.history] == [3, 3, 3], "a vote and two rounds"
    assert time.monotonic() - begun < DEADLINE_S / 10, (
        "a thirtieth of one deadline, were it not for a busy machine"
    )


async def test_one_that_comes_first_with_a_model_of_its_own_fixes_nothing(lab: Lab):
    spec = await lab.create("first", round={"clients": 3})
    odd = [common_pb2.Matrix(name="x", out_features=1, in_features=1)]
    async with lab.hostile(spec) as hostile, hostile.member(matrices=odd, tensors=[], rank=1):
        async with lab.running(spec, "a", "b", "c") as members:
            assert await members == ["finished"] * 3
        assert await refusal(hostile.join(matrices=odd, tensors=[])) is Reason.FEDERATION_CLOSED
    shown = await lab.view(spec)
    assert {m.client_id: m.reason for m in shown.members if m.reason} == {"hostile": "MODEL_MISMATCH"}


async def test_one_that_claims_to_give_up_for_others_or_in_escapes_is_refused(lab: Lab):
    spec = await lab.create("quitter", round={"clients": 3})
    async with lab.running(spec, "a", "b") as members, lab.hostile(spec) as hostile, hostile.member():
        assignment = await hostile.assignment("vote")
        fields = {
            "federation_id": spec.name,
            "client_id": hostile.name,
            "assignment_id": assignment.assignment_id,
            "reason": "DATA_INVALID",
            "why": "no",
        }
        for changes, reason in (
            ({"client_id": "a"}, Reason.PERMISSION_DENIED),
            ({"why": "\x1b[2J"}, Reason.INVALID_ARGUMENT),
            ({"why": "x" * 501}, Reason.INVALID_ARGUMENT),
            ({"reason": "BECAUSE"}, Reason.INVALID_ARGUMENT),
        ):
            request = pb.GiveUpRequest(**{**fields, **changes})
            assert await refusal(call(hostile.coordinator.GiveUp, request, retry_s=0)) is reason
        await call(hostile.coordinator.GiveUp, pb.GiveUpRequest(**fields), retry_s=0)  # the control
        assert await members == ["finished"] * 2, "nobody waits for it"
    vote = (await lab.view(spec)).history[0]
    assert [(d.client_id, d.reason, d.gave_up) for d in vote.dropped] == [("hostile", "DATA_INVALID", True)]
