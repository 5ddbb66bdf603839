"""PutShard over real gRPC and a real Redis: what is kept, what is resumed, what is refused."""

import asyncio
import sys

import grpc
import numpy as np
import pytest

from services.aggregation.metrics import STORED_BYTES
from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Encryptor, SecretKey
from shelora.ckks.wire import HEADER_BYTES, encode_block
from shelora.errors import Reason
from shelora.lora.kinds import kind_of
from shelora.lora.screening import squared_norm
from shelora.lora.shards import MatrixPart
from shelora.transport.pieces import PIECE_BYTES, Digest, cut
from shelora.transport.status import error_from_rpc, lost_status
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import common_pb2
from tests.integration.aggregation.service import announcement, eventually, refusal, replica

CLIENT = "client-2"
"""Encrypts both tiers."""


async def test_a_repeated_upload_gets_the_receipt_and_its_pieces_are_not_read(caller, cohort):
    data = cohort.shard_bytes(CLIENT, 0)
    await caller.open(cohort.layout)
    first = await caller.put(cohort.layout, CLIENT, 0, data)
    assert not first.already_stored
    call = caller.stub.PutShard()
    await call.write(announcement(cohort.layout, CLIENT, 0, data))
    answer = await call  # without a piece, and without the end of the stream
    assert answer.already_stored
    assert answer.digest == first.digest


async def test_stored_bytes_are_counted_by_whether_they_are_encrypted(caller, cohort):
    def counted(kind):
        return STORED_BYTES.labels(kind)._value.get()

    data, content = cohort.shard_bytes(CLIENT, 0), cohort.updates[CLIENT].contents[0]
    before = counted("update_encrypted"), counted("update_clear")
    await caller.open(cohort.layout)
    await caller.put(cohort.layout, CLIENT, 0, data)
    await caller.put(cohort.layout, CLIENT, 0, data)  # a repetition stores nothing
    encrypted, clear = counted("update_encrypted") - before[0], counted("update_clear") - before[1]
    assert encrypted == len(content.ciphertexts) > 0
    assert encrypted + clear == len(data)


async def test_another_content_replaces_a_complete_shard(caller, cohort, keys):
    await caller.open(cohort.layout)
    await caller.put(cohort.layout, CLIENT, 1, cohort.shard_bytes(CLIENT, 1))
    stored = len(keys.client.keys())
    part = cohort.updates[CLIENT].contents[1].matrices[0]
    changed = cohort.altered(CLIENT, 1, matrices=(MatrixPart(part.B * np.float32(2), part.clear_A),))
    await caller.put(cohort.layout, CLIENT, 1, changed)
    progress = (await caller.progress(CLIENT))[1]
    assert progress.complete
    assert progress.digest.sha256 == Digest.of(changed).sha256
    assert len(keys.client.keys()) == stored
    assert not (await caller.put(cohort.layout, CLIENT, 1, cohort.shard_bytes(CLIENT, 1))).already_stored


async def test_a_refused_replacement_leaves_the_complete_shard(caller, cohort):
    good = cohort.shard_bytes(CLIENT, 1)
    await caller.open(cohort.layout)
    await caller.put(cohort.layout, CLIENT, 1, good)
    assert await refusal(caller.put(cohort.layout, CLIENT, 1, good[:-1])) is not None
    assert (await caller.put(cohort.layout, CLIENT, 1, good)).already_stored


async def broken_upload(caller, cohort, data: bytes, pieces: int) -> None:
    """Sends some pieces and breaks the call off."""
    call = caller.stub.PutShard()
    await call.write(announcement(cohort.layout, "client-0", 0, data))
    for piece in list(cut(data))[:pieces]:
        await call.write(pb.PutShardRequest(piece=piece))
    await asyncio.sleep(0.05)
    call.cancel()


