"""Weighted sums under encryption: all that aggregation does, and it needs no key.

    sum[t, slot] = sum over blocks and their rows j of weights[t, j, segment(slot)] * Enc(value[j, slot])
                   + clear[t, slot]

Slots are runs ("segments", one per LoRA matrix) that share a weight. Two slots travel as one complex number, and
a real weight keeps them apart; so a segment starts at an even slot. Where a chunk holds one segment only, or equal
weights, the product is by a scalar (exact but for one rounding of the weight); elsewhere by an encoded vector.
Where segments are whole blocks of slots, sums are exact matrix products in numpy (exact.py), residue by residue the
ones that SEAL gives elsewhere. Depth is one, there is no rescaling and no key switching (DESIGN.md section 3).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from tenseal import sealapi

from shelora.ckks.exact import ExactSum, SmallRing, largest_degree, small_ring
from shelora.ckks.packing import UInt64Array
from shelora.ckks.parameters import SUM_LIMIT, CkksParameters
from shelora.ckks.partial import PartialSum
from shelora.ckks.seal import Native, SealContext, seal_context
from shelora.ckks.wire import BlockReader, BlockShape, FullBlock, SeededBlock
from shelora.errors import DomainError, Reason

__all__ = ["SUM_LIMIT", "Accumulator", "Evaluator", "FloatArray", "pad_to_chunks"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.intp]

_SLACK: Final = 1e-6
"""Room for rounding in a caller's own normalisation; far inside the parameters' room for noise."""


_ROWS_AT_A_TIME: Final = 64
"""Ciphertexts of a streamed block that are expanded together: 2 MiB at the standard profile."""


@dataclass(frozen=True, eq=False)
class _ChunkRun:
    """The segments that meet one chunk, in slot order, and how many of its pairs of slots each fills.

    The last one has the slots that are left over: they hold zero, so that their weight does not matter.
    """

    segments: IntArray
    pairs: IntArray
    ring: SmallRing | None
    """Where the weights live if they are constant over blocks of slots."""

    def blocks(self, weights: FloatArray) -> FloatArray:
        """Weights [rows, rows_in, all segments] by blocks of this chunk [rows, rows_in, blocks]."""
        assert self.ring is not None
        count = self.ring.degree // 2
        size = self.ring.parameters.slots // 2 // count
        return np.repeat(weights[:, :, self.segments], self.pairs // size, axis=2)


class Evaluator:
    """Makes accumulators for one key. It cannot decrypt: it holds a key's fingerprint, never the key."""

    def __init__(self, parameters: CkksParameters, key_id: bytes) -> None:
        """Args: key_id: 16 bytes, `SecretKey.key_id` of the federation."""
        BlockShape(
            parameters=parameters, key_id=key_id, rows=1, chunks=1, seeded=True
        )  # refuses a malformed key id
        self.parameters = parameters
        self.key_id = key_id

    def __repr__(self) -> str:
        return f"Evaluator({self.parameters.name}, key {self.key_id.hex()})"

    def accumulator(self, segments: Sequence[int], rows: int) -> "Accumulator":
        """An empty sum of `rows` rows over sum(segments) slots.

        Args: segments: lengths of the consecutive runs of slots, each at least 0 and even but for the last.
        Raises: DomainError(INVALID_ARGUMENT): a negative or odd length, or rows below one.
        """
        return Accumulator(self.parameters, self.key_id, segments, rows)


