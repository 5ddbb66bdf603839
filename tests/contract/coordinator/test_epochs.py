"""Key epochs: rotation by rounds, on demand and after a revocation, and what a revoked client no longer is part of."""

import pytest

from coordinator.records import Phase
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.messages import layout_from_proto
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.fakes import key_id
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import spec

NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["sealed", "ope"])
FIRST = [("VOTE", 0, 1, "PUBLISHED", ""), ("TRAIN", 1, 1, "PUBLISHED", "")]


def rotating(rounds: int, every: int = 0, negotiation: str = "sealed") -> FederationSpec:
    fields = spec(negotiation=negotiation, rounds=rounds).model_dump()
    fields["protection"]["key_rotation_rounds"] = every
    return FederationSpec.model_validate(fields)


async def until_round(fed, number: int) -> pb.Train:
    """Plays until client b trains for the round of that number, and nobody has committed to it."""
    for _ in range(30):
        await fed.settle()
        assignment = await fed.assignment("b")
        if assignment.WhichOneof("work") == "train" and assignment.train.round.number == number:
            return assignment.train
        await fed.act()
        fed.now_ms += 1000
    raise AssertionError(f"round {number} did not come")


def revoke(fed, client: str) -> None:
    fed.revoked[client] = fed.now_ms


@NEGOTIATIONS
async def test_keys_rotate_every_so_many_rounds_with_a_vote_of_their_own(fed, negotiation):
    await fed.begin(rotating(rounds=5, every=2, negotiation=negotiation))
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert [epoch for _, epoch, _ in fed.authority.opened] == [1, 2, 3]
    kinds = [(kind, number) for kind, number, *_ in outcomes(await fed.shown())]
    vote = ("VOTE", 0)
    assert kinds == [
        vote,
        ("TRAIN", 1),
        ("TRAIN", 2),
        vote,
        ("TRAIN", 3),
        ("TRAIN", 4),
        vote,
        ("TRAIN", 5),
    ]
    assert fed.authority.retired_before == record.epoch == record.result_epoch == 3


@NEGOTIATIONS
async def test_after_a_rotation_the_base_stays_in_its_epoch_until_there_is_a_newer_result(fed, negotiation):
    await fed.begin(rotating(rounds=3, every=1, negotiation=negotiation))
    first = await until_round(fed, 1)
    assert (first.round.epoch, layout_from_proto(first.round.layout).key_id) == (1, key_id(1))
    second = await until_round(fed, 2)
    assert (second.round.epoch, layout_from_proto(second.round.layout).key_id) == (2, key_id(2))
    assert (second.base.epoch, layout_from_proto(second.base.layout).key_id) == (1, key_id(1))
    assert second.base_plan.plan_number == first.plan.plan_number != second.plan.plan_number
    if negotiation == "sealed":
        assert (second.plan.votes.epoch, second.base_plan.votes.epoch) == (2, 1)
    assert fed.authority.retired_before == 1, "agents still need the base's keys"
    third = await until_round(fed, 3)
    assert (third.base.epoch, third.round.epoch) == (2, 3)
    assert fed.authority.retired_before == 2


@NEGOTIATIONS
async def test_what_comes_late_for_one_attempt_does_not_count_for_another_of_the_same_number(
    fed, negotiation
):
    """Attempts count from 1 again after a rotation, as they do when a federation is extended."""
    await fed.begin(spec(negotiation=negotiation))
    await fed.settle()
    first = (await fed.assignment("a")).vote.round
    await fed.handlers.federations.rotate("fed", 0)
    await fed.settle()
    again = (await fed.assignment("a")).vote.round
    assert (first.attempt, again.attempt) == (1, 1)
    send = fed.cast if negotiation == "ope" else fed.commit
    with pytest.raises(DomainError) as late:
        await send("a", first)
    assert late.value.reason in {Reason.ROUND_UNKNOWN, Reason.ROUND_NOT_COLLECTING}
    if negotiation == "sealed":  # a ballot names no layout: it is its client's word whatever it is of
        renamed = pb.RoundRef(round_id=again.round_id, layout=first.layout)
        with pytest.raises(DomainError) as mixed:
            await fed.commit("a", renamed)
        assert mixed.value.reason is Reason.LAYOUT_MISMATCH
    assert await send("b", again) == 1, "none of it was counted"


