"""Domain values to protobuf messages and back. Untrusted bytes become checked values here, once.

Ciphertexts stay bytes: `validate_update` has `shelora.ckks.wire` check every coefficient of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from shelora.ckks.wire import BlockShape, validate_block
from shelora.errors import DomainError, Reason
from shelora.lora.fields import Pieces, bytes_field, message_field, serialized, take_fields
from shelora.lora.layout import FORMAT, Layout, Matrix, Shard, Tensor
from shelora.lora.shards import (
    Buffer,
    Float32,
    MatrixAggregate,
    MatrixPart,
    ResultShardContent,
    UpdateShardContent,
)
from shelora.v1 import common_pb2 as pb

_Shard = TypeVar("_Shard", pb.UpdateShard, pb.ResultShard)
_LARGEST_A = 1.0
"""Rows of A are normalized to at most one."""
_MAX_EXPONENT = 1000
"""Row exponents beyond this leave the range of float64."""


def matrix_to_proto(matrix: Matrix) -> pb.Matrix:
    return pb.Matrix(
        name=matrix.name,
        out_features=matrix.out_features,
        in_features=matrix.in_features,
        tier_columns=matrix.tier_columns,
    )


def matrix_from_proto(message: pb.Matrix) -> Matrix:
    return Matrix(message.name, message.out_features, message.in_features, tuple(message.tier_columns))


def tensor_to_proto(tensor: Tensor) -> pb.Tensor:
    return pb.Tensor(name=tensor.name, shape=tensor.shape, bound=tensor.bound)


def tensor_from_proto(message: pb.Tensor) -> Tensor:
    return Tensor(message.name, tuple(message.shape), message.bound)


def layout_to_proto(layout: Layout) -> pb.Layout:
    return pb.Layout(
        parameters=layout.parameters,
        key_id=layout.key_id,
        matrices=[matrix_to_proto(m) for m in layout.matrices],
        tensors=[tensor_to_proto(t) for t in layout.tensors],
        tiers=layout.tiers,
        encrypt_tensors=layout.encrypt_tensors,
        max_rank=layout.max_rank,
        max_directions=layout.max_directions,
        shards=[pb.Shard(matrices=s.matrices, tensors=s.tensors) for s in layout.shards],
    )


def layout_from_proto(message: pb.Layout) -> Layout:
    """Raises INVALID_ARGUMENT naming what is wrong with the layout."""
    return Layout(
        parameters=message.parameters,
        key_id=message.key_id,
        matrices=tuple(matrix_from_proto(m) for m in message.matrices),
        tensors=tuple(tensor_from_proto(t) for t in message.tensors),
        tiers=tuple(message.tiers),
        encrypt_tensors=message.encrypt_tensors,
        max_rank=message.max_rank,
        max_directions=message.max_directions,
        shards=tuple(Shard(tuple(s.matrices), tuple(s.tensors)) for s in message.shards),
    )


def encode_update(layout: Layout, content: UpdateShardContent) -> bytes:
    """The serialized UpdateShard that PutShard streams."""
    head = pb.UpdateShard(
        format=FORMAT,
        layout_digest=layout.digest,
        shard=content.shard,
        rank=content.rank,
        encrypted_tiers=content.encrypted_tiers,
    )
    matrices = [bytes_field(1, _buffer(m.B)) + bytes_field(2, _buffer(m.clear_A)) for m in content.matrices]
    return _shard_bytes(head, 6, matrices, content.clear_tensors, content.ciphertexts)


def decode_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Parses and checks everything but the ciphertexts. The content holds views of `data`, no copies.

    Raises: what `parse_update` raises, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    content = parse_update(layout, index, data)
    shard = layout.shards[index]
    for i, part in zip(shard.matrices, content.matrices, strict=True):
        _check_values(part.B, f"B of {layout.matrices[i].name}")
        _check_values(part.clear_A, f"A of {layout.matrices[i].name}", _LARGEST_A)
    _check_tensors(layout, shard, content.clear_tensors)
    return content


def parse_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Parses a shard and checks its shape. Enough for a shard whose values were checked when it arrived.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH.
    """
    parts = _ShardParts.read(pb.UpdateShard(), data, first=6)
    head, shard = parts.head, _expect_shard(layout, index, parts.head)
    _expect(1 <= head.rank <= (layout.max_rank if shard.matrices else 1), f"rank {head.rank}")
    _expect(head.encrypted_tiers <= len(layout.tiers), f"encrypted_tiers {head.encrypted_tiers}")
    _expect(len(parts.matrices) == len(shard.matrices), f"{len(parts.matrices)} matrices")
    return UpdateShardContent(
        shard=index,
        rank=head.rank,
        encrypted_tiers=head.encrypted_tiers,
        matrices=tuple(
            _matrix_part(layout.matrices[i], part, head.rank, head.encrypted_tiers)
            for i, part in zip(shard.matrices, parts.matrices, strict=True)
        ),
        clear_tensors=_clear_tensors(layout, shard, parts.tensors),
        ciphertexts=parts.ciphertexts,
    )


