"""Shards as bytes: the envelope that all kinds share. Untrusted bytes become checked values here, once.

Ciphertexts stay bytes: `validate_update` has the shard's kind check every coefficient of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from shelora.errors import DomainError, Reason
from shelora.lora.fields import (
    Pieces,
    bytes_field,
    clear_format,
    float_bytes,
    last,
    message_field,
    serialized,
    take,
)
from shelora.lora.kind import Fields, UpdateHead
from shelora.lora.kinds import kind_of
from shelora.lora.layout import FORMAT, Layout, Shard
from shelora.lora.shards import Buffer, Float32, MatrixAggregate, ResultShardContent, UpdateShardContent
from shelora.v1 import common_pb2 as pb

_Shard = TypeVar("_Shard", pb.UpdateShard, pb.ResultShard)
_UPDATE_FIELDS = 6
_RESULT_FIELDS = 5
"""Number of the first of the three large fields: matrices, clear tensors, ciphertexts."""


def encode_update(layout: Layout, content: UpdateShardContent) -> bytes:
    """The serialized UpdateShard that PutShard streams."""
    head = pb.UpdateShard(
        format=FORMAT,
        layout_digest=layout.digest,
        shard=content.shard,
        rank=content.rank,
        encrypted_tiers=content.encrypted_tiers,
    )
    write = clear_format(layout.clear_bits).write
    matrices = [bytes_field(1, write(m.B)) + bytes_field(2, write(m.clear_A)) for m in content.matrices]
    return _shard_bytes(head, _UPDATE_FIELDS, matrices, content.clear_tensors, content.ciphertexts)


def decode_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Parses and checks everything but the ciphertexts. The content holds views of `data`; copies of 16-bit values.

    Raises: what `parse_update` raises, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    content = parse_update(layout, index, data)
    kind_of(layout.shards[index]).check_update(layout, content)
    return content


def parse_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Parses a shard and checks its shape. Enough for a shard whose values were checked when it arrived.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH.
    """
    parts = _Parts.read(pb.UpdateShard(), data, _UPDATE_FIELDS)
    shard = _expect_shard(layout, index, parts.head)
    head = UpdateHead(index, parts.head.rank, parts.head.encrypted_tiers)
    return kind_of(shard).read_update(layout, head, parts.fields)


def validate_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Checks a serialized UpdateShard completely, every ciphertext coefficient included.

    Raises: what `decode_update` raises, CIPHERTEXT_*.
    """
    content = decode_update(layout, index, data)
    kind_of(layout.shards[index]).check_ciphertexts(layout, content)
    return content


def encode_result(layout: Layout, content: ResultShardContent) -> bytes:
    """The serialized ResultShard that GetResult streams."""
    head = pb.ResultShard(
        format=FORMAT,
        layout_digest=layout.digest,
        shard=content.shard,
        contributor_count=content.contributor_count,
    )
    matrices = [_matrix_result(m) for m in content.matrices]
    return _shard_bytes(head, _RESULT_FIELDS, matrices, content.clear_tensors, content.ciphertexts)


def decode_result(layout: Layout, index: int, data: Buffer) -> ResultShardContent:
    """Parses and checks everything but the ciphertexts. The content holds views of `data`, no copies.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    parts = _Parts.read(pb.ResultShard(), data, _RESULT_FIELDS)
    shard = _expect_shard(layout, index, parts.head)
    return kind_of(shard).read_result(layout, index, parts.head.contributor_count, parts.fields)


@dataclass(frozen=True, slots=True)
class _Parts(Generic[_Shard]):
    """A serialized shard, its large fields as views."""

    head: _Shard
    fields: Fields

    @classmethod
    def read(cls, head: _Shard, data: Buffer, first: int) -> "_Parts[_Shard]":
        """Fields as in `_shard_bytes`."""
        found = take(head, data, (first, first + 1, first + 2))
        return cls(head, Fields(found[first], found[first + 1], last(found[first + 2])))


def _expect_shard(layout: Layout, index: int, message: pb.UpdateShard | pb.ResultShard) -> Shard:
    if message.format != FORMAT:
        raise DomainError(Reason.SHARD_MALFORMED, f"shard format {message.format} is not {FORMAT}")
    if message.layout_digest != layout.digest or message.shard != index:
        raise DomainError(Reason.LAYOUT_MISMATCH, "the shard was made for another layout or index")
    return layout.shard(index)


def _matrix_result(aggregate: MatrixAggregate) -> Pieces:
    head = pb.MatrixResult(directions=aggregate.Q.shape[1])
    tail = pb.MatrixResult(row_exponents=aggregate.row_exponents, energy_left_out=aggregate.energy_left_out)
    factors = bytes_field(2, float_bytes(aggregate.Q)) + bytes_field(3, float_bytes(aggregate.clear_M))
    return [serialized(head), *factors, serialized(tail)]


def _shard_bytes(
    head: Message, first: int, matrices: Sequence[Pieces], tensors: Sequence[Float32], ciphertexts: Buffer
) -> bytes:
    """A shard whose matrices are field `first`, clear tensors the next and ciphertexts the one after."""
    pieces: Pieces = [serialized(head)]
    for matrix in matrices:
        pieces += message_field(first, *matrix)
    for tensor in tensors:
        pieces += message_field(first + 1, float_bytes(tensor))
    return b"".join((*pieces, *bytes_field(first + 2, ciphertexts)))