class Accumulator:
    """A sum under construction; see `Evaluator.accumulator`. Not for concurrent use.

    An `add` refused midway has added part of its block: the accumulator is then spent and refuses all use.
    """

    def __init__(self, parameters: CkksParameters, key_id: bytes, segments: Sequence[int], rows: int) -> None:
        if rows < 1 or any(length < 0 for length in segments):
            raise DomainError(Reason.INVALID_ARGUMENT, "an accumulator needs a row and no negative segment")
        if any(start % 2 for start in itertools.accumulate(segments[:-1])):
            raise DomainError(Reason.INVALID_ARGUMENT, "only the last segment may have an odd length")
        self._context = seal_context(parameters)
        self._evaluator = sealapi.Evaluator(self._context.native)
        self._segments = np.asarray(segments, dtype=np.intp)
        self._runs = _chunk_runs(self._segments, parameters)
        self.shape = BlockShape(
            parameters=parameters, key_id=key_id, rows=rows, chunks=len(self._runs), seeded=False
        )
        self.total_slots = int(self._segments.sum())
        self._sums: dict[tuple[int, int], Native] = {}  # (row, chunk) -> native ciphertext
        self._product = sealapi.Ciphertext()
        self._exact: dict[int, ExactSum] = {}  # by chunk
        self._merged: UInt64Array | None = None  # residues [rows, chunks, 2, N] of partial sums
        self._weight_sum = np.zeros((rows, len(segments)))
        self._clear = np.zeros((rows, self.total_slots))
        self._spent = False

    def add(
        self,
        block: SeededBlock | BlockReader,
        weights: FloatArray,
        chunk_indices: Sequence[int] | None = None,
    ) -> None:
        """Adds sum_j weights[t, j, segment] * block[j] to every row t.

        Args:
            block: fresh ciphertexts [rows_in, chunks_in] of this key; a `BlockReader` is streamed, a few
                ciphertexts in memory at a time.
            weights: [rows, rows_in, segments], finite. Over all calls, sum |weights| + |clear| stays within
                1/2 for every row and slot.
            chunk_indices: chunk of the accumulator for each chunk of the block, strictly increasing; by
                default the first chunks_in.
        Raises: DomainError: INVALID_ARGUMENT, SHAPE_MISMATCH (weights), VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE
            (weights), CIPHERTEXT_FOREIGN_PARAMETERS, CIPHERTEXT_FOREIGN_KEY, CIPHERTEXT_WRONG_SCALE,
            CIPHERTEXT_WRONG_SHAPE, CIPHERTEXT_COEFFICIENT_RANGE (streamed blocks).
        """
        self._require_open()
        targets = self._targets(block.shape, chunk_indices)
        self._check_weights(block.shape, weights)
        self._spent = True
        self._weight_sum += np.abs(weights).sum(axis=1)
        for position, chunk in enumerate(targets):
            if self._runs[chunk].ring is not None:
                self._add_exact(block, position, chunk, weights)
                continue
            for row in range(block.shape.rows):
                self._add_products(block, row, position, chunk, weights[:, row])
        self._spent = False

    def add_clear(self, values: FloatArray) -> None:
        """Adds plain values [rows, total_slots], finite; the sum keeps to the limit of `add`.

        Raises: DomainError: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
        """
        self._require_open()
        _check_finite(values, (self.shape.rows, self.total_slots))
        clear = self._clear + values
        self._check_limit(self._weight_sum, clear)
        self._clear = clear

    def partial(self) -> PartialSum:
        """The sum so far, for another accumulator of the same key, segments and rows. Closes this one."""
        sums = self._closed()
        return PartialSum(FullBlock(self.shape, sums[:, :, 0], sums[:, :, 1]), self._weight_sum, self._clear)

    def merge(self, partial: PartialSum) -> None:
        """Adds another accumulator's partial sum: ciphertexts exactly, clear values as floats.

        Raises: DomainError: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE, CIPHERTEXT_WRONG_SHAPE.
        """
        self._require_open()
        if partial.block.shape != self.shape:
            raise DomainError(Reason.CIPHERTEXT_WRONG_SHAPE, "the partial sum is one of other rows or chunks")
        _check_finite(partial.weights, self._weight_sum.shape)
        _check_finite(partial.clear, self._clear.shape)
        weight_sum, clear = self._weight_sum + partial.weights, self._clear + partial.clear
        self._check_limit(weight_sum, clear)
        self._weight_sum, self._clear = weight_sum, clear
        found = np.stack([partial.block.c0, partial.block.c1], axis=2)
        self._merged = found if self._merged is None else self._reduced(self._merged + found)

    def finish(self) -> FullBlock:
        """The sum, [rows, chunks] ciphertexts at the product scale. Closes the accumulator.

        A position that no ciphertext reached becomes a trivial one: c0 encodes the clear value, c1 = 0. It
        hides nothing, as it holds nothing that was encrypted.
        """
        sums = self._closed()
        c0 = sums[:, :, 0]
        for row, clear in enumerate(self._padded_clear()):
            for chunk, values in enumerate(clear):
                c0[row, chunk] += _clear_residues(self._context, values)
        return FullBlock(self.shape, self._reduced(c0), sums[:, :, 1])

    def _closed(self) -> UInt64Array:
        """The sums of ciphertexts, residues [rows, chunks, 2, N]. Closes the accumulator."""
        self._require_open()
        self._spent = True
        shape, degree = self.shape, self.shape.parameters.poly_degree
        sums = np.zeros((shape.rows, shape.chunks, 2, degree), dtype=np.uint64)
        for chunk in tuple(self._exact):
            sums[:, chunk] = self._exact.pop(chunk).result()
        for position in tuple(self._sums):
            sums[position] = self._context.read_full(self._sums.pop(position))
        if self._merged is not None:
            sums += self._merged
            self._merged = None
        return self._reduced(sums)

    def _reduced(self, residues: UInt64Array) -> UInt64Array:
        """Sums of a few residues, modulo the prime."""
        return residues % np.uint64(self.shape.parameters.modulus)

    def _add_exact(
        self, block: SeededBlock | BlockReader, position: int, chunk: int, weights: FloatArray
    ) -> None:
        """Adds one chunk of a block; weights: [rows, rows_in, segments]."""
        blocks, ring = self._runs[chunk].blocks(weights), self._runs[chunk].ring
        assert ring is not None
        total = self._exact.setdefault(chunk, ExactSum(ring, self.shape.rows))
        used = np.flatnonzero(blocks.any(axis=(0, 2)))
        for first in range(0, len(used), _ROWS_AT_A_TIME):
            rows = used[first : first + _ROWS_AT_A_TIME]
            expanded = [self._context.expand(block.seeded_ciphertext(int(row), position)) for row in rows]
            total.add(blocks[:, rows], np.array(expanded))

    def _add_products(
        self, block: SeededBlock | BlockReader, row: int, position: int, chunk: int, weights: FloatArray
    ) -> None:
        """weights: [rows, segments] for one row of the block."""
        run = self._runs[chunk]
        plaintexts = self._plaintexts(weights[:, run.segments], run)
        if all(plaintext is None for plaintext in plaintexts):
            return
        ciphertext = self._context.load_seeded(block.seeded_ciphertext(row, position))
        for target, plaintext in enumerate(plaintexts):
            if plaintext is not None:
                self._add_product((target, chunk), ciphertext, plaintext)

    def _add_product(self, position: tuple[int, int], ciphertext: Native, plaintext: Native) -> None:
        if position not in self._sums:
            self._sums[position] = sealapi.Ciphertext()
            self._evaluator.multiply_plain(ciphertext, plaintext, self._sums[position])
            return
        self._evaluator.multiply_plain(ciphertext, plaintext, self._product)
        try:
            self._evaluator.add_inplace(self._sums[position], self._product)
        except RuntimeError as error:
            # SEAL checks for c1 = 0 after it has written the sum, which is right: opposite weights cancel.
            if "transparent" not in str(error):
                raise

    def _plaintexts(self, weights: FloatArray, run: _ChunkRun) -> list[Native | None]:
        """Encoded weights [rows, segments of the chunk]; None where they round to zero (SEAL refuses the product)."""
        return [self._plaintext(vector) for vector in np.repeat(weights, run.pairs, axis=1)]

    def _plaintext(self, factors: FloatArray) -> Native | None:
        if not factors.any():
            return None
        plaintext = self._context.encode_factors(factors, self.shape.parameters.weight_scale)
        return None if plaintext.is_zero() else plaintext

    def _padded_clear(self) -> FloatArray:
        slots = self.shape.parameters.slots
        return pad_to_chunks(self._clear, self.shape.chunks, slots)

    def _targets(self, shape: BlockShape, chunk_indices: Sequence[int] | None) -> Sequence[int]:
        if shape.parameters.digest != self.shape.parameters.digest:
            raise DomainError(Reason.CIPHERTEXT_FOREIGN_PARAMETERS, "the block has other CKKS parameters")
        if shape.key_id != self.shape.key_id:
            raise DomainError(Reason.CIPHERTEXT_FOREIGN_KEY, "the block is encrypted under another key")
        if not shape.seeded:
            raise DomainError(Reason.CIPHERTEXT_WRONG_SCALE, "only fresh blocks are added; this one is a sum")
        targets = range(shape.chunks) if chunk_indices is None else chunk_indices
        if len(targets) != shape.chunks or not _increasing_below(targets, self.shape.chunks):
            raise DomainError(Reason.CIPHERTEXT_WRONG_SHAPE, "the block's chunks do not fit the accumulator")
        return targets

    def _check_weights(self, shape: BlockShape, weights: FloatArray) -> None:
        _check_finite(weights, (self.shape.rows, shape.rows, len(self._segments)))
        self._check_limit(self._weight_sum + np.abs(weights).sum(axis=1), self._clear)

    def _check_limit(self, weight_sum: FloatArray, clear: FloatArray) -> None:
        """weight_sum: [rows, segments]; clear: [rows, total_slots]."""
        largest = np.repeat(weight_sum, self._segments, axis=1) + np.abs(clear)
        if largest.size and float(largest.max()) > SUM_LIMIT * (1 + _SLACK):
            raise DomainError(Reason.VALUE_OUT_OF_RANGE, "weights and clear values together exceed 1/2")

    def _require_open(self) -> None:
        if self._spent:
            raise DomainError(Reason.INVALID_ARGUMENT, "the accumulator is finished or was refused a block")


