"""Votes by ballots (negotiation "ope") against a real store."""

import base64
import hashlib

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from coordinator.records import Phase
from coordinator.votes import votes_of
from shelora.errors import DomainError, Reason
from shelora.negotiation import ballots
from shelora.negotiation.ballots import Ballot
from shelora.negotiation.ranking import Ranking
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.test_driver import outcomes, until_training
from tests.contract.coordinator.world import COLUMNS, spec

OPE = {"negotiation": "ope"}


async def refusal(work) -> Reason:
    with pytest.raises(DomainError) as refused:
        await work
    return refused.value.reason


async def voting(fed, **rules) -> pb.RoundRef:
    await fed.begin(spec(**OPE, **rules))
    await fed.settle()
    return (await fed.assignment("a")).vote.round


@pytest.mark.parametrize("negotiation", ["ope", "ope-refined"])
async def test_a_federation_votes_by_ballots_trains_and_finishes(fed, negotiation):
    await fed.begin(spec(negotiation=negotiation))
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert [kind for kind, *_ in outcomes(await fed.shown())] == ["VOTE", "TRAIN", "TRAIN"]
    assert record.round_id(1) not in fed.aggregation.layouts, "no vote goes to aggregation"
    assert {r.round_id for r in fed.aggregation.aggregated} == {record.round_id(2), record.round_id(3)}


async def test_the_list_of_labels_is_served_like_a_plan_and_the_layout_takes_its_counts(fed):
    fed.budgets = {"a": 1.0, "b": 0.25, "c": 0.25}
    await fed.begin(spec(**OPE))
    train = await until_training(fed)
    assert train.plan.plan_number == 1
    assert not train.plan.HasField("votes")
    assert train.plan.vote_round_id == (await fed.federation()).round_id(1)
    content = await fed.handlers.plans.read("fed", 1)
    assert hashlib.sha256(content).digest() == train.plan.digest.sha256
    ranking = Ranking.decode(content)
    assert ranking.tiers == tuple(train.round.layout.tiers) == (0.25, 1.0)
    assert sorted(ranking.columns.tolist()) == list(range(COLUMNS))
    assert set(ranking.columns[:3].tolist()) == {0, 1, 2}, "what each client wants most"
    counts = np.array([list(m.tier_columns) for m in train.round.layout.matrices])
    assert counts.sum(axis=0).tolist() == [6, 18]
    assert counts[0, 0] == sum(label < 12 for label in ranking.columns[:6])


async def test_a_ballot_counts_once_and_its_repeat_gets_the_first_receipt(fed):
    round_ = await voting(fed)
    assert await fed.cast("a", round_) == 1
    assert await fed.cast("b", round_) == 2
    assert await fed.cast("a", round_) == 1
    assert await refusal(fed.cast("a", round_, fed.ballot("b"))) is Reason.UPDATE_REWRITTEN
    assert await fed.cast("c", round_) == 3
    await fed.settle()
    assert await fed.cast("a", round_) == 1, "also after the vote has moved on"
    assert await refusal(fed.cast("d", round_)) is Reason.ROUND_NOT_COLLECTING


async def test_what_is_no_ballot_of_that_vote_is_refused_by_name(fed):
    fed.budgets = {"b": 0.25}
    round_ = await voting(fed)
    everything = fed.ballot("a")
    assert await refusal(fed.cast("stranger", round_)) is Reason.NOT_IN_COHORT
    assert await refusal(fed.cast("a", round_, b"junk")) is Reason.BALLOT_REFUSED
    assert await refusal(fed.cast("b", round_, everything)) is Reason.BALLOT_REFUSED, "beyond its budget"
    assert await refusal(fed.cast("a", round_, everything + bytes(1))) is Reason.TRANSFER_TOO_LARGE
    beyond = Ballot(np.array([COLUMNS], np.uint32), np.array([1], np.uint64)).encode()
    assert await refusal(fed.cast("a", round_, beyond)) is Reason.BALLOT_REFUSED
    other = pb.RoundRef(round_id="fed.00000001.9")
    assert await refusal(fed.cast("a", other)) is Reason.ROUND_UNKNOWN
    assert (await fed.shown()).current.update_count == 0


async def test_a_vote_by_ballots_takes_no_update_and_a_training_round_no_ballot(fed):
    round_ = await voting(fed)
    digests = [common_pb2.ShardDigest(sha256=bytes(32), total_bytes=1)] * len(round_.layout.shards)
    update = fed.update("a", round_, digests)
    assert (
        await refusal(fed.handlers.updates.commit("fed", round_.round_id, update)) is Reason.INVALID_ARGUMENT
    )
    train = await until_training(fed)
    assert await refusal(fed.cast("a", train.round)) is Reason.INVALID_ARGUMENT


async def test_ballots_are_deleted_once_they_are_ranked(fed):
    round_ = await voting(fed)
    await fed.cast("a", round_)
    record = await fed.federation()
    assert await fed.store.updates.ballot(record, 1, "a") == fed.ballot("a")
    await until_training(fed)
    for client in "abc":
        assert await fed.store.updates.ballot(record, 1, client) is None