def update_block_shape(layout: Layout, content: UpdateShardContent) -> BlockShape | None:
    """The shape the ciphertexts of an update shard must have; None if it must have none."""
    shard = layout.shards[content.shard]
    chunks = layout.chunk_count(shard, content.encrypted_tiers)
    if not chunks:
        return None
    return BlockShape(layout.ckks, layout.key_id, rows=content.rank, chunks=chunks, seeded=True)


def validate_update(layout: Layout, index: int, data: Buffer) -> UpdateShardContent:
    """Checks a serialized UpdateShard completely, every ciphertext coefficient included.

    Raises: what `decode_update` raises, CIPHERTEXT_*.
    """
    content = decode_update(layout, index, data)
    shape = update_block_shape(layout, content)
    if shape is None:
        _expect(not content.ciphertexts, "ciphertexts where none belong")
    else:
        validate_block(content.ciphertexts, shape)
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
    return _shard_bytes(head, 5, matrices, content.clear_tensors, content.ciphertexts)


def _matrix_result(aggregate: MatrixAggregate) -> Pieces:
    head = pb.MatrixResult(directions=aggregate.Q.shape[1])
    tail = pb.MatrixResult(row_exponents=aggregate.row_exponents, energy_left_out=aggregate.energy_left_out)
    factors = bytes_field(2, _buffer(aggregate.Q)) + bytes_field(3, _buffer(aggregate.clear_M))
    return [serialized(head), *factors, serialized(tail)]


