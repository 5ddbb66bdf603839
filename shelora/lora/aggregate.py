"""Aggregation of one shard over a cohort: Q, clear columns of M, ciphertexts of the others. Decrypts nothing.

Passes over the contributions, one client's shard in memory at a time, so that memory does not grow with the cohort:
find Q and R, accumulate M. Where the ranks add up to more than `max_directions`, R is not kept and a pass between
them finds the norms of its rows (docs/protocol.md, "Aggregation").

Slots of encrypted row t hold M[t] * 2^e with the largest e for which ||R_t||_1 * 2^e <= 1/2: rows of A are at most 1
in magnitude, so no slot passes 1/2 and the CKKS modulus is used fully whatever the size of the update.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shelora.ckks.evaluator import SUM_LIMIT, Accumulator, Evaluator
from shelora.ckks.wire import BlockReader, encode_block
from shelora.errors import DomainError, Reason
from shelora.lora.algebra import NEGLIGIBLE, DirectionSketch, coordinates
from shelora.lora.layout import Layout, Segment
from shelora.lora.shards import Float32, Float64, MatrixAggregate, ResultShardContent, UpdateShardContent
from shelora.messages import encode_result, parse_update, update_block_shape

TENSOR_HEADROOM = SUM_LIMIT
"""Slots of averaged tensors hold the average times this over the tensor's bound."""
MIN_CONTRIBUTORS = 2
"""An aggregate of one update is that update: it is neither made nor decrypted."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part in an aggregate."""

    client_id: str
    weight: float
    """w_i; all weights sum to 1."""
    scaling: float = 1.0
    """s_i = alpha / rank; not used for tensors."""

    def block(self, B: Float32) -> Float64:
        """w_i s_i B_i."""
        return np.multiply(B, self.weight * self.scaling, dtype=np.float64)


Load = Callable[[str], bytes]
"""Reads a client's serialized, validated UpdateShard."""


def aggregate_shard(layout: Layout, index: int, contributions: Sequence[Contribution], load: Load) -> bytes:
    """The serialized ResultShard of shard `index`.

    Deterministic: the same contributions give the same bytes, on any replica. Raises TOO_FEW_CONTRIBUTORS, and what
    `parse_update` raises if a stored shard is not what was validated.
    """
    if len(contributions) < MIN_CONTRIBUTORS:
        raise DomainError(Reason.TOO_FEW_CONTRIBUTORS, f"{len(contributions)} contributions; the least is 2")
    cohort = _Cohort(layout, index, contributions, load)
    content = _aggregate_tensors(cohort) if layout.shard(index).tensors else _aggregate_matrices(cohort)
    return encode_result(layout, content)