def pad_to_chunks(values: FloatArray, chunks: int, slots: int) -> FloatArray:
    """Values [rows, total_slots] as [rows, chunks, slots], zeros at the end of the last chunk."""
    padded = np.zeros((values.shape[0], chunks * slots))
    padded[:, : values.shape[1]] = values
    return padded.reshape(values.shape[0], chunks, slots)


def _chunk_runs(segments: IntArray, parameters: CkksParameters) -> list[_ChunkRun]:
    """The non-empty segments of each chunk."""
    ends = np.cumsum(segments)
    starts = ends - segments
    total = int(ends[-1]) if len(ends) else 0
    return [_chunk_run(starts, ends, first, parameters) for first in range(0, total, parameters.slots)]


def _chunk_run(starts: IntArray, ends: IntArray, first: int, parameters: CkksParameters) -> _ChunkRun:
    lengths = np.minimum(ends, first + parameters.slots) - np.maximum(starts, first)
    inside = np.flatnonzero(lengths > 0)
    pairs = lengths[inside] // 2
    pairs[-1] = parameters.slots // 2 - pairs[:-1].sum()
    return _ChunkRun(inside, pairs, _ring(pairs, parameters))


def _ring(pairs: IntArray, parameters: CkksParameters) -> SmallRing | None:
    """The smallest ring whose blocks no boundary between segments cuts; None if SEAL does as well."""
    size = math.gcd(parameters.slots // 2, *np.cumsum(pairs)[:-1].tolist())
    degree = parameters.slots // size
    return small_ring(parameters, degree) if degree <= largest_degree(parameters) else None


def _clear_residues(context: SealContext, values: FloatArray) -> UInt64Array:
    """Values [slots] encoded at the product scale, as residues [N] in NTT order.

    SEAL's encoder refuses a scale within one bit of the modulus, so values are encoded at half the scale
    and the residues doubled.
    """
    parameters = context.parameters
    if not values.any():
        return np.zeros(parameters.poly_degree, dtype=np.uint64)
    half_scale = parameters.product_scale / 2
    half = context.read_plaintext(context.encode(values, half_scale), half_scale)
    return (half + half) % np.uint64(parameters.modulus)


def _check_finite(values: FloatArray, shape: tuple[int, ...]) -> None:
    if values.shape != shape or values.dtype != np.float64:
        raise DomainError(Reason.SHAPE_MISMATCH, f"expected float64 values of shape {list(shape)}")
    if not np.isfinite(values).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, "values must be finite")


def _increasing_below(indices: Iterable[int], limit: int) -> bool:
    previous = -1
    for index in indices:
        if not previous < index < limit:
            return False
        previous = index
    return True
