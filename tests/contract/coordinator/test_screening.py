"""Updates that are refused or left out by policy: by which reason, and who is told."""

import pytest

from coordinator.handlers import Limits
from coordinator.metrics import REFUSALS_TOTAL
from coordinator.records import Phase
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import spec


def counted(reason: Reason) -> float:
    return REFUSALS_TOTAL.labels(reason)._value.get()


def dropped(summary: pb.RoundSummary) -> list[tuple[str, str]]:
    return [(drop.client_id, drop.reason) for drop in summary.dropped]


async def test_an_update_that_claims_other_examples_than_its_client_joined_with_is_refused(fed):
    await fed.begin(spec("none"))
    train, before = await until_training(fed), counted(Reason.EXAMPLES_MISMATCH)
    with pytest.raises(DomainError, match="claims 11 examples, the client joined with 10: restart") as caught:
        await fed.commit("a", train.round, examples=11)
    assert caught.value.reason is Reason.EXAMPLES_MISMATCH
    shown = (await fed.shown()).current
    assert (shown.update_count, dropped(shown)) == (0, [("a", "EXAMPLES_MISMATCH")])
    assert counted(Reason.EXAMPLES_MISMATCH) == before + 1
    assert await fed.commit("a", train.round) == 1, "it may still send what is believed"
    assert dropped((await fed.shown()).current) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
async def test_a_loss_that_is_no_number_is_refused_by_name_and_zero_is_none(fed, loss):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    digests = fed.aggregation.put(train.round.round_id, "a", len(train.round.layout.shards))
    report = pb.UpdateReport(example_count=10, train_loss=loss)
    with pytest.raises(DomainError, match="train_loss must be finite") as caught:
        fed.update("a", train.round, digests, report=report)
    assert caught.value.reason is Reason.VALUE_NOT_FINITE
    report = pb.UpdateReport(example_count=10, train_loss=0.0)
    update = fed.update("a", train.round, digests, report=report)
    assert await fed.handlers.updates.commit("fed", train.round.round_id, update) == 1


@pytest.mark.parametrize("squared", [1e9, 1e300, float("inf"), float("nan")])
async def test_an_update_above_the_federations_norm_is_refused_with_both_numbers(fed, squared):
    await fed.begin(spec("none"))
    train, fed.aggregation.squared_norms = await until_training(fed), {"a": squared}
    words = r"has norm .*, the federation accepts 1e\+04 \(screening.max_update_norm\): lower learning_rate"
    with pytest.raises(DomainError, match=words) as caught:
        await fed.commit("a", train.round)
    assert caught.value.reason is Reason.NORM_TOO_LARGE
    assert dropped((await fed.shown()).current) == [("a", "NORM_TOO_LARGE")]
    assert (train.round.round_id, "a") not in fed.aggregation.sealed, "it may send another one"


async def test_an_update_far_above_the_median_is_left_out_and_its_client_is_told(fed):
    await fed.begin(spec("none"), "abcd")
    train, fed.aggregation.squared_norms = await until_training(fed), {"b": 200.0}
    before = counted(Reason.NORM_OUTLIER)
    for client in "abcd":
        await fed.commit(client, train.round)
    await fed.settle()
    shown = (await fed.shown()).history[0]
    assert (shown.update_count, dropped(shown)) == (4, [("b", "NORM_OUTLIER")])
    aggregated = {r.round_id: [p.client_id for p in r.contributions] for r in fed.aggregation.aggregated}
    assert aggregated == {train.round.round_id: ["a", "c", "d"]}
    assert counted(Reason.NORM_OUTLIER) == before + 1
    assert "3 times the median of its round: lower learning_rate" in (await fed.assignment("b")).notice
    assert (await fed.assignment("a")).notice == ""
    assert (await fed.assignment("a")).train.base.contributor_count == 3
    fed.aggregation.squared_norms = {}
    assert (await fed.play()).phase is Phase.FINISHED
    assert (await fed.assignment("b")).notice == "", "its last update counted"


async def test_a_round_that_keeps_too_few_updates_is_abandoned_for_that_and_tried_again(fed):
    await fed.begin(spec("none", min_updates=3))
    train, fed.aggregation.squared_norms = await until_training(fed), {"c": 1000.0}
    for client in "abc":
        await fed.commit(client, train.round)
    await fed.settle()
    assert outcomes(await fed.shown()) == [("TRAIN", 1, 1, "ABANDONED", "NORM_OUTLIER")]
    assert (await fed.assignment("c")).notice
    record = await fed.play()
    assert record.phase is Phase.FAILED
    assert "raise screening.max_norm_ratio if those updates are honest" in record.failure


async def test_claimed_examples_weigh_up_to_a_share_of_the_round(fed):
    fed.examples = {"a": 10**9, "b": 10, "c": 10, "d": 20, "e": 20}
    await fed.begin(spec("none", clients=5), "abcde")
    train = await until_training(fed)
    for client in "abcde":
        await fed.commit(client, train.round)
    await fed.settle()
    weights = [part.weight for part in fed.aggregation.aggregated[0].contributions]
    assert weights == pytest.approx([1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 4])


async def test_a_federation_takes_as_many_members_as_its_coordinator_allows(fed):
    fed.handlers = fed.new_handlers(limits=Limits(max_members=3))
    await fed.begin(spec("none"), "abc")
    with pytest.raises(DomainError, match="has 3 members, the most") as caught:
        await fed.join("d")
    assert caught.value.reason is Reason.LIMIT_REACHED
    await fed.join("a")
    with pytest.raises(DomainError, match=r"round.clients = 4 can never join"):
        await fed.handlers.federations.create(spec(clients=4).model_copy(update={"name": "large"}))


async def test_a_coordinator_takes_as_many_federations_as_it_allows(fed):
    fed.handlers = fed.new_handlers(limits=Limits(max_federations=1))
    await fed.handlers.federations.create(spec())
    await fed.handlers.federations.create(spec())
    with pytest.raises(DomainError, match="holds 1 federations, the most it takes") as caught:
        await fed.handlers.federations.create(spec().model_copy(update={"name": "another"}))
    assert caught.value.reason is Reason.LIMIT_REACHED
