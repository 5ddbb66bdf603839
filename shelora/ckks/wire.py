"""The ciphertext wire format: a header that says everything, then one fixed-size record a ciphertext.

    header, 80 bytes, little-endian
        magic 4s "SLCT" | version u16 | kind u16 (1 seeded, 2 full) | poly_degree u32 | scale_bits u32 |
        modulus u64 | parameters digest 32s | key id 16s | rows u32 | chunks u32
    rows * chunks records, row-major
        c0: poly_degree residues of coefficient_bits each, bit-packed (packing.py)
        seeded: the 64-byte seed that expands to c1;  full: c1, packed like c0

Residues are in SEAL's NTT order. A block has one valid encoding. Bytes from outside are read here with numpy
alone: a decoder names the shape it expects, every header field must equal it before anything is allocated,
and native code later sees only integers that passed through here.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.ckks.packing import UInt64Array, pack_bits, packed_words, unpack_bits
from shelora.ckks.parameters import CkksParameters
from shelora.errors import DomainError, Reason

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

KEY_ID_BYTES: Final = 16
SEED_BYTES: Final = 64
"""SEAL's generator seed (Blake2xb), of which c1 is the expansion."""

HEADER_BYTES: Final = 80
MAGIC: Final = b"SLCT"
VERSION: Final = 1
MAX_DIMENSION: Final = 2**32 - 1

_HEADER: Final = struct.Struct("<4sHHIIQ32s16sII")
_KIND_SEEDED: Final = 1
_KIND_FULL: Final = 2
_WORD: Final = np.dtype("<u8")
_VALIDATE_VALUES: Final = 1 << 17
"""Residues unpacked at a time while validating: 1 MiB."""


class _Header(NamedTuple):
    magic: bytes
    version: int
    kind: int
    poly_degree: int
    scale_bits: int
    modulus: int
    digest: bytes
    key_id: bytes
    rows: int
    chunks: int


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What a block must be: its reader builds this from its own knowledge, never from the bytes.

    Raises: DomainError(INVALID_ARGUMENT): a key id of the wrong length or a dimension out of range.
    """

    parameters: CkksParameters
    key_id: bytes
    """16 bytes; see `SecretKey.key_id`."""
    rows: int
    chunks: int
    """Ciphertexts a row."""
    seeded: bool
    """True: fresh from an encryptor, at the value scale. False: accumulated, at the product scale."""

    def __post_init__(self) -> None:
        if len(self.key_id) != KEY_ID_BYTES:
            raise DomainError(Reason.INVALID_ARGUMENT, f"key_id must have {KEY_ID_BYTES} bytes")
        if not (0 <= self.rows <= MAX_DIMENSION and 0 <= self.chunks <= MAX_DIMENSION):
            raise DomainError(Reason.INVALID_ARGUMENT, "rows and chunks must be from 0 to 2^32 - 1")

    @property
    def scale_bits(self) -> int:
        return self.parameters.scale_bits if self.seeded else self.parameters.product_scale_bits

    @property
    def packed_words(self) -> int:
        """64-bit words of one packed polynomial."""
        return packed_words(self.parameters.poly_degree, self.parameters.coefficient_bits)

    @property
    def record_words(self) -> int:
        """64-bit words of one ciphertext."""
        return self.packed_words + (SEED_BYTES // _WORD.itemsize if self.seeded else self.packed_words)

    @property
    def encoded_bytes(self) -> int:
        """Exact length of the encoding."""
        return HEADER_BYTES + self.rows * self.chunks * self.record_words * _WORD.itemsize


class SeededCiphertext(NamedTuple):
    c0: UInt64Array
    """[N] residues below the modulus."""
    seed: UInt8Array
    """[64]."""


class FullCiphertext(NamedTuple):
    c0: UInt64Array
    """[N] residues below the modulus."""
    c1: UInt64Array
    """[N] residues below the modulus."""


@dataclass(frozen=True, eq=False)
class CiphertextBlock:
    """Ciphertexts [rows, chunks] as checked integers; the common part of both kinds.

    Raises: DomainError(CIPHERTEXT_WRONG_SHAPE | CIPHERTEXT_COEFFICIENT_RANGE): arrays do not fit the shape.
    """

    shape: BlockShape
    c0: UInt64Array = field(repr=False)
    """[rows, chunks, N], each below the modulus."""

    def __post_init__(self) -> None:
        self._check_residues(self.c0)

    def _check_residues(self, values: UInt64Array) -> None:
        parameters = self.shape.parameters
        _check_array(values, (self.shape.rows, self.shape.chunks, parameters.poly_degree), np.uint64)
        _check_range(values, parameters.modulus)


@dataclass(frozen=True, eq=False)
class SeededBlock(CiphertextBlock):
    """Fresh ciphertexts: the second polynomial is the expansion of a seed."""

    seeds: UInt8Array = field(repr=False)
    """[rows, chunks, 64]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_kind(self.shape, seeded=True)
        _check_array(self.seeds, (self.shape.rows, self.shape.chunks, SEED_BYTES), np.uint8)

    def seeded_ciphertext(self, row: int, chunk: int) -> SeededCiphertext:
        return SeededCiphertext(self.c0[row, chunk], self.seeds[row, chunk])