KILLED_CLIENT = """
import os, sys, time
import grpc
from shelora.v1 import aggregation_pb2 as pb, aggregation_pb2_grpc
def requests():
    with open(sys.argv[2], "rb") as header, open(sys.argv[3], "rb") as data:
        yield pb.PutShardRequest.FromString(header.read())
        for _ in range(6):
            yield pb.PutShardRequest(piece=data.read(256 * 1024))
    print("sent", flush=True)
    time.sleep(1000)
aggregation_pb2_grpc.AggregationStub(grpc.insecure_channel(sys.argv[1])).PutShard(requests())
"""


async def test_a_client_that_is_killed_in_an_upload_can_resume_it(caller, wide, tmp_path):
    """gRPC ends its request stream as if it were complete: it must not be refused as truncated and forgotten."""
    data = wide.shard_bytes("client-0", 0)
    (tmp_path / "header").write_bytes(announcement(wide.layout, "client-0", 0, data).SerializeToString())
    (tmp_path / "data").write_bytes(data)
    await caller.open(wide.layout)
    client = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-c",
            KILLED_CLIENT,
            caller.address,
            str(tmp_path / "header"),
            str(tmp_path / "data"),
        ),
        stdout=asyncio.subprocess.PIPE,
    )
    await client.stdout.readline()
    await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))
    client.kill()
    await client.wait()
    await eventually(lambda: at_least(caller, 6 * PIECE_BYTES))  # the rest of them, when the break is seen
    await caller.put(wide.layout, "client-0", 0, data, offset=6 * PIECE_BYTES)


async def received(caller) -> int:
    progress = await caller.progress("client-0")
    return progress[0].received_bytes if progress else 0


async def test_an_upload_whose_connection_broke_is_resumed_with_the_rest_alone(caller, wide):
    data = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    await broken_upload(caller, wide, data, pieces=6)
    await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))
    offset = await received(caller)
    assert offset < len(data)
    await caller.put(wide.layout, "client-0", 0, data, offset=offset)
    assert (await caller.progress("client-0"))[0].complete


async def at_least(caller, size: int) -> bool:
    return await received(caller) >= size


async def test_pieces_that_are_stored_already_are_skipped(caller, wide):
    data = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    await broken_upload(caller, wide, data, pieces=6)
    await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))
    await caller.put(wide.layout, "client-0", 0, data, offset=100)
    assert (await caller.progress("client-0"))[0].complete


async def test_an_upload_of_other_content_begins_anew(caller, wide):
    data = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    await broken_upload(caller, wide, data, pieces=6)
    await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))
    other = wide.shard_bytes("client-1", 0)
    assert await refusal(caller.put(wide.layout, "client-0", 0, other, offset=100)) is Reason.TRANSFER_OFFSET
    await caller.put(wide.layout, "client-0", 0, other)
    assert (await caller.progress("client-0"))[0].digest.sha256 == Digest.of(other).sha256


async def test_two_uploads_of_the_same_content_at_once_both_succeed(redis_url, pool, caller, wide, keys):
    data = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    async with replica(redis_url, pool) as other:
        await asyncio.gather(
            *(one.put(wide.layout, "client-0", 0, data) for one in (caller, other, caller, other))
        )
    assert (await caller.progress("client-0"))[0].complete
    assert keys.client.strlen(next(key for key in keys.client.keys("*update:*"))) == len(data)


async def test_of_two_uploads_of_different_content_the_later_wins_and_the_earlier_is_told(caller, wide):
    mine, theirs = (wide.shard_bytes(client, 0) for client in wide.clients)
    go_on = asyncio.Event()

    async def in_two_parts():
        yield announcement(wide.layout, "client-0", 0, mine)
        for number, piece in enumerate(cut(mine)):
            if number == 5:
                await go_on.wait()
            yield pb.PutShardRequest(piece=piece)

    async def told() -> Reason:
        """What one attempt is told; another would be the later one."""
        go_on.clear()
        earlier = caller.stub.PutShard(in_two_parts())
        await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))
        await caller.put(wide.layout, "client-0", 0, theirs)
        go_on.set()
        try:
            await earlier
        except grpc.aio.AioRpcError as error:
            return await told() if lost_status(error) else error_from_rpc(error).reason
        raise AssertionError("it was not refused")

    await caller.open(wide.layout)
    assert await told() is Reason.SHARD_REWRITTEN
    progress = (await caller.progress("client-0"))[0]
    assert progress.complete
    assert progress.digest.sha256 == Digest.of(theirs).sha256


