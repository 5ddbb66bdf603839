"""The driver against a real store: whole federations, step by step, under a clock that the test moves."""

import asyncio
import re

import pytest
from prometheus_client import REGISTRY

from coordinator.keys import Keys
from coordinator.liveness import Liveness
from coordinator.metrics import TRAIN_LOSS
from coordinator.records import Phase
from coordinator.store import PASSING_MS
from services.common.redis_client import connect
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.world import spec


def outcomes(shown: pb.Federation) -> list[tuple[str, int, int, str, str]]:
    return [
        (
            pb.RoundKind.Name(r.kind).removeprefix("ROUND_KIND_"),
            r.number,
            r.attempt,
            pb.RoundState.Name(r.state).removeprefix("ROUND_STATE_"),
            r.reason,
        )
        for r in shown.history
    ]


async def until_training(fed) -> pb.Train:
    """Plays to the first training round. Returns what client a is to do."""
    for _ in range(10):
        await fed.settle()
        assignment = await fed.assignment("a")
        if assignment.WhichOneof("work") == "train":
            return assignment.train
        await fed.act()
        fed.now_ms += 1000
    raise AssertionError("no training round came")


async def test_a_federation_votes_plans_trains_and_finishes(fed):
    await fed.begin(spec())
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert outcomes(await fed.shown()) == [
        ("VOTE", 0, 1, "PUBLISHED", ""),
        ("TRAIN", 1, 1, "PUBLISHED", ""),
        ("TRAIN", 2, 1, "PUBLISHED", ""),
    ]
    assert fed.authority.opened == [("fed", 1, "standard")]
    finish = (await fed.assignment("a")).finish
    assert finish.result.round_number == 2
    assert finish.result.contributor_count == 3
    assert finish.plan.plan_number == 1


async def test_the_training_loss_is_told_while_a_federation_is_driven_here_and_after_it_finished(fed):
    def loss() -> float | None:
        return REGISTRY.get_sample_value("shelora_train_loss_nats", {"federation": "fed"})

    TRAIN_LOSS.remove("fed")
    await fed.begin(spec())
    await until_training(fed)
    assert loss() is None, "votes have none"
    await fed.play()
    assert loss() == pytest.approx(1.5)
    await fed.driver._hold("fed")  # the step that finds it finished
    assert loss() == pytest.approx(1.5)
    fed.driver._finished.clear()  # as after a lease that was lost
    fed.driver._drive = lambda _: asyncio.sleep(0)
    await fed.driver._hold("fed")
    assert loss() is None
    await fed.new_driver(fed.store)._hold("fed")  # that of a coordinator that was restarted
    assert loss() == pytest.approx(1.5)