@dataclass(frozen=True, slots=True)
class _Cohort:
    """The contributions to one shard, decoded one at a time."""

    layout: Layout
    index: int
    contributions: Sequence[Contribution]
    load: Load

    def __iter__(self) -> Iterator[tuple[Contribution, UpdateShardContent]]:
        for contribution in self.contributions:
            yield contribution, parse_update(self.layout, self.index, self.load(contribution.client_id))

    def blocks(self) -> Iterator[list[Float64]]:
        """For each client w_i s_i B_i [out, rank] of every matrix."""
        for contribution, content in self:
            yield [contribution.block(part.B) for part in content.matrices]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What is known of one matrix before M is accumulated."""

    Q: Float32
    exponents: tuple[int, ...]
    energy_left_out: float = 0.0
    R: Float64 | None = None
    """Coordinates of all clients side by side, or None if they are too many to keep."""
    basis: Float64 | None = None
    """Q before it was rounded, if coordinates are to be found by it."""

    @property
    def scale(self) -> Float64:
        """2^e a row, [q, 1]."""
        return np.exp2(np.array(self.exponents, dtype=np.float64))[:, None]

    def coordinates(self, contribution: Contribution, B: Float32, first: int) -> Float64:
        """R_i [q, rank] of a client whose columns of R start at `first`."""
        if self.R is not None:
            return self.R[:, first : first + B.shape[1]]
        assert self.basis is not None
        return coordinates(self.basis, contribution.block(B))


def _aggregate_matrices(cohort: _Cohort) -> ResultShardContent:
    layout, shard = cohort.layout, cohort.layout.shards[cohort.index]
    rows = _rows(cohort, len(shard.matrices))
    clear = [
        np.zeros((r.Q.shape[1], layout.matrices[i].clear)) for r, i in zip(rows, shard.matrices, strict=True)
    ]
    slots = _EncryptedSlots.create(layout, cohort.index, max(r.Q.shape[1] for r in rows))
    first = 0
    for contribution, content in cohort:
        parts = content.matrices
        R = [r.coordinates(contribution, part.B, first) for r, part in zip(rows, parts, strict=True)]
        for M, part, R_i in zip(clear, parts, R, strict=True):
            M += R_i @ part.clear_A[:, part.clear_A.shape[1] - M.shape[1] :]  # noqa: PLW2901 - in place
        if slots is not None:
            slots.add(content, [r.scale * R_i for r, R_i in zip(rows, R, strict=True)])
        first += content.rank
    clear.reverse()  # so that each M is let go as it is rounded
    return ResultShardContent(
        shard=cohort.index,
        contributor_count=len(cohort.contributions),
        matrices=tuple(
            MatrixAggregate(r.Q, clear.pop().astype(np.float32), r.exponents, r.energy_left_out) for r in rows
        ),
        clear_tensors=(),
        ciphertexts=slots.finish() if slots is not None else b"",
    )


def _rows(cohort: _Cohort, count: int) -> list[_Rows]:
    sketches = [DirectionSketch(cohort.layout.max_directions) for _ in range(count)]
    for blocks in cohort.blocks():
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch.add(block)
    if not sketches[0].exact:  # all see the same ranks
        return _cut_rows(cohort, [sketch.directions()[0] for sketch in sketches])
    return [_exact_rows(*sketch.directions()) for sketch in sketches]


def _exact_rows(basis: Float64, R: Float64 | None) -> _Rows:
    assert R is not None
    used, exponents = _used(np.abs(R).sum(axis=1))
    return _Rows(_columns(basis, used).astype(np.float32), exponents, R=R[used])


def _cut_rows(cohort: _Cohort, bases: list[Float64]) -> list[_Rows]:
    """Norms of the rows of R, and how much of the stacked B lies outside Q, by another pass."""
    norms = [np.zeros(basis.shape[1]) for basis in bases]
    kept = np.zeros(len(bases))
    total = np.zeros(len(bases))
    for blocks in cohort.blocks():
        for item, (basis, block) in enumerate(zip(bases, blocks, strict=True)):
            R_i = coordinates(basis, block)
            norms[item] += np.abs(R_i).sum(axis=1)
            kept[item] += (R_i**2).sum()
            total[item] += (block**2).sum()
    left_out = np.where(total > 0, np.maximum(0, 1 - kept / np.where(total > 0, total, 1)), 0)
    left_out[left_out < NEGLIGIBLE] = 0
    return [_cut_row(*parts) for parts in zip(bases, norms, left_out.tolist(), strict=True)]


def _cut_row(basis: Float64, norms: Float64, energy_left_out: float) -> _Rows:
    used, exponents = _used(norms)
    kept = _columns(basis, used)
    return _Rows(kept.astype(np.float32), exponents, energy_left_out, basis=kept)


def _columns(basis: Float64, used: NDArray[np.intp]) -> Float64:
    return basis if len(used) == basis.shape[1] else np.ascontiguousarray(basis[:, used])


def _used(norms: Float64) -> tuple[NDArray[np.intp], tuple[int, ...]]:
    """Rows of R that some update uses, and the exponent of each from its norm."""
    used = np.flatnonzero(norms > NEGLIGIBLE * norms.max(initial=0))
    return used, tuple(math.floor(math.log2(SUM_LIMIT / norm)) for norm in norms[used])


class _EncryptedSlots:
    """The encrypted slots of a shard of matrices: ciphertexts of those who encrypt, plaintext of those who do not."""

    def __init__(self, layout: Layout, index: int, accumulator: Accumulator, row_count: int) -> None:
        self._layout = layout
        self._shard = layout.shards[index]
        self._segments = layout.segments(self._shard)
        self._accumulator = accumulator
        self._clear = np.zeros((row_count, layout.slot_count(self._shard)))

    @classmethod
    def create(cls, layout: Layout, index: int, row_count: int) -> "_EncryptedSlots | None":
        """None if nothing of the shard is encrypted or the aggregate is zero."""
        segments = layout.segments(layout.shards[index])
        if not segments or not row_count:
            return None
        evaluator = Evaluator(layout.ckks, layout.key_id)
        return cls(layout, index, evaluator.accumulator([s.slots for s in segments], row_count), row_count)

    def add(self, content: UpdateShardContent, scaled: list[Float64]) -> None:
        """Adds one client's columns; scaled[item] is 2^e R_i [q, rank] of each matrix."""
        encrypted = len(self._layout.segments(self._shard, content.encrypted_tiers))
        shape = update_block_shape(self._layout, content)
        if shape is not None:
            block = BlockReader(content.ciphertexts, shape)
            self._accumulator.add(block, self._weights(scaled, content.rank, encrypted))
        for segment in self._segments[encrypted:]:
            self._add_clear(content, segment, scaled[segment.item])

    def _weights(self, scaled: list[Float64], rank: int, encrypted: int) -> Float64:
        """[rows, rank, segments]; zero in segments the client sends in the clear."""
        weights = np.zeros((self._clear.shape[0], rank, len(self._segments)))
        for position, segment in enumerate(self._segments[:encrypted]):
            R = scaled[segment.item]
            weights[: R.shape[0], :, position] = R
        return weights

    def _add_clear(self, content: UpdateShardContent, segment: Segment, R: Float64) -> None:
        part = content.matrices[segment.item]
        matrix = self._layout.matrices[self._shard.matrices[segment.item]]
        start = segment.column - matrix.protected(content.encrypted_tiers)
        columns = part.clear_A[:, start : start + segment.length]
        self._clear[: R.shape[0], segment.slot : segment.slot + segment.length] += R @ columns

    def finish(self) -> bytes:
        if self._clear.any():
            self._accumulator.add_clear(self._clear)
        return encode_block(self._accumulator.finish())