async def test_a_ballot_that_comes_late_leaves_nothing_behind(fed):
    """Found by the simulation (seed 20155): a write that reached the store long after its vote was over."""
    round_ = await voting(fed)
    await fed.cast("a", round_)
    await until_training(fed)
    record = await fed.federation()
    await fed.store.updates.put_ballot(record, 1, "a", fed.ballot("a"))
    assert await fed.store.updates.ballot(record, 1, "a") is None


async def test_a_client_whose_ballot_was_lost_is_left_out(fed):
    round_ = await voting(fed)
    for client in "abc":
        await fed.cast(client, round_)
    await fed.store.updates.put_ballot(await fed.federation(), 1, "c", fed.ballot("a"))
    await fed.settle()
    assert outcomes(await fed.shown()) == [("VOTE", 0, 1, "PUBLISHED", "")]
    ranking = Ranking.decode(await fed.handlers.plans.read("fed", 1))
    assert set(ranking.columns[:2].tolist()) == {0, 1}
    record = (await fed.store.rounds.read(await fed.federation(), 1)).record
    assert [(drop.client_id, drop.reason) for drop in record.dropped] == [("c", Reason.SHARD_MISSING)]
    assert record.contributor_count == 2


async def test_a_large_model_has_a_bounded_number_of_ballots_ranked(fed, monkeypatch):
    monkeypatch.setattr(ballots, "_MOST_ENTRIES", 2 * COLUMNS)
    round_ = await voting(fed)
    for client in "abc":
        await fed.cast(client, round_)
    federation, ranked = await fed.federation(), []
    monkeypatch.setattr(ballots.Tally, "add", lambda _, ballot: ranked.append(ballot))
    record = (await fed.store.rounds.read(federation, 1)).record
    commits = await fed.store.updates.commits(federation, 1)
    await votes_of(federation).count(fed.store, federation, record, commits, (1.0,))
    assert len(commits) == 3
    assert len(ranked) == 2


async def test_too_few_ballots_abandon_the_vote(fed):
    round_ = await voting(fed)
    await fed.cast("a", round_)
    fed.now_ms += 60_000
    await fed.settle()
    assert outcomes(await fed.shown()) == [("VOTE", 0, 1, "ABANDONED", "TOO_FEW_UPDATES")]


async def test_a_rejected_list_fails_the_federation_because_only_the_coordinator_can_make_one(fed):
    await fed.begin(spec(**OPE))
    train = await until_training(fed)
    for client in "bc":
        await fed.handlers.plans.reject("fed", client, 1, train.plan.digest.sha256.hex(), "it does not fit")
    await fed.settle()
    assert "no client published a plan that the others accept" in (await fed.federation()).failure


async def test_members_that_afford_no_encryption_train_without_a_list(fed):
    await fed.begin(spec(**OPE), budget=0.0)
    train = await until_training(fed)
    assert not train.HasField("plan")


async def test_two_drivers_rank_alike(fed):
    round_ = await voting(fed)
    for client in "abc":
        await fed.cast(client, round_)
    await fed.driver.step("fed")
    federation = await fed.federation()
    record = (await fed.store.rounds.read(federation, 1)).record
    one, two = [
        await driver.steps.rounds.aggregate(federation, record)
        for driver in (fed.driver, fed.new_driver(fed.store))
    ]
    assert one == two
    assert one.record.ranked is not None


def written_forms(data: bytes, ballot: Ballot) -> list[str]:
    """How a ballot could stand in a log: its numbers, and its bytes in hexadecimal, base64, or as Python shows them."""
    some = data[16:40]
    return [*map(str, ballot.values), some.hex(), base64.b64encode(data[15:45]).decode(), repr(some)[2:-1]]


@pytest.mark.parametrize("logs_them", [False, True], ids=["as it is", "the control"])
async def test_no_ballot_stands_in_a_log_whether_it_is_taken_or_refused(fed, monkeypatch, logs_them):
    """The coordinator sees the order of a client's scores (docs/negotiation.md); who reads its logs must not."""
    values = 2**62 + np.random.default_rng(0).integers(0, 2**61, COLUMNS).astype(np.uint64)
    ballot = Ballot(np.arange(COLUMNS, dtype=np.uint32), values)
    data = ballot.encode()
    if logs_them:
        log, decode = structlog.get_logger(), Ballot.decode.__func__

        def telling(cls, given, *bounds):
            log.debug("ballot", content=given.hex())
            return decode(cls, given, *bounds)

        monkeypatch.setattr(Ballot, "decode", classmethod(telling))
    with capture_logs() as logs:
        round_ = await voting(fed)
        assert await refusal(fed.cast("a", round_, data[:-1])) is Reason.BALLOT_REFUSED
        twice = Ballot(np.zeros(COLUMNS, dtype=np.uint32), values).encode()
        assert await refusal(fed.cast("a", round_, twice)) is Reason.BALLOT_REFUSED
        for client in "abc":
            await fed.cast(client, round_, data)
        assert await refusal(fed.cast("a", round_, fed.ballot("b"))) is Reason.UPDATE_REWRITTEN
        await fed.settle()
    text = "\n".join(map(str, logs))
    assert len(logs) > 2, "something is logged"
    assert any(form in text for form in written_forms(data, ballot)) == logs_them