async def test_an_operator_rotates_once_however_often_it_asks(fed):
    await fed.begin(rotating(rounds=3))
    await until_round(fed, 2)
    for _ in range(2):
        await fed.handlers.federations.rotate("fed", 1)
    assert (await fed.shown()).rotation_pending
    assert (await fed.shown()).epoch == 1
    await until_round(fed, 3)
    await fed.handlers.federations.rotate("fed", 1)
    shown = await fed.shown()
    assert (shown.epoch, shown.rotation_pending) == (2, False)
    assert (await fed.play()).epoch == 2
    with pytest.raises(DomainError) as refused:
        await fed.handlers.federations.rotate("fed", 0)
    assert refused.value.reason is Reason.FEDERATION_CLOSED


async def test_what_cannot_rotate_says_so(fed):
    await fed.begin(spec("none"))
    with pytest.raises(DomainError, match="there are no keys to rotate"):
        await fed.handlers.federations.rotate("fed", 0)
    revoke(fed, "a")
    await fed.settle()
    shown = await fed.shown()
    assert (shown.epoch, shown.rotation_pending) == (0, False)
    assert [member.client_id for member in shown.members] == ["b", "c"]


async def test_an_epoch_that_has_not_begun_cannot_be_left(fed):
    await fed.begin(spec())
    with pytest.raises(DomainError, match="from_epoch 2 has not begun"):
        await fed.handlers.federations.rotate("fed", 2)


async def test_a_rotation_in_the_middle_of_a_round_loses_no_update(fed):
    await fed.begin(rotating(rounds=2))
    train = await until_round(fed, 1)
    await fed.commit("a", train.round)
    await fed.handlers.federations.rotate("fed", 0)
    await fed.settle()
    assert await fed.commit("b", train.round) == 2
    await fed.commit("c", train.round)
    await fed.settle()
    assert outcomes(await fed.shown())[:2] == FIRST
    record = await fed.play()
    assert (record.phase, record.epoch) == (Phase.FINISHED, 2)


@NEGOTIATIONS
async def test_a_vote_whose_plan_would_be_void_at_once_is_abandoned_for_one_under_the_new_keys(
    fed, negotiation
):
    await fed.begin(spec(negotiation=negotiation))
    await fed.settle()
    await fed.handlers.federations.rotate("fed", 0)
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert outcomes(await fed.shown())[:2] == [
        ("VOTE", 0, 1, "ABANDONED", "EPOCH_RETIRED"),
        ("VOTE", 0, 1, "PUBLISHED", ""),
    ]


async def test_a_revoked_client_is_no_member_its_update_is_not_counted_and_keys_rotate(fed):
    await fed.begin(rotating(rounds=2))
    train = await until_round(fed, 1)
    await fed.commit("a", train.round)
    await fed.commit("b", train.round)
    revoke(fed, "a")
    await fed.settle()
    assert [member.client_id for member in (await fed.shown()).members] == ["b", "c"]
    await fed.commit("c", train.round)
    await fed.settle()
    request = fed.aggregation.aggregated[-1]
    assert request.round_id == train.round.round_id
    assert [part.client_id for part in request.contributions] == ["b", "c"]
    record = await fed.play()
    assert (record.phase, record.epoch) == (Phase.FINISHED, 2)
    assert outcomes(await fed.shown())[:2] == FIRST
    assert (await fed.shown()).history[-1].cohort_count == 2
    assert fed.authority.retired_before == 2, "the epoch that the revoked client knows is over"


async def test_a_round_does_not_wait_for_a_revoked_client(fed):
    await fed.begin(rotating(rounds=2))
    train = await until_round(fed, 1)
    await fed.commit("b", train.round)
    await fed.commit("c", train.round)
    revoke(fed, "a")
    await fed.settle()
    assert outcomes(await fed.shown())[:2] == FIRST


async def test_an_update_is_not_published_if_its_client_is_revoked_while_it_is_aggregated(fed):
    await fed.begin(rotating(rounds=1))
    train = await until_round(fed, 1)
    aggregate = fed.pool.aggregate

    async def revoking(*arguments):
        revoke(fed, "c")
        return await aggregate(*arguments)

    fed.pool.aggregate = revoking
    for client in "abc":
        await fed.commit(client, train.round)
    await fed.settle()
    assert [part.client_id for part in fed.aggregation.aggregated[-1].contributions] == ["a", "b"]
    assert (await fed.federation()).phase is Phase.FINISHED
    assert (await fed.assignment("a")).finish.result.contributor_count == 2