async def test_an_upload_that_goes_quiet_loses_its_turn_and_keeps_its_bytes(redis_url, pool, wide):
    data = wide.shard_bytes("client-0", 0)
    async with replica(redis_url, pool, idle_s=0.1) as caller:
        await caller.open(wide.layout)
        call = caller.stub.PutShard()
        await call.write(announcement(wide.layout, "client-0", 0, data))
        await call.write(pb.PutShardRequest(piece=data[:1000]))
        assert await refusal(call) is Reason.STORE_UNAVAILABLE
        assert await received(caller) == 1000
        await caller.put(wide.layout, "client-0", 0, data, offset=1000)


async def test_progress_names_the_digest_the_bytes_and_whether_they_are_checked(caller, cohort):
    data = cohort.shard_bytes(CLIENT, 1)
    await caller.open(cohort.layout)
    assert await caller.progress(CLIENT) == {}
    await caller.put(cohort.layout, CLIENT, 1, data)
    assert await caller.progress(CLIENT) == {
        1: pb.ShardProgress(
            shard=1,
            digest=common_pb2.ShardDigest(sha256=Digest.of(data).sha256, total_bytes=len(data)),
            received_bytes=len(data),
            complete=True,
            squared_norm=squared_norm(cohort.layout, cohort.updates[CLIENT].contents[1]),
        )
    }


async def refused(caller, cohort, data: bytes, keys, **header) -> Reason:
    """The reason for which an upload of shard 1 is refused. Nothing of it is left."""
    await caller.open(cohort.layout)
    reason = await refusal(caller.put(cohort.layout, CLIENT, 1, data, **header))
    assert keys.besides_the_round() == set()
    return reason


def with_block(cohort, change) -> bytes:
    content = cohort.updates[CLIENT].contents[1]
    block = bytearray(content.ciphertexts)
    change(block)
    return cohort.altered(CLIENT, 1, ciphertexts=bytes(block))


async def test_more_bytes_than_a_shard_can_have_are_refused_before_any_is_read(caller, cohort, keys):
    shard = cohort.layout.shards[1]
    largest = kind_of(shard).largest_update_bytes(cohort.layout, shard, cohort.layout.max_rank)
    digest = common_pb2.ShardDigest(sha256=bytes(32), total_bytes=largest + 1)
    await caller.open(cohort.layout)
    call = caller.stub.PutShard()
    await call.write(announcement(cohort.layout, CLIENT, 1, b"", digest=digest))
    assert await refusal(call) is Reason.TRANSFER_TOO_LARGE  # the stream is still open
    assert keys.besides_the_round() == set()


async def test_a_client_that_was_not_asked_stores_nothing(caller, cohort, keys):
    await caller.open(cohort.layout, client_0=cohort.layout.max_rank)
    data = cohort.shard_bytes(CLIENT, 1)
    assert await refusal(caller.put(cohort.layout, CLIENT, 1, data)) is Reason.NOT_IN_COHORT
    assert keys.besides_the_round() == set()
    await caller.put(cohort.layout, "client-0", 1, cohort.shard_bytes("client-0", 1))  # the control


async def test_a_client_stores_no_more_than_an_update_of_its_rank(caller, wide, keys):
    shard, most = wide.layout.shards[0], wide.layout.max_rank
    bounds = [kind_of(shard).largest_update_bytes(wide.layout, shard, rank) for rank in (1, most)]
    assert bounds[0] < bounds[1]
    await caller.open(wide.layout, client_0=1, client_1=most)
    for client, bound, reason in zip(
        wide.clients, bounds, (Reason.NOT_IN_COHORT, Reason.TRANSFER_TOO_LARGE), strict=True
    ):
        digest = common_pb2.ShardDigest(sha256=bytes(32), total_bytes=bound + 1)
        call = caller.stub.PutShard()
        await call.write(announcement(wide.layout, client, 0, b"", digest=digest))
        assert await refusal(call) is reason
    assert keys.besides_the_round() == set()


