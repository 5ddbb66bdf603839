import os

import pytest

from client_agent.downloads import Result, download
from client_agent.progress import Activity, Stopped
from client_agent.replicas import replicas_for_transfers
from client_agent.session import digest_to_proto
from client_agent.state import AgentState, Spool
from client_agent.uploads import upload
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Tensor, build_layout
from shelora.messages import layout_to_proto
from shelora.transport.pieces import PIECE_BYTES, Digest
from shelora.v1 import common_pb2
from tests.unit.client_agent.fake_aggregation import FakeAggregation, Shards, serving
from tests.unit.client_agent.notes import NOTE

DATA = os.urandom(3 * PIECE_BYTES + 17)
LAYOUT = build_layout(
    parameters="standard",
    key_id=bytes(16),
    matrices=(),
    tensors=[Tensor("head.bias", (4,))],
    tiers=(),
    encrypt_tensors=True,
    max_rank=1,
    max_directions=1,
)


def in_order(_replicas: list[str]) -> None:
    """Shuffles nothing."""


def spooled(state: AgentState) -> Spool:
    writer = state.begin_spool("films/1")
    writer.add(DATA)
    writer.add(b"second")
    return writer.finish(NOTE)


def published(data: bytes, contributors: int = 2) -> common_pb2.ResultRef:
    return common_pb2.ResultRef(
        round_id="films/1",
        layout=layout_to_proto(LAYOUT),
        shards=[digest_to_proto(Digest.of(data))],
        contributor_count=contributors,
    )


async def test_an_upload_that_breaks_off_goes_on_at_the_next_replica_where_it_stopped(
    state: AgentState,
) -> None:
    shards = Shards()
    failing, sound = FakeAggregation(shards, breaks_after_pieces=2), FakeAggregation(shards)
    async with serving(failing) as one, serving(sound) as two:
        replicas = replicas_for_transfers([one, two], None, shuffle=in_order)
        await upload(replicas, "one", spooled(state), Activity())
        await replicas.close()
    assert failing.offsets == [0]
    assert sound.offsets == [2 * PIECE_BYTES, 0]
    assert {i: bytes(data) for i, data in shards.arrived.items()} == {0: DATA, 1: b"second"}


async def test_shards_that_are_stored_are_not_sent_again(state: AgentState) -> None:
    replica = FakeAggregation(Shards())
    spool = spooled(state)
    async with serving(replica) as address:
        replicas = replicas_for_transfers([address], None)
        await upload(replicas, "one", spool, Activity())
        await upload(replicas, "one", spool, Activity())
        await replicas.close()
    assert replica.offsets == [0, 0]


async def test_a_shard_of_which_other_bytes_arrived_is_sent_from_its_beginning(state: AgentState) -> None:
    shards = Shards({0: bytearray(b"other")}, {0: digest_to_proto(Digest.of(b"other bytes"))})
    replica = FakeAggregation(shards)
    async with serving(replica) as address:
        replicas = replicas_for_transfers([address], None)
        await upload(replicas, "one", spooled(state), Activity())
        await replicas.close()
    assert replica.offsets == [0, 0]
    assert bytes(shards.arrived[0]) == DATA


async def test_an_upload_nobody_wants_any_more_sends_nothing(state: AgentState) -> None:
    replica = FakeAggregation(Shards())
    activity = Activity()
    activity.stop()
    async with serving(replica) as address:
        replicas = replicas_for_transfers([address], None)
        with pytest.raises(Stopped):
            await upload(replicas, "one", spooled(state), activity)
        await replicas.close()
    assert replica.offsets == []


async def test_a_download_that_breaks_off_goes_on_at_the_next_replica(state: AgentState) -> None:
    shards = Shards(results={0: DATA})
    failing, sound = FakeAggregation(shards, breaks_after_pieces=1), FakeAggregation(shards)
    async with serving(failing) as one, serving(sound) as two:
        replicas = replicas_for_transfers([one, two], None, shuffle=in_order)
        inbox = await download(replicas, state, Result.from_proto(published(DATA)), Activity())
        await replicas.close()
    assert (failing.offsets, sound.offsets) == ([0], [PIECE_BYTES])
    assert inbox.read(0) == DATA


async def test_a_download_goes_on_after_a_restart_of_the_agent(state: AgentState) -> None:
    state.open_inbox("films/1").partial(0).write_bytes(DATA[:1000])
    replica = FakeAggregation(Shards(results={0: DATA}))
    async with serving(replica) as address:
        replicas = replicas_for_transfers([address], None)
        inbox = await download(replicas, state, Result.from_proto(published(DATA)), Activity())
        await download(replicas, state, Result.from_proto(published(DATA)), Activity())
        await replicas.close()
    assert replica.offsets == [1000]
    assert inbox.read(0) == DATA


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (DATA[:-1] + bytes([DATA[-1] ^ 1]), Reason.DIGEST_MISMATCH),
        (DATA[:-1], Reason.TRANSFER_TRUNCATED),
        (DATA + b"!", Reason.TRANSFER_TOO_LARGE),
    ],
)
async def test_a_result_with_other_bytes_than_announced_is_refused(
    state: AgentState, sent: bytes, reason: Reason
) -> None:
    async with serving(FakeAggregation(Shards(results={0: sent}))) as address:
        replicas = replicas_for_transfers([address], None)
        with pytest.raises(DomainError) as caught:
            await download(replicas, state, Result.from_proto(published(DATA)), Activity())
        await replicas.close()
    assert caught.value.reason is reason
    assert not state.open_inbox("films/1").has(0, Digest.of(DATA))


def test_a_result_of_one_update_is_refused_before_a_byte_is_fetched() -> None:
    with pytest.raises(DomainError) as caught:
        Result.from_proto(published(DATA, contributors=1))
    assert caught.value.reason is Reason.TOO_FEW_CONTRIBUTORS


def test_a_result_whose_shards_do_not_fit_its_layout_is_refused() -> None:
    message = published(DATA)
    message.shards.append(message.shards[0])
    with pytest.raises(DomainError) as caught:
        Result.from_proto(message)
    assert caught.value.reason is Reason.LAYOUT_MISMATCH