async def test_a_round_that_a_revocation_leaves_too_small_is_tried_again_and_costs_no_attempt(fed):
    await fed.begin(spec(clients=2, rounds=1, max_attempts=1), clients="ab")
    await until_training(fed)
    revoke(fed, "a")
    await fed.settle()
    assert outcomes(await fed.shown())[-1] == ("TRAIN", 1, 1, "ABANDONED", "CERTIFICATE_REVOKED")
    assert (await fed.federation()).phase is Phase.RUNNING
    fed.now_ms += 1000
    await fed.join("d")
    record = await fed.play()
    assert (record.phase, record.epoch) == (Phase.FINISHED, 2)


async def test_a_leader_that_is_revoked_is_replaced_with_the_vote_and_the_keys(fed):
    await fed.begin(spec(rounds=1))
    await fed.settle()
    await fed.act()
    await fed.settle()
    assert (await fed.assignment("a")).WhichOneof("work") == "make_plan"
    revoke(fed, "a")
    record = await fed.play()
    assert (record.phase, record.epoch) == (Phase.FINISHED, 2)
    assert [kind for kind, *_ in outcomes(await fed.shown())] == ["VOTE", "VOTE", "TRAIN"]
    assert record.plan.negotiation.leader in {"b", "c"}


async def test_a_client_that_enrolled_anew_joins_again_and_takes_part_from_the_next_round(fed):
    await fed.begin(rotating(rounds=2))
    train = await until_round(fed, 1)
    revoke(fed, "a")
    await fed.settle()
    fed.now_ms += 1000
    await fed.join("a")
    assert (await fed.assignment("a")).WhichOneof("work") == "wait"
    with pytest.raises(DomainError) as refused:
        await fed.commit("a", train.round)
    assert refused.value.reason is Reason.NOT_IN_COHORT
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert [r.cohort_count for r in (await fed.shown()).history] == [3, 3, 3, 3]


async def test_a_join_with_the_old_certificate_through_a_replica_that_has_not_learnt_yet_makes_no_member(fed):
    await fed.begin(spec())
    await until_training(fed)
    before, fed.now_ms = fed.now_ms, fed.now_ms + 1000
    revoke(fed, "a")
    await fed.settle()
    fed.now_ms = before
    await fed.join("a")
    assert [member.client_id for member in (await fed.shown()).members] == ["b", "c"]


async def test_a_revocation_is_taken_in_once_and_a_later_one_of_the_same_client_anew(fed):
    await fed.begin(rotating(rounds=6))
    await until_round(fed, 1)
    revoke(fed, "a")
    await until_round(fed, 2)
    await until_round(fed, 3)
    assert (await fed.federation()).epoch == 2
    await fed.join("a")
    revoke(fed, "a")
    await until_round(fed, 4)
    assert (await fed.federation()).epoch == 3


async def test_a_driver_that_starts_anew_takes_up_a_rotation_where_it_was(fed):
    await fed.begin(rotating(rounds=3, every=1))
    record = None
    for _ in range(80):
        record = await fed.federation()
        if record.ended:
            break
        await fed.settle(fed.new_driver(fed.store))
        await fed.act()
        fed.now_ms += 1000
    assert (record.phase, record.epoch) == (Phase.FINISHED, 3)


async def test_epochs_that_an_expired_namesake_retired_are_passed_over(fed):
    fed.authority.retired_before = 4
    await fed.begin(spec())
    record = await fed.play()
    assert (record.phase, record.epoch) == (Phase.FINISHED, 4)


async def test_who_was_revoked_before_the_federation_began_knows_none_of_its_keys(fed):
    """An expired namesake may have left its last epoch."""
    revoke(fed, "z")
    await fed.begin(spec())
    record = await fed.play()
    assert (record.phase, record.epoch, record.result_epoch) == (Phase.FINISHED, 2, 2)


async def test_a_key_authority_that_is_away_delays_retirement_and_nothing_else(fed):
    await fed.begin(rotating(rounds=2, every=1))
    await until_round(fed, 2)

    async def away(*_):
        raise DomainError(Reason.STORE_UNAVAILABLE, "away")

    retire, fed.authority_client.retire_epochs = fed.authority_client.retire_epochs, away
    with pytest.raises(DomainError, match="away"):
        await fed.play()
    assert (await fed.federation()).phase is Phase.FINISHED
    fed.authority_client.retire_epochs = retire
    await fed.settle()
    assert fed.authority.retired_before == 2