def decode_result(layout: Layout, index: int, data: Buffer) -> ResultShardContent:
    """Parses and checks everything but the ciphertexts. The content holds views of `data`, no copies.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    parts = _ShardParts.read(pb.ResultShard(), data, first=5)
    shard = _expect_shard(layout, index, parts.head)
    _expect(len(parts.matrices) == len(shard.matrices), f"{len(parts.matrices)} matrices")
    content = ResultShardContent(
        shard=index,
        contributor_count=parts.head.contributor_count,
        matrices=tuple(
            _matrix_aggregate(layout, layout.matrices[i], part)
            for i, part in zip(shard.matrices, parts.matrices, strict=True)
        ),
        clear_tensors=_clear_tensors(layout, shard, parts.tensors),
        ciphertexts=parts.ciphertexts,
    )
    for i, aggregate in zip(shard.matrices, content.matrices, strict=True):
        _check_values(aggregate.Q, f"Q of {layout.matrices[i].name}")
        _check_values(aggregate.clear_M, f"M of {layout.matrices[i].name}")
    _check_tensors(layout, shard, content.clear_tensors)
    return content


def result_block_shape(layout: Layout, content: ResultShardContent) -> BlockShape | None:
    """The shape the ciphertexts of a result shard must have; None if it must have none."""
    shard = layout.shards[content.shard]
    chunks = layout.chunk_count(shard)
    rows = max((m.Q.shape[1] for m in content.matrices), default=0) if shard.matrices else 1
    if not (chunks and rows):
        return None
    return BlockShape(layout.ckks, layout.key_id, rows=rows, chunks=chunks, seeded=False)


@dataclass(frozen=True, slots=True)
class _ShardParts(Generic[_Shard]):
    """A serialized shard, its large fields as views."""

    head: _Shard
    matrices: list[memoryview]
    tensors: list[memoryview]
    ciphertexts: Buffer

    @classmethod
    def read(cls, head: _Shard, data: Buffer, first: int) -> "_ShardParts[_Shard]":
        """Fields as in `_shard_bytes`."""
        fields = _take(head, memoryview(data), (first, first + 1, first + 2))
        return cls(head, fields[first], fields[first + 1], _last(fields[first + 2]))


def _take(message: Message, data: memoryview, numbers: Sequence[int]) -> dict[int, list[memoryview]]:
    """Takes the fields of these numbers out and has `message` parse the others."""
    try:
        fields, others = take_fields(data, numbers)
        message.ParseFromString(others)
    except (ValueError, DecodeError) as error:
        raise DomainError(Reason.SHARD_MALFORMED, "the shard is not a valid message") from error
    return fields


def _last(contents: list[memoryview]) -> Buffer:
    """The value of a field that is not repeated: the last one, as in protobuf."""
    return contents[-1] if contents else b""


def _expect_shard(layout: Layout, index: int, message: pb.UpdateShard | pb.ResultShard) -> Shard:
    if message.format != FORMAT:
        raise DomainError(Reason.SHARD_MALFORMED, f"shard format {message.format} is not {FORMAT}")
    if message.layout_digest != layout.digest or message.shard != index:
        raise DomainError(Reason.LAYOUT_MISMATCH, "the shard was made for another layout or index")
    return layout.shard(index)


def _expect(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    if not condition:
        raise DomainError(Reason.SHAPE_MISMATCH, f"the shard does not fit its layout: {what}")


def _matrix_part(matrix: Matrix, data: memoryview, rank: int, tiers: int) -> MatrixPart:
    clear = matrix.in_features - matrix.protected(tiers)
    fields = _take(pb.MatrixUpdate(), data, (1, 2))
    return MatrixPart(
        B=_from_bytes(_last(fields[1]), (matrix.out_features, rank), f"B of {matrix.name}"),
        clear_A=_from_bytes(_last(fields[2]), (rank, clear), f"A of {matrix.name}"),
    )


def _matrix_aggregate(layout: Layout, matrix: Matrix, data: memoryview) -> MatrixAggregate:
    part = pb.MatrixResult()
    fields = _take(part, data, (2, 3))
    q, exponents, energy = part.directions, part.row_exponents, part.energy_left_out
    _expect(q <= min(layout.max_directions, matrix.out_features), f"{q} directions of {matrix.name}")
    _expect(len(exponents) == q, f"row exponents of {matrix.name}")
    _expect(all(abs(e) <= _MAX_EXPONENT for e in exponents), f"range of row exponents of {matrix.name}")
    _expect(0 <= energy <= 1, f"energy left out of {matrix.name}")
    return MatrixAggregate(
        Q=_from_bytes(_last(fields[2]), (matrix.out_features, q), f"Q of {matrix.name}"),
        clear_M=_from_bytes(_last(fields[3]), (q, matrix.clear), f"M of {matrix.name}"),
        row_exponents=tuple(exponents),
        energy_left_out=energy,
    )


def _clear_tensors(layout: Layout, shard: Shard, parts: Sequence[Buffer]) -> tuple[Float32, ...]:
    tensors = [] if layout.encrypt_tensors else [layout.tensors[i] for i in shard.tensors]
    _expect(len(parts) == len(tensors), f"{len(parts)} clear tensors")
    return tuple(_from_bytes(part, t.shape, t.name) for part, t in zip(parts, tensors, strict=True))


def _check_tensors(layout: Layout, shard: Shard, values: Sequence[Float32]) -> None:
    for index, value in zip(shard.tensors, values, strict=False):  # no values if tensors are encrypted
        _check_values(value, layout.tensors[index].name, layout.tensors[index].bound)


def _check_values(values: Float32, what: str, bound: float | None = None) -> None:
    if not np.isfinite(values).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, f"{what} holds NaN or infinity")
    if bound is not None and values.size and np.abs(values).max() > bound:
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, f"{what} exceeds {bound} in magnitude")


def _buffer(values: Float32) -> memoryview:
    return np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).data


def _shard_bytes(
    head: Message, first: int, matrices: Sequence[Pieces], tensors: Sequence[Float32], ciphertexts: Buffer
) -> bytes:
    """A shard whose matrices are field `first`, clear tensors the next and ciphertexts the one after."""
    pieces: Pieces = [serialized(head)]
    for matrix in matrices:
        pieces += message_field(first, *matrix)
    for tensor in tensors:
        pieces += message_field(first + 1, _buffer(tensor))
    return b"".join((*pieces, *bytes_field(first + 2, ciphertexts)))


def _from_bytes(data: Buffer, shape: tuple[int, ...], what: str) -> Float32:
    _expect(len(data) == 4 * math.prod(shape), f"{what} has {len(data)} bytes for shape {shape}")
    values: NDArray[np.float32] = np.frombuffer(data, dtype="<f4")
    return values.reshape(shape)