@dataclass(frozen=True, eq=False)
class FullBlock(CiphertextBlock):
    """Accumulated ciphertexts: both polynomials."""

    c1: UInt64Array = field(repr=False)
    """[rows, chunks, N], each below the modulus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_kind(self.shape, seeded=False)
        self._check_residues(self.c1)

    def full_ciphertext(self, row: int, chunk: int) -> FullCiphertext:
        return FullCiphertext(self.c0[row, chunk], self.c1[row, chunk])


class BlockReader:
    """An encoded block whose header and length are checked and whose ciphertexts are read one at a time.

    Holds a view of `data`, not a copy: the caller keeps the buffer unchanged while reading.

    Raises: DomainError with the reason of the first failed check; see `decode_block`.
    """

    def __init__(self, data: bytes | memoryview, expected: BlockShape) -> None:
        view = memoryview(data).cast("B")
        _check_header(view, expected)
        _check_length(len(view), expected.encoded_bytes)
        self.shape = expected
        body = np.frombuffer(view[HEADER_BYTES:], dtype=_WORD)
        self._records = body.reshape(expected.rows * expected.chunks, expected.record_words)

    def seeded_ciphertext(self, row: int, chunk: int) -> SeededCiphertext:
        """One ciphertext of a seeded block. Raises: DomainError(CIPHERTEXT_COEFFICIENT_RANGE)."""
        _require_kind(self.shape, seeded=True)
        record = self._record(row, chunk)
        return SeededCiphertext(self._first(record)[0], self._tail(record).view(np.uint8)[0])

    def full_ciphertext(self, row: int, chunk: int) -> FullCiphertext:
        """One ciphertext of a full block. Raises: DomainError(CIPHERTEXT_COEFFICIENT_RANGE)."""
        _require_kind(self.shape, seeded=False)
        record = self._record(row, chunk)
        return FullCiphertext(self._first(record)[0], self._second(record)[0])

    def validate(self) -> None:
        """Checks every residue, in 1 MiB of memory. Raises: DomainError(CIPHERTEXT_COEFFICIENT_RANGE)."""
        step = max(1, _VALIDATE_VALUES // self.shape.parameters.poly_degree)
        for start in range(0, len(self._records), step):
            records = self._records[start : start + step]
            self._first(records)
            if not self.shape.seeded:
                self._second(records)

    def block(self) -> SeededBlock | FullBlock:
        """The whole block. Raises: DomainError(CIPHERTEXT_COEFFICIENT_RANGE)."""
        grid = (self.shape.rows, self.shape.chunks)
        c0 = self._first(self._records).reshape(*grid, self.shape.parameters.poly_degree)
        if self.shape.seeded:
            seeds = self._tail(self._records).view(np.uint8).reshape(*grid, SEED_BYTES)
            return SeededBlock(self.shape, c0, seeds)
        return FullBlock(self.shape, c0, self._second(self._records).reshape(c0.shape))

    def _record(self, row: int, chunk: int) -> UInt64Array:
        if not (0 <= row < self.shape.rows and 0 <= chunk < self.shape.chunks):
            raise DomainError(Reason.INVALID_ARGUMENT, "row or chunk lies outside the block")
        index = row * self.shape.chunks + chunk
        return self._records[index : index + 1]

    def _first(self, records: UInt64Array) -> UInt64Array:
        return self._residues(records[:, : self.shape.packed_words])

    def _second(self, records: UInt64Array) -> UInt64Array:
        return self._residues(records[:, self.shape.packed_words :])

    def _tail(self, records: UInt64Array) -> UInt64Array:
        return records[:, self.shape.packed_words :].copy()

    def _residues(self, words: UInt64Array) -> UInt64Array:
        parameters = self.shape.parameters
        values = unpack_bits(words, parameters.poly_degree, parameters.coefficient_bits)
        _check_range(values, parameters.modulus)
        return values


def encode_block(block: SeededBlock | FullBlock) -> bytes:
    """The one encoding of a block, `block.shape.encoded_bytes` long."""
    shape = block.shape
    records = np.empty((shape.rows * shape.chunks, shape.record_words), dtype=_WORD)
    records[:, : shape.packed_words] = _packed(block.c0, shape.parameters)
    if isinstance(block, SeededBlock):
        tail = np.ascontiguousarray(block.seeds).reshape(len(records), SEED_BYTES).view(_WORD)
    else:
        tail = _packed(block.c1, shape.parameters)
    records[:, shape.packed_words :] = tail
    return b"".join((_HEADER.pack(*_header(shape)), records.data))


def decode_block(data: bytes | memoryview, expected: BlockShape) -> SeededBlock | FullBlock:
    """Reads untrusted bytes as the block `expected` describes.

    Raises: DomainError, for the first of these that fails:
        CIPHERTEXT_TRUNCATED: shorter than a header;
        CIPHERTEXT_MALFORMED: magic, version or kind;
        CIPHERTEXT_FOREIGN_PARAMETERS: digest, poly_degree or modulus;
        CIPHERTEXT_FOREIGN_KEY: key id;
        CIPHERTEXT_WRONG_SCALE: scale_bits;
        CIPHERTEXT_WRONG_SHAPE: rows or chunks;
        CIPHERTEXT_TRUNCATED or CIPHERTEXT_MALFORMED: too short or too long in all;
        CIPHERTEXT_COEFFICIENT_RANGE: a residue at or above the modulus.
    """
    return BlockReader(data, expected).block()


def validate_block(data: bytes | memoryview, expected: BlockShape) -> None:
    """Checks all that `decode_block` checks, in bounded memory, and keeps nothing."""
    BlockReader(data, expected).validate()


def read_ciphertext(
    data: bytes | memoryview, expected: BlockShape, row: int, chunk: int
) -> SeededCiphertext | FullCiphertext:
    """One ciphertext of an encoded block; only its own residues are checked. Errors as in `decode_block`."""
    reader = BlockReader(data, expected)
    return reader.seeded_ciphertext(row, chunk) if expected.seeded else reader.full_ciphertext(row, chunk)


def iterate_ciphertexts(
    data: bytes | memoryview, expected: BlockShape
) -> Iterator[SeededCiphertext] | Iterator[FullCiphertext]:
    """Every ciphertext in row-major order, unpacked one at a time. Errors as in `decode_block`."""
    reader = BlockReader(data, expected)
    grid = [(row, chunk) for row in range(expected.rows) for chunk in range(expected.chunks)]
    if expected.seeded:
        return (reader.seeded_ciphertext(*position) for position in grid)
    return (reader.full_ciphertext(*position) for position in grid)


def _header(shape: BlockShape) -> _Header:
    parameters = shape.parameters
    return _Header(
        magic=MAGIC,
        version=VERSION,
        kind=_KIND_SEEDED if shape.seeded else _KIND_FULL,
        poly_degree=parameters.poly_degree,
        scale_bits=shape.scale_bits,
        modulus=parameters.modulus,
        digest=parameters.digest,
        key_id=shape.key_id,
        rows=shape.rows,
        chunks=shape.chunks,
    )


_HEADER_CHECKS: Final = (
    (("magic", "version", "kind"), Reason.CIPHERTEXT_MALFORMED),
    (("digest", "poly_degree", "modulus"), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
    (("key_id",), Reason.CIPHERTEXT_FOREIGN_KEY),
    (("scale_bits",), Reason.CIPHERTEXT_WRONG_SCALE),
    (("rows", "chunks"), Reason.CIPHERTEXT_WRONG_SHAPE),
)
"""Header fields in the order they are compared, and what a difference means."""


def _check_header(data: memoryview, expected: BlockShape) -> None:
    if len(data) < HEADER_BYTES:
        raise DomainError(Reason.CIPHERTEXT_TRUNCATED, "ciphertext block is shorter than its header")
    found, wanted = _Header._make(_HEADER.unpack_from(data)), _header(expected)
    for names, reason in _HEADER_CHECKS:
        for name in names:
            if getattr(found, name) != getattr(wanted, name):
                raise DomainError(reason, f"ciphertext block header: {name} is not the expected one")


def _check_length(length: int, expected: int) -> None:
    if length < expected:
        raise DomainError(Reason.CIPHERTEXT_TRUNCATED, f"ciphertext block has {length} of {expected} bytes")
    if length > expected:
        excess = length - expected
        raise DomainError(Reason.CIPHERTEXT_MALFORMED, f"ciphertext block has {excess} bytes too many")


def _check_array(values: UInt64Array | UInt8Array, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    if values.shape != shape or values.dtype != np.dtype(dtype):
        raise DomainError(Reason.CIPHERTEXT_WRONG_SHAPE, "ciphertext arrays differ from the declared shape")


def _check_range(values: UInt64Array, modulus: int) -> None:
    if values.size and int(values.max()) >= modulus:
        message = "a ciphertext coefficient is not below the modulus"
        raise DomainError(Reason.CIPHERTEXT_COEFFICIENT_RANGE, message)


def _require_kind(shape: BlockShape, *, seeded: bool) -> None:
    if shape.seeded != seeded:
        kind = "seeded" if seeded else "full"
        raise DomainError(Reason.CIPHERTEXT_MALFORMED, f"expected a {kind} ciphertext block")


def _packed(values: UInt64Array, parameters: CkksParameters) -> UInt64Array:
    flat = values.reshape(-1, parameters.poly_degree)
    return pack_bits(flat, parameters.coefficient_bits)
