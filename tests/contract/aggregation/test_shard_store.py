"""What every shard store does: the one on a real server, and the same on the simulated one."""

import asyncio

import pytest

from services.aggregation.keys import RoundKeys
from services.aggregation.records import AggregationRequest, CommittedContribution, ShardProgress, ShardSlot
from services.aggregation.store import CLOSED_LIFE_S, READ_BYTES, STAGED_LIFE_S, connect
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import Digest
from tests.contract.aggregation.conftest import layout_of_size

ROUND = "round-1"
SLOT = ShardSlot(ROUND, "alice", 0)
DATA, OTHER = b"one two three", b"four"
MARK = [RoundKeys(ROUND).closed.encode()]
"""All that is left of a closed round."""
TOKENS = [f"{number:032x}" for number in range(10)]


@pytest.fixture
async def open_round(store, layout):
    await store.open_round(ROUND, layout, 600)


def refused(reason: Reason):
    return pytest.raises(DomainError, check=lambda error: error.reason is reason)


async def begun(store, data=DATA, token=TOKENS[0], slot=SLOT):
    upload = await store.begin(slot, Digest.of(data), token)
    assert upload is not None
    return upload


async def completed(store, data=DATA, slot=SLOT):
    upload = await begun(store, data, slot=slot)
    await store.append(upload, 0, data)
    await store.promote(upload)


def request(weights=(0.25, 0.75), data=DATA) -> AggregationRequest:
    sha256 = Digest.of(data).sha256
    parts = [
        CommittedContribution(client_id=c, sha256=sha256, weight=w, scaling=1.0)
        for c, w in zip(("alice", "bob", "carol"), weights, strict=False)
    ]
    return AggregationRequest(ROUND, 0, tuple(parts))


# Rounds


async def test_a_round_keeps_the_layout_it_was_opened_with(store, layout, new_store):
    await store.open_round(ROUND, layout, 600)
    assert await store.layout(ROUND) == layout
    assert await store.layout(ROUND) is await store.layout(ROUND)
    assert await new_store().layout(ROUND) == layout


async def test_a_round_is_opened_with_one_layout_by_whoever_comes_first(store):
    layouts = [layout_of_size(size) for size in range(1, 9)]
    answers = await asyncio.gather(
        *(store.open_round(ROUND, layout, 600) for layout in layouts), return_exceptions=True
    )
    assert [a for a in answers if a is None] == [None]
    assert {a.reason for a in answers if a is not None} == {Reason.LAYOUT_MISMATCH}


async def test_opening_a_round_again_does_not_prolong_it(store, layout, client, open_round):
    await store.open_round(ROUND, layout, 6000)
    assert client.ttl(RoundKeys(ROUND).round) <= 600


async def test_a_round_knows_whom_it_asked_and_for_what_rank(store, layout, open_round):
    assert await store.largest_rank(ROUND, "alice") is None, "whoever it is"
    asked = {"alice": 4, "ü:1\n": 2}
    await store.open_round("round-2", layout, 600, asked)
    await store.open_round("round-2", layout, 600, {"bob": 8})  # a repeat: the first stay
    assert {name: await store.largest_rank("round-2", name) for name in asked} == asked
    for other in ("bob", "alice:4", ""):
        with refused(Reason.NOT_IN_COHORT):
            await store.largest_rank("round-2", other)


async def test_a_round_of_another_format_is_named_as_such_and_stays_as_it_is(
    store, worker, client, open_round
):
    client.hset(RoundKeys(ROUND).round, "format", "2")
    before = client.hgetall(RoundKeys(ROUND).round)
    with refused(Reason.RECORD_UNREADABLE):
        await store.layout(ROUND)
    with refused(Reason.RECORD_UNREADABLE):
        worker.layout(ROUND)
    assert client.hgetall(RoundKeys(ROUND).round) == before


async def test_an_unknown_round_is_refused_everywhere(store, worker):
    with refused(Reason.ROUND_UNKNOWN):
        await store.layout(ROUND)
    with refused(Reason.ROUND_UNKNOWN):
        await store.begin(SLOT, Digest.of(DATA), TOKENS[0])
    with refused(Reason.ROUND_UNKNOWN):
        await store.progress(ROUND, "alice")
    with refused(Reason.ROUND_UNKNOWN):
        await store.claim(request())
    with refused(Reason.ROUND_UNKNOWN):
        await store.seal(ROUND, "alice", [Digest.of(DATA)])
    with refused(Reason.ROUND_UNKNOWN):
        worker.layout(ROUND)
    with refused(Reason.ROUND_UNKNOWN):
        worker.publish(request(), DATA, 1.0)