def _aggregate_tensors(cohort: _Cohort) -> ResultShardContent:
    layout = cohort.layout
    encrypted = layout.encrypt_tensors
    return ResultShardContent(
        shard=cohort.index,
        contributor_count=len(cohort.contributions),
        matrices=(),
        clear_tensors=() if encrypted else _average_clear(cohort),
        ciphertexts=_average_encrypted(cohort) if encrypted else b"",
    )


def _average_encrypted(cohort: _Cohort) -> bytes:
    layout = cohort.layout
    slots = layout.slot_count(layout.shards[cohort.index])
    accumulator = Evaluator(layout.ckks, layout.key_id).accumulator([slots], 1)
    for contribution, content in cohort:
        shape = update_block_shape(layout, content)
        if shape is not None:
            weight = TENSOR_HEADROOM * contribution.weight
            accumulator.add(BlockReader(content.ciphertexts, shape), np.full((1, 1, 1), weight))
    return encode_block(accumulator.finish())


def _average_clear(cohort: _Cohort) -> tuple[Float32, ...]:
    shapes = [cohort.layout.tensors[i].shape for i in cohort.layout.shards[cohort.index].tensors]
    means: list[Float64] = [np.zeros(shape) for shape in shapes]
    for contribution, content in cohort:
        for mean, value in zip(means, content.clear_tensors, strict=True):
            np.add(mean, contribution.weight * value, out=mean)
    return tuple(mean.astype(np.float32) for mean in means)
