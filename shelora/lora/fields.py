"""Protobuf's wire format of shards, without protobuf's copies: factors are megabytes, and it copies them four times.

A message's serialization is the concatenation of those of its fields. So large fields are written and read here as
views, and protobuf itself writes and reads the concatenation of all others. The bytes are those protobuf writes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.shards import Buffer, Float32

Pieces: TypeAlias = list[bytes | memoryview]
"""A serialization before it is joined."""

_VARINT: Final = 0
_LENGTH_DELIMITED: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
"""Wire types of fixed length."""
_MAX_VARINT_BYTES: Final = 10


def serialized(message: Message) -> bytes:
    """What protobuf writes, the same on every machine."""
    return message.SerializeToString(deterministic=True)


def bytes_field(number: int, content: bytes | memoryview) -> Pieces:
    """A field of bytes; like protobuf's, an empty one is left out."""
    return message_field(number, content) if len(content) else []


def message_field(number: int, *content: bytes | memoryview) -> Pieces:
    """A field that holds a serialized message."""
    return [_varint(number << 3 | _LENGTH_DELIMITED) + _varint(sum(map(len, content))), *content]


def float_bytes(values: Float32) -> memoryview:
    """float32 little-endian, row major; a view where the values lie so."""
    return np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).data


def half_bytes(values: Float32) -> memoryview:
    """bfloat16 little-endian, row major: a float32's upper 16 bits, the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view("<u4")
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    return (rounded >> 16).astype("<u2").view(np.uint8).data


def from_half_bytes(data: Buffer, shape: tuple[int, ...], what: str) -> Float32:
    """The values of bfloat16 bytes. Raises SHAPE_MISMATCH, naming `what`, for another number of bytes."""
    _require_bytes(data, 2 * math.prod(shape), shape, what)
    values: NDArray[np.float32] = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def from_bytes(data: Buffer, shape: tuple[int, ...], what: str) -> Float32:
    """A view of float32 values. Raises SHAPE_MISMATCH, naming `what`, for another number of bytes."""
    _require_bytes(data, 4 * math.prod(shape), shape, what)
    values: NDArray[np.float32] = np.frombuffer(data, dtype="<f4")
    return values.reshape(shape)


def _require_bytes(data: Buffer, count: int, shape: tuple[int, ...], what: str) -> None:
    if len(data) != count:
        raise DomainError(
            Reason.SHAPE_MISMATCH,
            f"the shard does not fit its layout: {what} has {len(data)} bytes for shape {shape}",
        )


@dataclass(frozen=True, slots=True)
class ClearFormat:
    """How float32 values are written and read."""

    write: Callable[[Float32], memoryview]
    read: Callable[[Buffer, tuple[int, ...], str], Float32]


def clear_format(bits: int) -> ClearFormat:
    """That of clear values of factors, for `Layout.clear_bits`."""
    return {16: ClearFormat(half_bytes, from_half_bytes), 32: ClearFormat(float_bytes, from_bytes)}[bits]


def take(message: Message, data: Buffer, numbers: Sequence[int]) -> dict[int, list[memoryview]]:
    """Takes the fields of these numbers out and has `message` parse the others. Raises SHARD_MALFORMED."""
    try:
        fields, others = take_fields(memoryview(data), numbers)
        message.ParseFromString(others)
    except (ValueError, DecodeError) as error:
        raise DomainError(Reason.SHARD_MALFORMED, "the shard is not a valid message") from error
    return fields


def last(contents: list[memoryview]) -> Buffer:
    """The value of a field that is not repeated: the last one, as in protobuf."""
    return contents[-1] if contents else b""


def take_fields(data: memoryview, numbers: Iterable[int]) -> tuple[dict[int, list[memoryview]], bytes]:
    """The contents of the length-delimited fields of these numbers, in order, and all other fields as one message.

    Raises: ValueError: `data` is not a serialized message.
    """
    taken: dict[int, list[memoryview]] = {number: [] for number in numbers}
    others = []
    at = 0
    while at < len(data):
        first = at
        tag, at = _read_varint(data, at)
        content, at = _content(data, at, tag & 7)
        if tag & 7 == _LENGTH_DELIMITED and tag >> 3 in taken:
            taken[tag >> 3].append(content)
        else:
            others.append(data[first:at])
    return taken, b"".join(others)


def _content(data: memoryview, at: int, wire_type: int) -> tuple[memoryview, int]:
    """The content of a field and where it ends."""
    start = end = at
    if wire_type == _VARINT:
        _, end = _read_varint(data, at)
    elif wire_type == _LENGTH_DELIMITED:
        length, start = _read_varint(data, at)
        end = start + length
    elif wire_type in _FIXED_BYTES:
        end = at + _FIXED_BYTES[wire_type]
    else:
        raise ValueError(f"wire type {wire_type}")
    if end > len(data):
        raise ValueError("a field is truncated")
    return data[start:end], end


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number is truncated")


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