@pytest.mark.parametrize("ids", [("a:b", "c"), ("a", "b:c"), ("}", "{"), ("*", "?"), ("ü", "n\n")])
async def test_identifiers_with_any_characters_keep_apart(store, layout, ids):
    round_id, client_id = ids
    await store.open_round(round_id, layout, 600)
    await completed(store, slot=ShardSlot(round_id, client_id, 0))
    assert await store.progress(round_id, client_id + ":0") == []
    assert len(await store.progress(round_id, client_id)) == 1
    await store.close_round(round_id, results=True)


# Uploads


async def test_bytes_are_kept_as_they_arrive(store, open_round):
    upload = await begun(store)
    assert await store.append(upload, 0, DATA[:5])
    assert await store.progress(ROUND, "alice") == [
        ShardProgress(shard=0, digest=Digest.of(DATA), received_bytes=5, complete=False)
    ]
    assert (await begun(store, token=TOKENS[1])).received_bytes == 5
    assert await store.read(upload) == DATA[:5]


async def test_stored_bytes_are_never_written_again(store, open_round):
    upload = await begun(store)
    await store.append(upload, 0, DATA[:5])
    await store.append(upload, 0, b"XXXXX")
    await store.append(upload, 3, b"YY" + DATA[5:7])
    assert await store.read(upload) == DATA[:7]


async def test_a_gap_is_refused(store, open_round):
    upload = await begun(store)
    with refused(Reason.TRANSFER_OFFSET):
        await store.append(upload, 1, DATA)


async def test_two_uploads_of_one_content_help_each_other(store, open_round):
    one, other = await begun(store), await begun(store, token=TOKENS[1])
    assert one.token == other.token
    await store.append(one, 0, DATA[:5])
    await store.append(other, 5, DATA[5:])
    assert await store.promote(one)
    assert not await store.promote(other)
    assert not await store.append(other, 0, DATA)
    assert await store.is_complete(other)


async def test_other_content_supersedes_every_later_step_of_an_upload(store, open_round):
    old = await begun(store)
    await store.append(old, 0, DATA)
    new = await begun(store, OTHER, TOKENS[1])
    await store.append(new, 0, OTHER[:2])
    for step in (store.append(old, 0, DATA), store.promote(old)):
        with refused(Reason.SHARD_REWRITTEN):
            await step
    await store.forget(old)
    assert await store.read(new) == OTHER[:2]


async def test_unchecked_bytes_do_not_become_complete_by_replacing_checked_ones(store, open_round):
    checked = await begun(store)
    await store.append(checked, 0, DATA)
    await begun(store, OTHER, TOKENS[1])
    unchecked = await begun(store, DATA, TOKENS[2])
    await store.append(unchecked, 0, b"X" * len(DATA))
    with refused(Reason.SHARD_REWRITTEN):
        await store.promote(checked)


async def test_forgetting_an_upload_leaves_nothing(store, client, open_round):
    upload = await begun(store)
    await store.append(upload, 0, DATA)
    await store.forget(upload)
    assert client.keys() == [RoundKeys(ROUND).round.encode()]


async def test_a_complete_shard_stays_until_another_is_complete(store, worker, client, open_round):
    await completed(store)
    keys = len(client.keys())
    upload = await begun(store, OTHER, TOKENS[1])
    await store.append(upload, 0, OTHER)
    assert worker.update(SLOT, Digest.of(DATA).sha256) == DATA
    await store.promote(upload)
    assert worker.update(SLOT, Digest.of(OTHER).sha256) == OTHER
    with refused(Reason.SHARD_MISSING):
        worker.update(SLOT, Digest.of(DATA).sha256)
    assert len(client.keys()) == keys


async def test_announcing_complete_content_again_drops_what_was_begun_since(store, client, open_round):
    await completed(store)
    keys = len(client.keys())
    await store.append(await begun(store, OTHER, TOKENS[1]), 0, OTHER)
    assert await store.begin(SLOT, Digest.of(DATA), TOKENS[2]) is None
    assert await store.progress(ROUND, "alice") == [
        ShardProgress(shard=0, digest=Digest.of(DATA), received_bytes=len(DATA), complete=True)
    ]
    assert len(client.keys()) == keys


