"""Renegotiation in mid-federation, under both protocols, against a real store."""

import pytest

from coordinator.records import Phase
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import spec


@pytest.fixture(params=["sealed", "ope"])
def negotiation(request):
    return request.param


async def plans_of_rounds(fed, before_round=lambda _: None) -> dict[int, tuple[int, int]]:
    """Plays to the end. Returns (plan, plan of the base) by training round."""
    seen = {}
    while not (await fed.federation()).ended:
        await fed.settle()
        train = (await fed.assignment("a")).train
        if train.round.number:
            seen[train.round.number] = (train.plan.plan_number, train.base_plan.plan_number)
            before_round(train.round.number)
        await fed.act()
        fed.now_ms += 1000
    return seen


async def test_plans_are_renegotiated_when_they_are_due(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation, rounds=4, replan_every_rounds=2))
    assert await plans_of_rounds(fed) == {1: (1, 0), 2: (1, 1), 3: (2, 1), 4: (2, 2)}


async def test_drift_past_the_threshold_calls_a_vote_and_a_new_plan_starts_afresh(fed, negotiation):
    def drift(number: int) -> None:
        fed.overlaps = dict.fromkeys("abc", 0.4 if number == 2 else 0.9)

    await fed.begin(spec(negotiation=negotiation, rounds=4, replan_below_overlap=0.5))
    assert await plans_of_rounds(fed, drift) == {1: (1, 0), 2: (1, 1), 3: (2, 1), 4: (2, 2)}
    kinds = [kind for kind, *_ in outcomes(await fed.shown())]
    assert kinds == ["VOTE", "TRAIN", "TRAIN", "VOTE", "TRAIN", "TRAIN"]


@pytest.mark.parametrize(
    ("overlaps", "replans"),
    [
        ({"a": 0.1, "b": 0.9, "c": 0.9}, False),
        ({"a": 0.1, "b": 0.1, "c": 0.9}, True),
        ({"a": 0.2}, True),
        ({}, False),
    ],
    ids=["one has drifted", "most have drifted", "only one reports", "nobody reports"],
)
async def test_the_mean_of_what_is_reported_decides(fed, negotiation, overlaps, replans):
    fed.overlaps = overlaps
    await fed.begin(spec(negotiation=negotiation, replan_below_overlap=0.5))
    seen = await plans_of_rounds(fed)
    assert seen[2] == ((2, 1) if replans else (1, 1))


async def test_without_a_threshold_reported_drift_changes_nothing(fed, negotiation):
    fed.overlaps = dict.fromkeys("abc", 0.0)
    await fed.begin(spec(negotiation=negotiation))
    assert (await plans_of_rounds(fed))[2] == (1, 1)


async def test_a_replan_in_mid_federation_loses_no_update(fed, negotiation):
    fed.overlaps = dict.fromkeys("abc", 0.1)
    await fed.begin(spec(negotiation=negotiation, rounds=4, replan_below_overlap=0.5))
    await plans_of_rounds(fed)
    shown = await fed.shown()
    training = [r for r in shown.history if r.kind == pb.ROUND_KIND_TRAIN]
    assert [r.number for r in training] == [1, 2, 3, 4]
    for summary in training:
        assert summary.state == pb.ROUND_STATE_PUBLISHED
        assert [u.client_id for u in summary.updates] == ["a", "b", "c"]
        merged = [r for r in fed.aggregation.aggregated if r.round_id == summary.round_id]
        assert all([p.client_id for p in r.contributions] == ["a", "b", "c"] for r in merged)
        assert merged


async def test_a_base_stays_readable_under_its_own_plan_while_the_next_plan_is_negotiated(fed, negotiation):
    fed.overlaps = dict.fromkeys("abc", 0.1)
    await fed.begin(spec(negotiation=negotiation, rounds=3, replan_below_overlap=0.5))
    checked = 0
    while not (await fed.federation()).ended:
        await fed.settle()
        train = (await fed.assignment("a")).train
        if train.HasField("base"):
            for plan in (train.plan, train.base_plan):
                assert len(await fed.handlers.plans.read("fed", plan.plan_number)) == plan.digest.total_bytes
            assert train.base.round_id in fed.aggregation.result_rounds()
            checked += train.plan.plan_number != train.base_plan.plan_number
        await fed.act()
    assert checked == 2


async def test_an_abandoned_vote_is_repeated_and_the_result_it_interrupted_stays_the_base(fed, negotiation):
    fed.overlaps = dict.fromkeys("abc", 0.1)
    await fed.begin(spec(negotiation=negotiation, replan_below_overlap=0.5))
    while (await fed.federation()).trained < 1:
        await fed.settle()
        await fed.act()
        await fed.settle()
    assert (await fed.shown()).current.kind == pb.ROUND_KIND_VOTE
    base = (await fed.federation()).result_sequence
    fed.now_ms += 60_000
    for client in "abc":
        await fed.join(client)
    await fed.settle()
    assert (await fed.shown()).current.attempt == 2
    seen = await plans_of_rounds(fed)
    assert seen[2] == (2, 1)
    assert outcomes(await fed.shown())[2] == ("VOTE", 0, 1, "ABANDONED", "TOO_FEW_UPDATES")
    assert base == 2


async def test_a_member_whose_budget_the_plan_does_not_reach_sits_out_until_the_next_plan(fed):
    """Agents encrypt no less than their budget: under a plan of smaller tiers they could send nothing."""
    await fed.begin(spec(rounds=3, clients=2, min_updates=2), "ab", budget=0.25)
    await until_training(fed)
    await fed.join("c", 1.0)
    train = await until_training(fed)
    assert list(train.round.layout.tiers) == [0.25]
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    rounds = [(r.kind, r.cohort_count) for r in (await fed.shown()).history]
    vote, training = pb.ROUND_KIND_VOTE, pb.ROUND_KIND_TRAIN
    assert rounds == [(vote, 2), (training, 2), (vote, 3), (training, 3), (training, 3)]