async def test_uploads_that_are_never_finished_do_not_add_up(caller, wide, keys):
    """Redis holds one of them a shard, beside the shard's checked content, however many are begun."""

    def stored() -> int:
        return sum(
            keys.client.strlen(key)
            for kind in ("partial", "update")
            for key in keys.client.keys(f"*{kind}:*")
        )

    good = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    await caller.put(wide.layout, "client-0", 0, good)
    for number in range(5):
        await broken_upload(caller, wide, bytes([number]) * len(good), pieces=6)
        await eventually(lambda: at_least(caller, 4 * PIECE_BYTES))  # the control: each is kept
        assert stored() <= len(good) + 6 * PIECE_BYTES


async def test_more_bytes_than_announced_are_refused(caller, cohort, keys):
    data = cohort.shard_bytes(CLIENT, 1)
    short = common_pb2.ShardDigest(sha256=Digest.of(data).sha256, total_bytes=len(data) - 1)
    assert await refused(caller, cohort, data, keys, digest=short) is Reason.TRANSFER_TOO_LARGE


async def test_fewer_bytes_than_announced_are_refused(caller, cohort, keys):
    data = cohort.shard_bytes(CLIENT, 1)
    long = common_pb2.ShardDigest(sha256=Digest.of(data).sha256, total_bytes=len(data) + 1)
    assert await refused(caller, cohort, data, keys, digest=long) is Reason.TRANSFER_TRUNCATED


async def test_a_piece_beyond_the_size_of_pieces_is_refused(caller, wide, keys):
    data = wide.shard_bytes("client-0", 0)
    await caller.open(wide.layout)
    call = caller.stub.PutShard()
    await call.write(announcement(wide.layout, "client-0", 0, data))
    await call.write(pb.PutShardRequest(piece=data[: PIECE_BYTES + 1]))
    assert await refusal(call) is Reason.TRANSFER_TOO_LARGE
    assert keys.besides_the_round() == set()


async def test_an_offset_beyond_the_bytes_received_is_refused(caller, cohort, keys):
    assert (
        await refused(caller, cohort, cohort.shard_bytes(CLIENT, 1), keys, offset=1) is Reason.TRANSFER_OFFSET
    )


async def test_bytes_with_another_digest_are_refused(caller, cohort, keys):
    data = cohort.shard_bytes(CLIENT, 1)
    digest = common_pb2.ShardDigest(sha256=bytes(32), total_bytes=len(data))
    assert await refused(caller, cohort, data, keys, digest=digest) is Reason.DIGEST_MISMATCH


async def test_another_layout_is_refused(caller, cohort, keys):
    data = cohort.shard_bytes(CLIENT, 1)
    assert await refused(caller, cohort, data, keys, layout_digest=bytes(32)) is Reason.LAYOUT_MISMATCH


async def test_a_shard_made_for_another_place_is_refused(caller, cohort, keys):
    assert await refused(caller, cohort, cohort.shard_bytes(CLIENT, 0), keys) is Reason.LAYOUT_MISMATCH


async def test_a_shard_that_the_layout_lacks_is_refused(caller, cohort, keys):
    assert await refused(caller, cohort, cohort.shard_bytes(CLIENT, 1), keys, shard=3) is Reason.SHARD_UNKNOWN


async def test_a_round_that_is_not_open_is_refused(caller, cohort, keys):
    data = cohort.shard_bytes(CLIENT, 1)
    assert await refused(caller, cohort, data, keys, round_id="other") is Reason.ROUND_UNKNOWN


async def test_bytes_that_are_no_shard_are_refused(caller, cohort, keys):
    assert await refused(caller, cohort, b"\xff" * 1000, keys) is Reason.SHARD_MALFORMED