async def test_progress_names_the_shards_in_order(store, open_round):
    for shard in (10, 2, 1):
        await completed(store, slot=ShardSlot(ROUND, "alice", shard))
    assert [progress.shard for progress in await store.progress(ROUND, "alice")] == [1, 2, 10]
    assert await store.progress(ROUND, "bob") == []


async def test_large_contents_are_read_whole(store, open_round):
    data = bytes(range(256)) * (READ_BYTES // 128) + b"end"
    upload = await begun(store, data)
    await store.append(upload, 0, data)
    assert await store.read(upload) == data


async def test_a_worker_refuses_bytes_that_are_not_those_committed(store, worker, client, open_round):
    await completed(store)
    client.append(RoundKeys(ROUND).update("alice", 0, Digest.of(DATA).sha256), b"!")
    with refused(Reason.SHARD_MISSING):
        worker.update(SLOT, Digest.of(DATA).sha256)


# Sealing


async def test_a_sealed_update_refuses_other_content_and_keeps_its_own(store, worker, client, open_round):
    await completed(store)
    keys = sorted(client.keys())
    for _ in range(2):
        await store.seal(ROUND, "alice", [Digest.of(DATA)])
    with refused(Reason.UPDATE_REWRITTEN):
        await store.begin(SLOT, Digest.of(OTHER), TOKENS[1])
    assert await store.begin(SLOT, Digest.of(DATA), TOKENS[2]) is None
    assert worker.update(SLOT, Digest.of(DATA).sha256) == DATA
    assert sorted(client.keys()) == keys


async def test_an_upload_under_way_ends_where_the_update_is_sealed(store, worker, client, open_round):
    await completed(store)
    keys = sorted(client.keys())
    late = await begun(store, OTHER, TOKENS[1])
    await store.append(late, 0, OTHER)
    await store.seal(ROUND, "alice", [Digest.of(DATA)])
    for step in (store.append(late, 0, OTHER), store.promote(late)):
        with refused(Reason.UPDATE_REWRITTEN):
            await step
    await store.forget(late)
    assert worker.update(SLOT, Digest.of(DATA).sha256) == DATA
    assert sorted(client.keys()) == keys


async def test_what_is_not_stored_is_not_sealed(store, open_round):
    with refused(Reason.SHARD_MISSING):
        await store.seal(ROUND, "alice", [Digest.of(DATA)])
    await completed(store)
    for shards in ([Digest.of(OTHER)], [Digest.of(DATA), Digest.of(OTHER)]):
        with refused(Reason.SHARD_MISSING):
            await store.seal(ROUND, "alice", shards)
    await completed(store, OTHER)  # replaced, as it is not sealed
    await store.seal(ROUND, "alice", [Digest.of(OTHER)])


async def test_a_seal_holds_for_one_client_and_all_its_shards(store, open_round):
    slots = [ShardSlot(ROUND, "alice", shard) for shard in range(12)]
    for slot in slots:
        await completed(store, slot=slot)
    await store.seal(ROUND, "alice", [Digest.of(DATA)] * len(slots))
    for slot in slots:
        with refused(Reason.UPDATE_REWRITTEN):
            await store.begin(slot, Digest.of(OTHER), TOKENS[1])
    await completed(store, OTHER, ShardSlot(ROUND, "bob", 0))


async def test_of_a_seal_and_a_replacement_at_once_one_takes_place(store, worker, open_round):
    for number in range(20):
        slot = ShardSlot(ROUND, f"client-{number}", 0)
        await completed(store, slot=slot)
        late = await begun(store, OTHER, TOKENS[1], slot)
        await store.append(late, 0, OTHER)
        answers = await asyncio.gather(
            store.promote(late),
            store.seal(ROUND, slot.client_id, [Digest.of(DATA)]),
            return_exceptions=True,
        )
        failed = [answer.reason for answer in answers if isinstance(answer, DomainError)]
        assert failed in ([Reason.UPDATE_REWRITTEN], [Reason.SHARD_MISSING])
        kept = DATA if failed == [Reason.UPDATE_REWRITTEN] else OTHER
        assert worker.update(slot, Digest.of(kept).sha256) == kept


# Results


async def stored_bytes(store, digest: Digest, offset: int = 0) -> bytes:
    return await store.result_run(ROUND, 0, digest, offset)


async def test_missing_names_the_first_client_without_the_committed_content(store, open_round):
    await completed(store)
    assert await store.missing(request()) == "bob"
    await completed(store, OTHER, ShardSlot(ROUND, "bob", 0))
    assert await store.missing(request()) == "bob"
    await completed(store, slot=ShardSlot(ROUND, "bob", 0))
    assert await store.missing(request()) is None


async def test_a_published_result_is_the_answer_to_its_request_alone(store, worker, open_round):
    assert await store.claim(request()) is None
    result = worker.publish(request(), DATA, 1.5)
    assert (result.digest, result.cpu_s) == (Digest.of(DATA), 1.5)
    assert await store.result(request()) == await store.claim(request()) == result
    assert await store.result(request((0.5, 0.5))) is None
    assert await store.result_digest(ROUND, 0) == Digest.of(DATA)
    assert await stored_bytes(store, Digest.of(DATA), 4) == DATA[4:]


async def test_of_two_results_of_one_request_the_first_stored_wins(store, worker, client, open_round):
    await store.claim(request())
    first = worker.publish(request(), DATA, 1.0)
    keys = sorted(client.keys())
    assert worker.publish(request(), OTHER, 2.0) == first
    assert worker.publish(request(), DATA, 3.0) == first
    assert await stored_bytes(store, first.digest) == DATA
    assert sorted(client.keys()) == keys


async def test_a_request_given_up_for_a_newer_one_cannot_publish(store, worker, client, open_round):
    await store.claim(request())
    await store.claim(request((0.5, 0.5)))
    with refused(Reason.SHARD_REWRITTEN):
        worker.publish(request(), DATA, 1.0)
    assert client.keys("*" + Digest.of(DATA).sha256.hex()) == []
    newer = worker.publish(request((0.5, 0.5)), OTHER, 1.0)
    assert await store.result_digest(ROUND, 0) == newer.digest


async def test_a_request_given_up_for_one_with_fewer_contributions_claims_nothing_after_it(
    store, worker, open_round
):
    """Simulation: its call was on its way to another replica when the coordinator cancelled it."""
    await store.claim(request())
    newer = worker.publish(request(), DATA, 1.0)
    with refused(Reason.SHARD_REWRITTEN):
        await store.claim(request((0.25, 0.25, 0.5)))
    with refused(Reason.SHARD_REWRITTEN):
        worker.publish(request((0.25, 0.25, 0.5)), OTHER, 1.0)
    assert await store.result_digest(ROUND, 0) == newer.digest


async def test_a_late_result_equal_to_the_stored_one_does_not_delete_it(store, worker, open_round):
    await store.claim(request((0.5, 0.5)))
    result = worker.publish(request((0.5, 0.5)), DATA, 1.0)
    with refused(Reason.SHARD_REWRITTEN):
        worker.publish(request(), DATA, 1.0)
    assert await stored_bytes(store, result.digest) == DATA


async def test_a_newer_result_replaces_the_bytes_of_the_older(store, worker, client, open_round):
    await store.claim(request())
    older = worker.publish(request(), DATA, 1.0)
    await store.claim(request((0.5, 0.5)))
    worker.publish(request((0.5, 0.5)), OTHER, 1.0)
    assert client.keys("*" + older.digest.sha256.hex()) == []
    with refused(Reason.RESULT_UNKNOWN):
        await stored_bytes(store, older.digest)


async def test_an_unknown_result_is_refused(store, open_round):
    with refused(Reason.RESULT_UNKNOWN):
        await store.result_digest(ROUND, 0)


# Closing


async def test_closing_deletes_updates_first_and_results_when_asked(store, worker, client, open_round):
    await completed(store)
    await store.append(await begun(store, slot=ShardSlot(ROUND, "bob", 0)), 0, DATA[:3])
    await store.claim(request())
    result = worker.publish(request(), DATA, 1.0)
    await store.close_round(ROUND, results=False)
    assert await stored_bytes(store, result.digest) == DATA
    assert all(b":result" in key for key in set(client.scan_iter()) - set(MARK))
    await store.close_round(ROUND, results=True)
    assert client.keys() == MARK


async def test_closing_deletes_any_number_of_keys(store, client, open_round):
    for number in range(300):
        await begun(store, slot=ShardSlot(ROUND, f"client-{number}", 0))
    await store.close_round(ROUND, results=True)
    assert client.keys() == MARK


async def test_closing_leaves_other_rounds(store, layout, open_round):
    other = ShardSlot("round-10", "alice", 0)
    await store.open_round("round-10", layout, 600)
    await completed(store, slot=other)
    await store.close_round(ROUND, results=True)
    assert len(await store.progress("round-10", "alice")) == 1


async def test_nothing_is_written_for_a_round_after_it_was_closed(store, worker, client, open_round):
    upload = await begun(store)
    await store.append(upload, 0, DATA)
    await store.claim(request())
    await store.close_round(ROUND, results=True)
    for step in (
        store.append(upload, 0, DATA),
        store.promote(upload),
        store.seal(ROUND, "alice", [Digest.of(DATA)]),
        store.claim(request()),
    ):
        with refused(Reason.ROUND_UNKNOWN):
            await step
    with refused(Reason.ROUND_UNKNOWN):
        worker.publish(request(), DATA, 1.0)
    assert client.keys() == MARK


async def test_a_round_that_was_closed_is_not_opened_by_a_call_that_comes_late(
    store, new_store, layout, client, open_round
):
    await store.close_round(ROUND, results=True)
    for late in (store, new_store()):
        with refused(Reason.ROUND_UNKNOWN):
            await late.open_round(ROUND, layout, 600)
    with refused(Reason.ROUND_UNKNOWN):
        await begun(store)
    assert client.keys() == MARK
    assert 0 < client.ttl(MARK[0]) <= CLOSED_LIFE_S


async def test_what_a_worker_leaves_that_dies_before_it_publishes_expires_soon(store, worker, layout, client):
    await store.open_round(ROUND, layout, 100_000)
    await store.claim(request())
    bytes_key = RoundKeys(ROUND).result_bytes(0, Digest.of(DATA).sha256)
    worker._put(bytes_key, DATA)
    assert 0 < client.ttl(bytes_key) <= STAGED_LIFE_S
    worker.publish(request(), DATA, 1.0)
    assert client.ttl(bytes_key) > STAGED_LIFE_S
    worker._put(bytes_key, DATA)  # by a late worker: what is published stays as long as before
    assert client.ttl(bytes_key) > STAGED_LIFE_S


async def test_a_result_whose_bytes_expired_before_it_was_published_is_made_again(
    store, worker, client, open_round, monkeypatch
):
    await store.claim(request())
    monkeypatch.setattr(worker, "_put", lambda *_: None)
    with refused(Reason.STORE_UNAVAILABLE):
        worker.publish(request(), DATA, 1.0)
    assert await store.result(request()) is None


async def test_a_round_closed_while_a_worker_stores_its_result_leaves_nothing(
    store, worker, client, open_round, monkeypatch
):
    put = worker._put

    def put_before_and_after_the_round_is_closed(*args):
        put(*args)
        client.flushall()  # all that CloseRound deletes
        put(*args)

    monkeypatch.setattr(worker, "_put", put_before_and_after_the_round_is_closed)
    await store.claim(request())
    with refused(Reason.ROUND_UNKNOWN):
        worker.publish(request(), DATA, 1.0)
    assert client.keys() == []


async def test_a_result_too_large_to_store_is_refused_for_good(store, worker, open_round, monkeypatch):
    monkeypatch.setattr("services.aggregation.store.MAX_RESULT_BYTES", len(DATA) - 1)
    await store.claim(request())
    with refused(Reason.TRANSFER_TOO_LARGE):
        worker.publish(request(), DATA, 1.0)


async def test_every_key_expires_with_its_round(store, worker, client, open_round):
    await completed(store)
    await store.append(await begun(store, OTHER), 0, OTHER[:1])
    await store.claim(request())
    worker.publish(request(), DATA, 1.0)
    client.pexpire(RoundKeys(ROUND).round, 300_000)
    await completed(store, slot=ShardSlot(ROUND, "bob", 0))
    assert all(0 < client.ttl(key) <= 600 for key in client.scan_iter())
    assert client.ttl(RoundKeys(ROUND).client("bob")) <= 300


async def test_a_store_that_does_not_answer_is_unavailable(layout):
    store = connect("redis://127.0.0.1:1", connections=1, timeout_s=1)
    with refused(Reason.STORE_UNAVAILABLE):
        await store.open_round(ROUND, layout, 600)
    await store.close()


async def test_a_cancelled_caller_stops_whenever_the_cancellation_comes(store, open_round):
    """Regression: under redis-py's socket timeout, Python 3.11 lost a cancellation that met the end of a write."""
    upload = await begun(store)

    async def forever() -> None:
        while True:
            await store.append(upload, 0, DATA)

    for delay in range(100):
        task = asyncio.create_task(forever())
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        _, pending = await asyncio.wait([task], timeout=60)
        assert not pending
