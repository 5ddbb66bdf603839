import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError
from shelora.lora.fields import (
    bytes_field,
    from_half_bytes,
    half_bytes,
    message_field,
    serialized,
    take_fields,
)
from shelora.v1 import common_pb2 as pb


@given(b=st.binary(max_size=300), a=st.binary(max_size=300))
def test_pieces_join_to_what_protobuf_writes(b, a):
    message = pb.UpdateShard(format=1, shard=300, rank=2, matrices=[pb.MatrixUpdate(b=b, clear_a=a)])
    pieces = [serialized(pb.UpdateShard(format=1, shard=300, rank=2))]
    pieces += message_field(6, *bytes_field(1, b), *bytes_field(2, a))
    assert b"".join(pieces) == message.SerializeToString(deterministic=True)


@given(
    matrices=st.lists(st.binary(max_size=40), max_size=3),
    tensors=st.lists(st.binary(max_size=40), max_size=3),
    shard=st.integers(0, 2**32 - 1),
)
def test_taken_fields_are_views_and_protobuf_reads_the_rest(matrices, tensors, shard):
    message = pb.UpdateShard(
        format=7, shard=shard, matrices=[pb.MatrixUpdate(b=m) for m in matrices], clear_tensors=tensors
    )
    taken, others = take_fields(memoryview(message.SerializeToString()), (6, 7, 8))
    assert [bytes(field) for field in taken[7]] == tensors
    assert [pb.MatrixUpdate.FromString(bytes(field)).b for field in taken[6]] == matrices
    assert taken[8] == []
    assert pb.UpdateShard.FromString(others) == pb.UpdateShard(format=7, shard=shard)


def test_fields_of_every_wire_type_are_passed_over():
    tail = pb.MatrixResult(directions=3, row_exponents=[-1, 2**30], energy_left_out=0.25)
    data = b"".join([serialized(tail), *bytes_field(2, b"q"), b"\x9d\x06abcd", *bytes_field(3, b"m")])
    taken, others = take_fields(memoryview(data), (2, 3))
    assert (bytes(taken[2][0]), bytes(taken[3][0])) == (b"q", b"m")
    assert pb.MatrixResult.FromString(others).row_exponents == tail.row_exponents


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x80", "number is truncated"),
        (b"\xff" * 11, "number is truncated"),
        (b"\x0a", "number is truncated"),
        (b"\x0a\x05abcd", "field is truncated"),
        (b"\x09abc", "field is truncated"),
        (b"\x0d\x00", "field is truncated"),
        (b"\x0b", "wire type 3"),
        (b"\x0f", "wire type 7"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "field is truncated"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data, why):
    with pytest.raises(ValueError, match=why):
        take_fields(memoryview(data), (1,))


@given(data=st.binary(max_size=60))
def test_random_bytes_are_taken_apart_or_refused(data):
    try:
        taken, others = take_fields(memoryview(data), (1, 2))
    except ValueError:
        return
    assert sum(map(len, taken[1] + taken[2])) + len(others) <= len(data)


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=40))
def test_half_values_are_the_bfloat16_that_torch_rounds_to(values):
    given_values = np.array(values, np.float32)
    read = from_half_bytes(half_bytes(given_values), given_values.shape, "B")
    assert (read == torch.tensor(given_values).bfloat16().float().numpy()).all()
    assert (from_half_bytes(half_bytes(read), read.shape, "B") == read).all()


def test_half_values_of_another_count_are_refused():
    with pytest.raises(DomainError, match=r"B has 6 bytes for shape \(4,\)"):
        from_half_bytes(bytes(6), (4,), "B")
