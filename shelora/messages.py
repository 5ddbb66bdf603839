"""Domain values to protobuf messages and back. Untrusted bytes become checked values here, once.

Ciphertexts stay bytes: `validate_update` has `shelora.ckks.wire` check every coefficient of them.
"""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from shelora.ckks.wire import BlockShape, validate_block
from shelora.errors import DomainError, Reason
from shelora.lora.layout import FORMAT, Layout, Matrix, Shard, Tensor
from shelora.lora.shards import Float32, MatrixAggregate, MatrixPart, ResultShardContent, UpdateShardContent
from shelora.v1 import common_pb2 as pb

_Pieces: TypeAlias = list[bytes | memoryview]
_Shard = TypeVar("_Shard", pb.UpdateShard, pb.ResultShard)
_LENGTH_DELIMITED = 2
"""Protobuf's wire type of bytes and messages."""
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
    matrices = [_bytes_field(1, _buffer(m.B)) + _bytes_field(2, _buffer(m.clear_A)) for m in content.matrices]
    return _shard_bytes(head, 6, matrices, content.clear_tensors, content.ciphertexts)


def decode_update(layout: Layout, index: int, data: bytes) -> UpdateShardContent:
    """Parses and checks everything but the ciphertexts, which stay bytes.

    Raises: what `parse_update` raises, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    content = parse_update(layout, index, data)
    shard = layout.shards[index]
    for i, part in zip(shard.matrices, content.matrices, strict=True):
        _check_values(part.B, f"B of {layout.matrices[i].name}")
        _check_values(part.clear_A, f"A of {layout.matrices[i].name}", _LARGEST_A)
    _check_tensors(layout, shard, content.clear_tensors)
    return content


def parse_update(layout: Layout, index: int, data: bytes) -> UpdateShardContent:
    """Parses a shard and checks its shape. Enough for a shard whose values were checked when it arrived.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH.
    """
    message = _parse(pb.UpdateShard(), data)
    shard = _expect_shard(layout, index, message)
    _expect(1 <= message.rank <= (layout.max_rank if shard.matrices else 1), f"rank {message.rank}")
    _expect(message.encrypted_tiers <= len(layout.tiers), f"encrypted_tiers {message.encrypted_tiers}")
    _expect(len(message.matrices) == len(shard.matrices), f"{len(message.matrices)} matrices")
    parts = tuple(
        _matrix_part(layout.matrices[i], part, message.rank, message.encrypted_tiers)
        for i, part in zip(shard.matrices, message.matrices, strict=True)
    )
    return UpdateShardContent(
        shard=index,
        rank=message.rank,
        encrypted_tiers=message.encrypted_tiers,
        matrices=parts,
        clear_tensors=_clear_tensors(layout, shard, message.clear_tensors),
        ciphertexts=message.ciphertexts,
    )


def update_block_shape(layout: Layout, content: UpdateShardContent) -> BlockShape | None:
    """The shape the ciphertexts of an update shard must have; None if it must have none."""
    shard = layout.shards[content.shard]
    chunks = layout.chunk_count(shard, content.encrypted_tiers)
    if not chunks:
        return None
    return BlockShape(layout.ckks, layout.key_id, rows=content.rank, chunks=chunks, seeded=True)


def validate_update(layout: Layout, index: int, data: bytes) -> UpdateShardContent:
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


def _matrix_result(aggregate: MatrixAggregate) -> _Pieces:
    head = pb.MatrixResult(directions=aggregate.Q.shape[1])
    tail = pb.MatrixResult(row_exponents=aggregate.row_exponents, energy_left_out=aggregate.energy_left_out)
    factors = _bytes_field(2, _buffer(aggregate.Q)) + _bytes_field(3, _buffer(aggregate.clear_M))
    return [_message(head), *factors, _message(tail)]


def decode_result(layout: Layout, index: int, data: bytes) -> ResultShardContent:
    """Parses and checks everything but the ciphertexts, which stay bytes.

    Raises: SHARD_MALFORMED, LAYOUT_MISMATCH, SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
    """
    message = _parse(pb.ResultShard(), data)
    shard = _expect_shard(layout, index, message)
    _expect(len(message.matrices) == len(shard.matrices), f"{len(message.matrices)} matrices")
    content = ResultShardContent(
        shard=index,
        contributor_count=message.contributor_count,
        matrices=tuple(
            _matrix_aggregate(layout, layout.matrices[i], part)
            for i, part in zip(shard.matrices, message.matrices, strict=True)
        ),
        clear_tensors=_clear_tensors(layout, shard, message.clear_tensors),
        ciphertexts=message.ciphertexts,
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


def _parse(message: _Shard, data: bytes) -> _Shard:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise DomainError(Reason.SHARD_MALFORMED, "the shard is not a valid message") from error
    return message


def _expect_shard(layout: Layout, index: int, message: pb.UpdateShard | pb.ResultShard) -> Shard:
    if message.format != FORMAT:
        raise DomainError(Reason.SHARD_MALFORMED, f"shard format {message.format} is not {FORMAT}")
    if message.layout_digest != layout.digest or message.shard != index:
        raise DomainError(Reason.LAYOUT_MISMATCH, "the shard was made for another layout or index")
    return layout.shard(index)


def _expect(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    if not condition:
        raise DomainError(Reason.SHAPE_MISMATCH, f"the shard does not fit its layout: {what}")


def _matrix_part(matrix: Matrix, part: pb.MatrixUpdate, rank: int, tiers: int) -> MatrixPart:
    clear = matrix.in_features - matrix.protected(tiers)
    b = _from_bytes(part.b, (matrix.out_features, rank), f"B of {matrix.name}")
    a = _from_bytes(part.clear_a, (rank, clear), f"A of {matrix.name}")
    return MatrixPart(b, a)


def _matrix_aggregate(layout: Layout, matrix: Matrix, part: pb.MatrixResult) -> MatrixAggregate:
    q = part.directions
    _expect(q <= min(layout.max_directions, matrix.out_features), f"{q} directions of {matrix.name}")
    _expect(len(part.row_exponents) == q, f"row exponents of {matrix.name}")
    _expect(0 <= part.energy_left_out <= 1, f"energy left out of {matrix.name}")
    _expect(
        all(abs(e) <= _MAX_EXPONENT for e in part.row_exponents), f"range of row exponents of {matrix.name}"
    )
    return MatrixAggregate(
        Q=_from_bytes(part.q, (matrix.out_features, q), f"Q of {matrix.name}"),
        clear_M=_from_bytes(part.clear_m, (q, matrix.clear), f"M of {matrix.name}"),
        row_exponents=tuple(part.row_exponents),
        energy_left_out=part.energy_left_out,
    )


def _clear_tensors(layout: Layout, shard: Shard, parts: Sequence[bytes]) -> tuple[Float32, ...]:
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


# Shards are serialized in pieces that are joined once: protobuf copies megabytes of factors four times. A message's
# serialization is the concatenation of those of its fields, so the bytes are the ones protobuf writes.


def _shard_bytes(
    head: Message,
    first: int,
    matrices: Sequence[_Pieces],
    tensors: Sequence[Float32],
    ciphertexts: bytes,
) -> bytes:
    """A shard whose matrices are field `first`, clear tensors the next and ciphertexts the one after."""
    pieces: _Pieces = [_message(head)]
    for matrix in matrices:
        pieces += _field(first, *matrix)
    for tensor in tensors:
        pieces += _field(first + 1, _buffer(tensor))
    return b"".join((*pieces, *_bytes_field(first + 2, ciphertexts)))


def _message(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _bytes_field(number: int, content: bytes | memoryview) -> _Pieces:
    """A field of bytes; like protobuf's, an empty one is left out."""
    return _field(number, content) if len(content) else []


def _field(number: int, *content: bytes | memoryview) -> _Pieces:
    return [_varint(number << 3 | _LENGTH_DELIMITED) + _varint(sum(map(len, content))), *content]


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _from_bytes(data: bytes, shape: tuple[int, ...], what: str) -> Float32:
    _expect(len(data) == 4 * int(np.prod(shape)), f"{what} has {len(data)} bytes for shape {shape}")
    values: NDArray[np.float32] = np.frombuffer(data, dtype="<f4")
    return values.reshape(shape)
