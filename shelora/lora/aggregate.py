"""Aggregation of one shard over a cohort: Q, clear columns of M, ciphertexts of the others. Decrypts nothing.

Three passes over the contributions, one client's shard in memory at a time, so that memory does not grow with the
cohort: find Q; find the norms of the rows of R; accumulate M (docs/protocol.md, "Aggregation").

Slots of encrypted row t hold M[t] * 2^e with the largest e for which ||R_t||_1 * 2^e <= 1/2: rows of A are at most 1
in magnitude, so no slot passes 1/2 and the CKKS modulus is used fully whatever the size of the update.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shelora.ckks.evaluator import SUM_LIMIT, Accumulator, Evaluator
from shelora.ckks.wire import BlockReader, encode_block
from shelora.errors import DomainError, Reason
from shelora.lora.algebra import NEGLIGIBLE, DirectionSketch, coordinates
from shelora.lora.layout import Layout, Segment
from shelora.lora.shards import Float32, Float64, MatrixAggregate, ResultShardContent, UpdateShardContent
from shelora.messages import decode_update, encode_result, update_block_shape

TENSOR_HEADROOM = SUM_LIMIT
"""Slots of averaged tensors hold the average times this over the tensor's bound."""
MIN_CONTRIBUTORS = 2


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part in an aggregate."""

    client_id: str
    weight: float
    """w_i; all weights sum to 1."""
    scaling: float = 1.0
    """s_i = alpha / rank; not used for tensors."""


Load = Callable[[str], bytes]
"""Reads a client's serialized, validated UpdateShard."""


def aggregate_shard(layout: Layout, index: int, contributions: Sequence[Contribution], load: Load) -> bytes:
    """The serialized ResultShard of shard `index`.

    Deterministic: the same contributions give the same bytes, on any replica. Raises TOO_FEW_CONTRIBUTORS, and what
    `decode_update` raises if a stored shard is not what was validated.
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
            yield contribution, decode_update(self.layout, self.index, self.load(contribution.client_id))

    def blocks(self) -> Iterator[tuple[UpdateShardContent, list[Float64]]]:
        """For each client its content and w_i s_i B_i [out, rank] of every matrix."""
        for contribution, content in self:
            factor = contribution.weight * contribution.scaling
            yield content, [factor * part.B.astype(np.float64) for part in content.matrices]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What is known of one matrix before M is accumulated."""

    Q: Float64
    exponents: tuple[int, ...]
    energy_left_out: float

    @property
    def scale(self) -> Float64:
        """2^e a row, [q, 1]."""
        return np.exp2(np.array(self.exponents, dtype=np.float64))[:, None]


def _aggregate_matrices(cohort: _Cohort) -> ResultShardContent:
    layout, shard = cohort.layout, cohort.layout.shards[cohort.index]
    matrices = [layout.matrices[i] for i in shard.matrices]
    rows = _rows(cohort, _bases(cohort, len(matrices)))
    clear = [np.zeros((r.Q.shape[1], m.clear)) for r, m in zip(rows, matrices, strict=True)]
    row_count = max(r.Q.shape[1] for r in rows)
    slots = _EncryptedSlots.create(layout, cohort.index, row_count)
    for content, blocks in cohort.blocks():
        R = [coordinates(r.Q, block) for r, block in zip(rows, blocks, strict=True)]
        for M, part, R_i, matrix in zip(clear, content.matrices, R, matrices, strict=True):
            np.add(M, R_i @ part.clear_A[:, part.clear_A.shape[1] - matrix.clear :], out=M)
        if slots is not None:
            slots.add(content, [r.scale * R_i for r, R_i in zip(rows, R, strict=True)])
    return ResultShardContent(
        shard=cohort.index,
        contributor_count=len(cohort.contributions),
        matrices=tuple(
            MatrixAggregate(r.Q.astype(np.float32), M.astype(np.float32), r.exponents, r.energy_left_out)
            for r, M in zip(rows, clear, strict=True)
        ),
        clear_tensors=(),
        ciphertexts=slots.finish() if slots is not None else b"",
    )


def _bases(cohort: _Cohort, count: int) -> list[Float64]:
    sketches = [DirectionSketch(cohort.layout.max_directions) for _ in range(count)]
    for _, blocks in cohort.blocks():
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch.add(block)
    return [sketch.basis() for sketch in sketches]


def _rows(cohort: _Cohort, bases: list[Float64]) -> list[_Rows]:
    """Drops directions no update uses and chooses the exponent of every row."""
    norms = [np.zeros(basis.shape[1]) for basis in bases]
    kept = np.zeros(len(bases))
    total = np.zeros(len(bases))
    for _, blocks in cohort.blocks():
        for item, (basis, block) in enumerate(zip(bases, blocks, strict=True)):
            R_i = coordinates(basis, block)
            norms[item] += np.abs(R_i).sum(axis=1)
            kept[item] += (R_i**2).sum()
            total[item] += (block**2).sum()
    left_out = np.where(total > 0, np.maximum(0, 1 - kept / np.where(total > 0, total, 1)), 0)
    left_out[left_out < NEGLIGIBLE] = 0
    return [
        _used_rows(basis, norm, float(energy))
        for basis, norm, energy in zip(bases, norms, left_out, strict=True)
    ]


def _used_rows(basis: Float64, norms: Float64, energy_left_out: float) -> _Rows:
    used = norms > NEGLIGIBLE * norms.max()
    exponents = tuple(math.floor(math.log2(SUM_LIMIT / norm)) for norm in norms[used])
    return _Rows(np.ascontiguousarray(basis[:, used]), exponents, energy_left_out)


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
        return cls(layout, index, evaluator.accumulator([s.length for s in segments], row_count), row_count)

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