async def test_a_federation_without_protection_needs_no_keys_no_vote_and_no_plan(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    assert not train.HasField("plan")
    assert not train.round.layout.encrypt_tensors
    assert not train.round.layout.tiers
    assert train.round.layout.key_id == b""
    await fed.play()
    assert fed.authority.opened == []
    assert [kind for kind, *_ in outcomes(await fed.shown())] == ["TRAIN", "TRAIN"]


async def test_members_that_afford_no_encryption_train_without_a_plan_but_with_encrypted_tensors(fed):
    await fed.begin(spec(), budget=0.0)
    train = await until_training(fed)
    assert not train.HasField("plan")
    assert train.round.layout.encrypt_tensors
    assert len(train.round.layout.key_id) == 16


async def test_tiers_are_the_distinct_budgets_and_the_layout_takes_the_plans_columns(fed):
    fed.budgets = {"a": 1.0, "b": 0.25, "c": 0.0, "d": 0.25}
    await fed.begin(spec(), "abcd")
    train = await until_training(fed)
    assert list(train.round.layout.tiers) == [0.25, 1.0]
    assert [list(m.tier_columns) for m in train.round.layout.matrices] == [[2, 2], [2, 2]]


async def test_nothing_begins_before_enough_clients_joined(fed):
    await fed.begin(spec(), "ab")
    await fed.settle()
    assert not (await fed.federation()).sequence
    await fed.join("c")
    await fed.settle()
    assert (await fed.federation()).sequence == 1


async def test_a_cohort_is_the_members_heard_of_lately(fed):
    await fed.begin(spec("none"), "abc")
    fed.now_ms += 31_000
    fed.silent = {"c"}
    await fed.act()
    await fed.settle()
    assert (await fed.shown()).current.cohort_count == 2
    assert (await fed.assignment("c")).wait.why.startswith("a round is in progress")


async def test_a_federation_told_to_beat_less_often_is_waited_for_longer(fed):
    fed.liveness = Liveness(alive_s=30, heartbeats_per_s=0.05)  # three members: every 60 s
    patient = fed.new_driver(fed.store)
    await fed.begin(spec("none"))
    fed.now_ms += 360_000
    await fed.settle(patient)
    assert (await fed.shown()).current.cohort_count == 3


async def test_members_told_to_beat_less_often_are_gone_in_the_end(fed):
    fed.liveness = Liveness(alive_s=30, heartbeats_per_s=0.05)
    patient = fed.new_driver(fed.store)
    await fed.begin(spec("none"))
    fed.now_ms += 361_000
    await fed.settle(patient)
    assert not (await fed.federation()).sequence


async def test_a_round_waits_for_a_cohort_of_min_updates(fed):
    await fed.begin(spec("none"))
    fed.now_ms += 31_000
    await fed.settle()
    assert not (await fed.federation()).sequence
    await fed.join("a")
    await fed.join("b")
    await fed.settle()
    assert (await fed.shown()).current.state == pb.ROUND_STATE_COLLECTING


async def test_votes_weigh_the_same_and_updates_by_their_examples(fed):
    fed.examples = {"a": 40, "b": 20, "c": 30, "d": 40, "e": 30}
    await fed.begin(spec(clients=5), "abcde")
    train = await until_training(fed)
    for client in "cabed":
        await fed.commit(client, train.round)
    await fed.settle()
    by_round = {
        r.round_id: [(p.client_id, p.weight) for p in r.contributions] for r in fed.aggregation.aggregated
    }
    votes, updates = by_round.values()
    assert votes == [(name, pytest.approx(1 / 5)) for name in "abcde"]
    assert updates == [(name, pytest.approx(count / 160)) for name, count in fed.examples.items()]


async def test_a_round_closes_at_its_deadline_with_enough_updates(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    await fed.commit("a", train.round)
    await fed.commit("b", train.round)
    await fed.settle()
    assert (await fed.shown()).current.update_count == 2
    fed.now_ms += 60_000
    await fed.settle()
    assert outcomes(await fed.shown()) == [("TRAIN", 1, 1, "PUBLISHED", "")]


async def test_too_few_updates_abandon_attempt_after_attempt_until_the_federation_fails(fed):
    await fed.begin(spec("none"))
    for _ in range(2):
        await fed.commit("a", (await until_training(fed)).round)
        fed.now_ms += 60_000
        for client in "abc":
            await fed.join(client)
        await fed.settle()
    record = await fed.federation()
    assert record.phase is Phase.FAILED
    assert (
        "round 1 was abandoned 2 times, at last for TOO_FEW_UPDATES: fewer than 2 clients" in record.failure
    )
    assert [attempt for _, _, attempt, _, _ in outcomes(await fed.shown())] == [1, 2]
    assert (await fed.assignment("a")).halt.why == record.failure
    assert not fed.aggregation.updates


async def test_a_silent_leader_is_replaced_at_the_deadline_and_cannot_publish_any_more(fed):
    await fed.begin(spec())
    await fed.settle()
    await fed.act()
    await fed.settle()
    work = (await fed.assignment("a")).make_plan
    assert work.plan_number == 1
    fed.now_ms += 60_000
    for client in "abc":
        await fed.join(client)
    await fed.settle()
    assert (await fed.assignment("b")).make_plan.plan_number == 2
    with pytest.raises(DomainError) as refused:
        await fed.publish("a", work)
    assert refused.value.reason is Reason.NOT_LEADER


async def test_a_leader_that_died_is_replaced_before_the_deadline(fed):
    await fed.begin(spec())
    await fed.settle()
    await fed.act()
    await fed.settle()
    fed.silent = {"a"}
    fed.now_ms += 31_000
    for client in "bc":
        await fed.join(client)
    await fed.settle()
    assert (await fed.assignment("b")).WhichOneof("work") == "make_plan"


async def test_a_federation_fails_when_no_candidate_publishes(fed):
    await fed.begin(spec())
    await fed.settle()
    await fed.act()
    for _ in range(4):
        await fed.settle()
        fed.now_ms += 60_000
        for client in "abc":
            if not (await fed.federation()).ended:
                await fed.join(client)
    await fed.settle()
    assert "no client published a plan" in (await fed.federation()).failure


async def test_a_rejected_plan_abandons_its_round_and_the_next_leader_plans(fed):
    await fed.begin(spec())
    train = await until_training(fed)
    sha256 = train.plan.digest.sha256.hex()
    await fed.handlers.plans.reject("fed", "c", 1, sha256, "other ranking")
    await fed.handlers.plans.reject("fed", "b", 1, sha256, "a second voice")
    await fed.settle()
    assert (await fed.assignment("b")).make_plan.plan_number == 2
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert outcomes(await fed.shown())[1] == ("TRAIN", 1, 1, "ABANDONED", "PLAN_REFUSED")
    with pytest.raises(DomainError) as refused:
        await fed.handlers.plans.reject("fed", "c", 1, sha256, "late")
    assert refused.value.reason is Reason.PLAN_UNKNOWN


async def lasting_plans(redis_url) -> set[str]:
    """Stored plans that do not expire within minutes, by digest."""
    prefix = Keys().plan("fed", "")
    async with connect(redis_url) as client:
        found = [key.decode() async for key in client.scan_iter(f"{prefix}*")]
        return {key.removeprefix(prefix) for key in found if await client.pttl(key) > PASSING_MS}


async def test_plans_are_renegotiated_and_a_base_names_the_plan_it_was_made_under(fed, redis_url):
    await fed.begin(spec(rounds=3, replan_every_rounds=1))
    seen = {}
    while not (await fed.federation()).ended:
        await fed.settle()
        train = (await fed.assignment("a")).train
        if train.round.number:
            seen[train.round.number] = (train.plan.plan_number, train.base_plan.plan_number)
        await fed.act()
        assert await lasting_plans(redis_url) <= {
            plan.digest.sha256 for plan in (await fed.federation()).plans
        }
    assert seen == {1: (1, 0), 2: (2, 1), 3: (3, 2)}
    kinds = [kind for kind, *_ in outcomes(await fed.shown())]
    assert kinds == ["VOTE", "TRAIN"] * 3


async def test_results_live_until_the_next_is_published_and_updates_until_theirs_is(fed):
    await fed.begin(spec(rounds=3))
    record = await fed.play()
    vote, last = record.round_id(1), record.round_id(4)
    assert fed.aggregation.result_rounds() == {vote, last}
    assert not fed.aggregation.updates


async def test_a_client_whose_shards_were_lost_is_left_out_of_every_shard(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    for client in "abc":
        await fed.commit(client, train.round)
    del fed.aggregation.updates[train.round.round_id, "b"]
    await fed.settle()
    assert outcomes(await fed.shown()) == [("TRAIN", 1, 1, "PUBLISHED", "")]
    latest = {(r.round_id, r.shard): r for r in fed.aggregation.aggregated}
    assert [[p.client_id for p in r.contributions] for r in latest.values()] == [["a", "c"]] * 2
    assert (await fed.assignment("a")).train.base.contributor_count == 2


async def test_a_round_that_lost_too_many_updates_is_abandoned(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    for client in "abc":
        await fed.commit(client, train.round)
    fed.aggregation.updates.clear()
    await fed.settle()
    assert outcomes(await fed.shown()) == [("TRAIN", 1, 1, "ABANDONED", "SHARD_MISSING")]


async def test_a_failing_worker_is_tried_elsewhere(fed):
    fed.aggregation.failures = [Reason.WORKER_FAILED]
    await fed.begin(spec("none"))
    assert (await fed.play()).phase is Phase.FINISHED


async def test_workers_that_keep_failing_abandon_the_round(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    for client in "abc":
        await fed.commit(client, train.round)
    fed.aggregation.failures = [Reason.WORKER_FAILED] * 100
    decision = await fed.driver.step("fed")
    while (await fed.shown()).current.state not in {pb.ROUND_STATE_ABANDONED, pb.ROUND_STATE_UNSPECIFIED}:
        decision = await fed.driver.step("fed")
    assert decision is not None
    fed.aggregation.failures.clear()
    await fed.settle()
    assert outcomes(await fed.shown()) == [("TRAIN", 1, 1, "ABANDONED", "WORKER_FAILED")]


async def test_aggregation_that_does_not_answer_leaves_the_round_as_it_is(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    for client in "abc":
        await fed.commit(client, train.round)
    fed.aggregation.failures = [Reason.STORE_UNAVAILABLE] * 1000
    with pytest.raises(DomainError) as unavailable:
        await fed.settle()
    assert unavailable.value.reason is Reason.STORE_UNAVAILABLE
    assert (await fed.shown()).current.state == pb.ROUND_STATE_AGGREGATING
    fed.aggregation.failures.clear()
    assert (await fed.play()).phase is Phase.FINISHED


async def test_a_key_authority_that_refuses_fails_the_federation_in_words(fed):
    fed.authority.refusal = Reason.INVALID_ARGUMENT
    await fed.begin(spec())
    await fed.settle()
    assert "the key authority refused to make keys: as told" in (await fed.federation()).failure


async def test_a_member_that_joins_late_takes_part_from_the_next_round(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    await fed.join("d", rank=8)
    assert (await fed.assignment("d")).wait.why.startswith("a round is in progress")
    assert train.round.layout.max_rank == 4
    await fed.act()
    await fed.settle()
    shown = await fed.assignment("d")
    assert (shown.train.round.number, shown.train.round.layout.max_rank) == (2, 8)


async def test_a_round_with_a_target_asks_some_more_and_closes_without_the_slower_ones(fed):
    await fed.begin(spec("none", target_updates=2, over_selection=1.5), "abcde")
    await fed.settle()
    asked = {name: await fed.assignment(name) for name in "abcde"}
    first, second, late = (name for name, work in asked.items() if work.HasField("train"))
    for name in (first, second):
        await fed.commit(name, asked[name].train.round)
    round_ = asked[late].train.round
    digests = fed.aggregation.put(round_.round_id, late, len(round_.layout.shards), "")
    await fed.settle()
    (ended,) = (await fed.shown()).history
    assert (ended.state, ended.update_count, ended.cohort_count) == (pb.ROUND_STATE_PUBLISHED, 2, 3)
    with pytest.raises(DomainError) as refused:
        await fed.handlers.updates.commit("fed", round_.round_id, fed.update(late, round_, digests))
    assert refused.value.reason is Reason.ROUND_NOT_COLLECTING
    assert (await fed.play()).phase is Phase.FINISHED


async def test_every_client_is_asked_to_vote_whatever_the_target(fed):
    await fed.begin(spec(target_updates=2, over_selection=1.0), "abcd")
    await fed.settle()
    assert all([(await fed.assignment(name)).HasField("vote") for name in "abcd"])


async def test_two_drivers_publish_each_round_once(fed):
    await fed.begin(spec())
    drivers = [fed.new_driver(fed.store) for _ in range(3)]
    for _ in range(40):
        for _ in range(6):
            await asyncio.gather(*(driver.step("fed") for driver in drivers))
        if (await fed.federation()).ended:
            break
        await fed.act()
    assert outcomes(await fed.shown()) == [
        ("VOTE", 0, 1, "PUBLISHED", ""),
        ("TRAIN", 1, 1, "PUBLISHED", ""),
        ("TRAIN", 2, 1, "PUBLISHED", ""),
    ]
    assert set(fed.aggregation.computed.values()) == {1}


async def test_a_driver_that_lost_its_lease_cannot_publish(fed):
    await fed.begin(spec("none"))
    train = await until_training(fed)
    for client in "abc":
        await fed.commit(client, train.round)
    await fed.driver.step("fed")
    late = await fed.federation()
    found = await fed.store.rounds.read(late, 1)
    assert found is not None
    await fed.settle()
    published = (await fed.store.rounds.read(late, 1)).record
    forged = found.record.model_copy(update={"contributor_count": 99})
    assert not await fed.store.rounds.write("publish_round", late, forged, found.revision)
    assert (await fed.store.rounds.read(late, 1)).record == published


async def test_running_drivers_share_federations_by_lease_and_hand_them_over(fed):
    await fed.store.federations._index("a-creation-that-died-before-its-record", new=True)
    await fed.begin(spec())
    changes = asyncio.create_task(fed.changes.run())
    drivers = [asyncio.create_task(fed.new_driver(fed.store).run()) for _ in range(2)]
    try:
        async with asyncio.timeout(30):
            while not (await fed.federation()).ended:
                await fed.act()
                await asyncio.sleep(0.01)
                if (await fed.federation()).trained == 1 and len(drivers) == 2:
                    drivers.pop().cancel()
    finally:
        for task in (changes, *drivers):
            task.cancel()
        await asyncio.gather(changes, *drivers, return_exceptions=True)
    assert (await fed.federation()).phase is Phase.FINISHED


async def test_a_driver_stops_though_the_store_falls_silent(fed, monkeypatch):
    held, silent = asyncio.Event(), asyncio.Event()
    acquire = fed.store.leases.acquire

    async def acquired(*lease):
        taken = await acquire(*lease)
        held.set()
        return taken

    monkeypatch.setattr(fed.store.leases, "acquire", acquired)
    monkeypatch.setattr(fed.store.leases, "release", lambda *_: silent.wait())
    monkeypatch.setattr("services.common.parting.PARTING_S", 0.01)
    await fed.begin(spec())
    driver = asyncio.create_task(fed.new_driver(fed.store).run())
    async with asyncio.timeout(30):
        await held.wait()
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)


async def test_round_identifiers_are_unique_between_federations_of_one_name(fed):
    await fed.begin(spec("none"))
    record = await fed.federation()
    assert re.fullmatch(r"fed\.[0-9a-f]{8}\.1", record.round_id(1))
    assert record.model_copy(update={"instance": "ffffffff"}).round_id(1) != record.round_id(1)