async def test_an_empty_shard_is_refused(caller, cohort, keys):
    assert await refused(caller, cohort, b"", keys) is Reason.SHARD_MALFORMED


async def test_a_value_that_is_no_number_is_refused(caller, cohort, keys):
    part = cohort.updates[CLIENT].contents[1].matrices[0]
    B = part.B.copy()
    B[0, 0] = np.nan
    data = cohort.altered(CLIENT, 1, matrices=(MatrixPart(B, part.clear_A),))
    assert await refused(caller, cohort, data, keys) is Reason.VALUE_NOT_FINITE


async def test_a_value_out_of_range_is_refused(caller, cohort, keys):
    part = cohort.updates[CLIENT].contents[1].matrices[0]
    data = cohort.altered(CLIENT, 1, matrices=(MatrixPart(part.B, part.clear_A + np.float32(2)),))
    assert await refused(caller, cohort, data, keys) is Reason.VALUE_OUT_OF_RANGE


async def test_a_matrix_of_another_shape_is_refused(caller, cohort, keys):
    part = cohort.updates[CLIENT].contents[1].matrices[0]
    data = cohort.altered(CLIENT, 1, matrices=(MatrixPart(part.B[1:], part.clear_A),))
    assert await refused(caller, cohort, data, keys) is Reason.SHAPE_MISMATCH


async def test_ciphertexts_under_another_key_are_refused(caller, cohort, keys):
    foreign = Encryptor(SecretKey.generate(INSECURE_TOY))
    slots = kind_of(cohort.layout.shards[1]).slot_count(cohort.layout, cohort.layout.shards[1])
    data = cohort.altered(CLIENT, 1, ciphertexts=encode_block(foreign.encrypt(np.zeros((4, slots)))))
    assert await refused(caller, cohort, data, keys) is Reason.CIPHERTEXT_FOREIGN_KEY


async def test_ciphertexts_of_another_scale_are_refused(caller, cohort, keys):
    data = with_block(cohort, lambda block: block.__setitem__(12, block[12] ^ 1))
    assert await refused(caller, cohort, data, keys) is Reason.CIPHERTEXT_WRONG_SCALE


async def test_a_coefficient_at_or_above_the_modulus_is_refused(caller, cohort, keys):
    data = with_block(
        cohort, lambda block: block.__setitem__(slice(HEADER_BYTES, HEADER_BYTES + 8), b"\xff" * 8)
    )
    assert await refused(caller, cohort, data, keys) is Reason.CIPHERTEXT_COEFFICIENT_RANGE


async def test_truncated_ciphertexts_are_refused(caller, cohort, keys):
    content = cohort.updates[CLIENT].contents[1]
    data = cohort.altered(CLIENT, 1, ciphertexts=content.ciphertexts[:-8])
    assert await refused(caller, cohort, data, keys) is Reason.CIPHERTEXT_TRUNCATED


@pytest.mark.parametrize("field", ["round_id", "client_id"])
async def test_a_header_without_an_identifier_is_refused(caller, cohort, keys, field):
    data = cohort.shard_bytes(CLIENT, 1)
    assert await refused(caller, cohort, data, keys, **{field: ""}) is Reason.INVALID_ARGUMENT


async def test_a_stream_without_a_header_is_refused(caller, cohort):
    assert (
        await refusal(caller.send(lambda: iter([pb.PutShardRequest(piece=b"x")]))) is Reason.INVALID_ARGUMENT
    )
    assert await refusal(caller.send(lambda: iter([]))) is Reason.INVALID_ARGUMENT


async def test_a_second_header_is_refused(caller, cohort, keys):
    header = announcement(cohort.layout, CLIENT, 1, cohort.shard_bytes(CLIENT, 1))
    await caller.open(cohort.layout)
    assert await refusal(caller.send(lambda: iter([header, header]))) is Reason.INVALID_ARGUMENT
    assert keys.besides_the_round() == set()
