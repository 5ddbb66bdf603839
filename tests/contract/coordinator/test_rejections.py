"""Members that reject plans: a lone one costs its own part, a majority the plan, and none of them a result."""

import pytest

from coordinator.records import Phase
from shelora.errors import DomainError, Reason
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import spec


@pytest.fixture(params=["sealed", "ope"])
def negotiation(request):
    return request.param


async def reject(fed, *clients: str) -> int:
    """Has these members reject the plan of the round in progress. Returns its number."""
    plan = (await fed.federation()).plan
    for client in clients:
        await fed.handlers.plans.reject("fed", client, plan.number, plan.digest.sha256, "other ranking")
    return plan.number


async def play_with_rejecters(fed, clients: str, turns: int = 60) -> None:
    """Plays to the end; these members reject every plan they are given in place of training."""
    for _ in range(turns):
        await fed.settle()
        if (await fed.federation()).ended:
            return
        fed.idle = set()
        for client in clients:
            if (await fed.assignment(client)).HasField("train"):
                await reject(fed, client)
                fed.idle.add(client)
        await fed.settle()
        await fed.act()
        fed.now_ms += 1000
    raise AssertionError(f"no end: {await fed.federation()}")


async def test_one_member_that_rejects_every_plan_sits_out_and_the_others_finish(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation, rounds=3), "abcd")
    await play_with_rejecters(fed, "d")
    record, shown = await fed.federation(), await fed.shown()
    assert (record.phase, record.plan.number) == (Phase.FINISHED, 1)
    assert [outcome for *_, outcome, _ in outcomes(shown)] == ["PUBLISHED"] * 4, "no round was lost over it"
    trained = [{update.client_id for update in r.updates} for r in shown.history if r.number]
    assert trained == [set("abc")] * 3
    assert [r.cohort_count for r in shown.history if r.number] == [4, 3, 3], "it is not asked again"
    assert [(m.client_id, m.reason) for m in shown.members if m.reason] == [("d", "PLAN_REFUSED")]


async def test_more_than_half_of_a_cohort_discard_a_plan(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation), "abcd")
    await until_training(fed)
    number = await reject(fed, "a", "b")
    await fed.settle()
    assert (await fed.federation()).plan.number == number, "half is not more than half"
    await reject(fed, "c")
    await fed.settle()
    record = await fed.federation()
    assert record.plan is None
    assert record.phase is (Phase.RUNNING if negotiation == "sealed" else Phase.FAILED), (
        "ope has one candidate"
    )


async def test_a_plan_that_leaves_too_few_to_train_by_it_is_discarded(fed):
    await fed.begin(spec(clients=2), "ab")
    await until_training(fed)
    await reject(fed, "b")
    await fed.settle()
    assert (await fed.assignment("b")).make_plan.plan_number == 2
    assert (await fed.play()).phase is Phase.FINISHED


async def test_no_rejection_discards_a_plan_once_a_round_under_it_has_closed(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation), "abcd")
    await until_training(fed)
    await fed.act()
    await fed.settle()
    number = await reject(fed, "a", "b", "c")
    await fed.settle()
    record = await fed.federation()
    assert (record.plan.number, record.accepted_plan, record.phase) == (number, number, Phase.RUNNING)
    assert (await fed.shown()).history[-1].reason == "PLAN_REFUSED", "too few are left for this round"
    await fed.handlers.federations.rotate("fed", 0)  # the operator's way out: another vote
    assert (await fed.play()).phase is Phase.FINISHED


async def test_a_federation_with_a_result_never_fails_over_a_plan(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation, rounds=3, replan_every_rounds=2), "abcd")
    while (await fed.federation()).trained < 2:
        await fed.settle()
        await fed.act()
        fed.now_ms += 1000
    first = (await fed.federation()).result_plan.number
    for _ in range(40):
        await fed.settle()
        record = await fed.federation()
        if record.ended:
            break
        if record.plan and record.plan.number != first and record.ticket and record.ticket.plan:
            await reject(fed, "a", "b", "c", "d")
        else:
            await fed.act()
        fed.now_ms += 1000
    record = await fed.federation()
    assert (record.phase, record.result_plan.number) == (Phase.FINISHED, first)
    assert record.plan_count > first, "others were made, and rejected by all"


async def test_a_stranger_to_the_round_discards_nothing(fed):
    await fed.begin(spec(), "abc")
    await until_training(fed)
    for late in "xyz":
        await fed.join(late)
    await reject(fed, "x", "y", "z")
    await fed.settle()
    assert (await fed.federation()).plan is not None
    with pytest.raises(DomainError) as refused:
        await fed.handlers.plans.reject("fed", "nobody", 1, "00" * 32, "no")
    assert refused.value.reason is Reason.CLIENT_UNKNOWN
