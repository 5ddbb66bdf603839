"""Shards of matrices under CKKS: B in the clear, a client's columns of A encrypted, their products never formed.

Aggregation decrypts nothing. It goes over the contributions in passes, one client's shard in memory at a time, so that
memory does not grow with the cohort: find Q and R, accumulate M. Where the ranks add up to more than `max_directions`,
R is not kept and a pass between them finds the norms of its rows (docs/protocol.md, "Aggregation").

Slots of encrypted row t hold M[t] * 2^e with the largest e for which ||R_t||_1 * 2^e <= 1/2: rows of A are at most 1
in magnitude, so no slot passes 1/2 and the CKKS modulus is used fully whatever the size of the update.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shelora.ckks.parameters import SUM_LIMIT
from shelora.ckks.partial import PartialSum
from shelora.ckks.wire import BlockReader, encode_block
from shelora.lora.algebra import NEGLIGIBLE, DirectionSketch, coordinates
from shelora.lora.arrays import Arrays, found, pack, taken, unpack
from shelora.lora.fields import clear_format, from_bytes, last, take
from shelora.lora.kind import (
    Accumulates,
    Cohort,
    Contribution,
    Engine,
    Fields,
    UpdateHead,
    check_values,
    expect,
)
from shelora.lora.layout import PRODUCTS, Layout, Matrix, Shard, refuse
from shelora.lora.shards import (
    Buffer,
    Float32,
    Float64,
    MatrixAggregate,
    MatrixPart,
    ResultShardContent,
    UpdateShardContent,
)
from shelora.lora.slots import Segment, Slotted, consecutive
from shelora.v1 import common_pb2 as pb

_LARGEST_A: Final = 1.0
"""Rows of A are normalized to at most one."""
_MAX_EXPONENT: Final = 1000
"""Row exponents beyond this leave the range of float64."""


class Products(Slotted):
    """The kind `products`."""

    name: Final = PRODUCTS

    def require(self, layout: Layout, shard: Shard) -> None:
        """As of `ShardKind`."""
        if not shard.matrices:
            raise refuse("a shard of products holds matrices")

    def segments(self, layout: Layout, shard: Shard, tiers: int | None = None) -> tuple[Segment, ...]:
        """As of `Slotted`: tier by tier, matrix by matrix."""
        count = len(layout.tiers) if tiers is None else tiers
        return tuple(
            consecutive(
                (item, layout.matrices[index].tier_columns[tier], layout.matrices[index].protected(tier))
                for tier in range(count)
                for item, index in enumerate(shard.matrices)
            )
        )

    def clear_bytes(self, layout: Layout, shard: Shard, rank: int, tiers: int) -> int:
        """As of `Slotted`: B, and the columns of A that are not encrypted."""
        matrices = [layout.matrices[i] for i in shard.matrices]
        values = sum(rank * (m.out_features + m.in_features - m.protected(tiers)) for m in matrices)
        return values * layout.clear_bits // 8

    def update_rows(self, rank: int) -> int:
        """As of `Slotted`: those of A."""
        return rank

    def partial_rows(self, layout: Layout) -> int:
        """As of `Slotted`: of M."""
        return layout.max_directions

    def clear_values(self, layout: Layout, shard: Shard) -> int:
        """As of `Slotted`."""
        return sum(layout.matrices[i].clear for i in shard.matrices)

    def result_rows(self, content: ResultShardContent) -> int:
        """As of `Slotted`: those of the largest M."""
        return max((m.Q.shape[1] for m in content.matrices), default=0)

    def read_update(self, layout: Layout, head: UpdateHead, fields: Fields) -> UpdateShardContent:
        """As of `ShardKind`."""
        shard = layout.shards[head.shard]
        expect(1 <= head.rank <= layout.max_rank, f"rank {head.rank}")
        expect(head.encrypted_tiers <= len(layout.tiers), f"encrypted_tiers {head.encrypted_tiers}")
        expect(len(fields.matrices) == len(shard.matrices), f"{len(fields.matrices)} matrices")
        expect(not fields.tensors, f"{len(fields.tensors)} clear tensors")
        return UpdateShardContent(
            shard=head.shard,
            rank=head.rank,
            encrypted_tiers=head.encrypted_tiers,
            matrices=tuple(
                _matrix_part(layout, layout.matrices[i], part, head)
                for i, part in zip(shard.matrices, fields.matrices, strict=True)
            ),
            clear_tensors=(),
            ciphertexts=fields.ciphertexts,
        )

    def check_update(self, layout: Layout, content: UpdateShardContent) -> None:
        """As of `ShardKind`."""
        for i, part in zip(layout.shards[content.shard].matrices, content.matrices, strict=True):
            check_values(part.B, f"B of {layout.matrices[i].name}")
            check_values(part.clear_A, f"A of {layout.matrices[i].name}", _LARGEST_A)

    def read_result(
        self, layout: Layout, shard: int, contributor_count: int, fields: Fields
    ) -> ResultShardContent:
        """As of `ShardKind`."""
        matrices = [layout.matrices[i] for i in layout.shards[shard].matrices]
        expect(len(fields.matrices) == len(matrices), f"{len(fields.matrices)} matrices")
        expect(not fields.tensors, f"{len(fields.tensors)} clear tensors")
        aggregates = tuple(
            _matrix_aggregate(layout, matrix, part)
            for matrix, part in zip(matrices, fields.matrices, strict=True)
        )
        for matrix, aggregate in zip(matrices, aggregates, strict=True):
            check_values(aggregate.Q, f"Q of {matrix.name}")
            check_values(aggregate.clear_M, f"M of {matrix.name}")
        return ResultShardContent(
            shard=shard,
            contributor_count=contributor_count,
            matrices=aggregates,
            clear_tensors=(),
            ciphertexts=fields.ciphertexts,
        )

    def squared_norm(self, layout: Layout, content: UpdateShardContent) -> float:
        """As of `ShardKind`: Σ_i n_i (Σ_j ‖b_ij‖)² over matrices i of n_i columns."""
        matrices = [layout.matrices[i] for i in layout.shards[content.shard].matrices]
        return sum(
            matrix.in_features * float(np.linalg.norm(part.B.astype(np.float64), axis=0).sum()) ** 2
            for matrix, part in zip(matrices, content.matrices, strict=True)
        )

    def common(self, cohort: Cohort) -> bytes:
        """As of `ShardKind`: Q and the row exponents of every matrix, and what R follows from."""
        ranks, rows = _rows(cohort, len(cohort.shard.matrices))
        named = {f"{item}.{name}": array for item, r in enumerate(rows) for name, array in r.arrays()}
        return pack({FIRSTS: np.cumsum([0, *ranks[:-1]]), **named})

    def sum(self, cohort: Cohort, common: bytes, engine: Engine) -> "ProductSum":
        """As of `ShardKind`: Q, clear columns of M, ciphertexts of the others."""
        return ProductSum(cohort, engine, unpack(common))


KIND: Final = Products()


def _matrix_part(layout: Layout, matrix: Matrix, data: Buffer, head: UpdateHead) -> MatrixPart:
    clear = matrix.in_features - matrix.protected(head.encrypted_tiers)
    fields = take(pb.MatrixUpdate(), data, (1, 2))
    read = clear_format(layout.clear_bits).read
    return MatrixPart(
        B=read(last(fields[1]), (matrix.out_features, head.rank), f"B of {matrix.name}"),
        clear_A=read(last(fields[2]), (head.rank, clear), f"A of {matrix.name}"),
    )


def _matrix_aggregate(layout: Layout, matrix: Matrix, data: Buffer) -> MatrixAggregate:
    part = pb.MatrixResult()
    fields = take(part, data, (2, 3))
    q, exponents, energy = part.directions, part.row_exponents, part.energy_left_out
    expect(q <= min(layout.max_directions, matrix.out_features), f"{q} directions of {matrix.name}")
    expect(len(exponents) == q, f"row exponents of {matrix.name}")
    expect(all(abs(e) <= _MAX_EXPONENT for e in exponents), f"range of row exponents of {matrix.name}")
    expect(0 <= energy <= 1, f"energy left out of {matrix.name}")
    return MatrixAggregate(
        Q=from_bytes(last(fields[2]), (matrix.out_features, q), f"Q of {matrix.name}"),
        clear_M=from_bytes(last(fields[3]), (q, matrix.clear), f"M of {matrix.name}"),
        row_exponents=tuple(exponents),
        energy_left_out=energy,
    )


FIRSTS: Final = "firsts"
"""Name of the array of each client's first column in R."""


def _blocks(cohort: Cohort) -> Iterator[list[Float64]]:
    """For each client w_i s_i B_i [out, rank] of every matrix."""
    for contribution, content in cohort:
        yield [contribution.block(part.B) for part in content.matrices]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
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

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Its parts, by name."""
        yield "Q", self.Q
        yield "exponents", np.array(self.exponents, dtype=np.int64)
        yield "energy_left_out", np.array(self.energy_left_out)
        if self.R is not None:
            yield "R", self.R
        if self.basis is not None:
            yield "basis", self.basis

    @classmethod
    def from_arrays(cls, arrays: Arrays, item: int) -> "_Rows":
        """The rows of a shard's matrix, of what `arrays` gave of all. Raises SHARD_MALFORMED."""
        return cls(
            Q=found(arrays, f"{item}.Q"),
            exponents=tuple(found(arrays, f"{item}.exponents").tolist()),
            energy_left_out=float(found(arrays, f"{item}.energy_left_out")),
            R=arrays.get(f"{item}.R"),
            basis=arrays.get(f"{item}.basis"),
        )


class ProductSum:
    """A `ShardSum` of products: clear columns of M, and the slots of the others."""

    def __init__(self, cohort: Cohort, engine: Engine, arrays: Arrays) -> None:
        """Takes the arrays in `Products.common`."""
        layout, matrices = cohort.layout, cohort.shard.matrices
        self._cohort = cohort
        self._rows = [_Rows.from_arrays(arrays, item) for item in range(len(matrices))]
        self._first = dict(
            zip((c.client_id for c in cohort.contributions), found(arrays, FIRSTS).tolist(), strict=True)
        )
        self._clear = [
            np.zeros((r.Q.shape[1], layout.matrices[i].clear))
            for r, i in zip(self._rows, matrices, strict=True)
        ]
        self._slots = _EncryptedSlots.create(cohort, engine, max(r.Q.shape[1] for r in self._rows))

    def add(self, contribution: Contribution, content: UpdateShardContent) -> None:
        """As of `ShardSum`."""
        parts, first = content.matrices, self._first[contribution.client_id]
        R = [
            rows.coordinates(contribution, part.B, first)
            for rows, part in zip(self._rows, parts, strict=True)
        ]
        for M, part, R_i in zip(self._clear, parts, R, strict=True):
            M += R_i @ part.clear_A[:, part.clear_A.shape[1] - M.shape[1] :]  # noqa: PLW2901 - in place
        if self._slots is not None:
            self._slots.add(content, [r.scale * R_i for r, R_i in zip(self._rows, R, strict=True)])

    def partial(self) -> bytes:
        """As of `ShardSum`."""
        clear = {f"{item}.M": M for item, M in enumerate(self._clear)}
        return pack({**clear, **(self._slots.partial().arrays() if self._slots is not None else {})})

    def merge(self, data: bytes) -> None:
        """As of `ShardSum`."""
        arrays = unpack(data)
        for item, M in enumerate(self._clear):
            M += taken(arrays, f"{item}.M", M.shape)  # noqa: PLW2901 - in place
        if self._slots is not None:
            self._slots.merge(arrays)

    def finish(self) -> ResultShardContent:
        """As of `ShardSum`."""
        self._clear.reverse()  # so that each M is let go as it is rounded
        return ResultShardContent(
            shard=self._cohort.index,
            contributor_count=len(self._cohort.contributions),
            matrices=tuple(
                MatrixAggregate(
                    Q=r.Q,
                    clear_M=self._clear.pop().astype(np.float32),
                    row_exponents=r.exponents,
                    energy_left_out=r.energy_left_out,
                )
                for r in self._rows
            ),
            clear_tensors=(),
            ciphertexts=self._slots.finish() if self._slots is not None else b"",
        )


def _rows(cohort: Cohort, count: int) -> tuple[list[int], list[_Rows]]:
    """The clients' ranks, and what is known of each of `count` matrices."""
    ranks = []
    sketches = [DirectionSketch(cohort.layout.max_directions) for _ in range(count)]
    for blocks in _blocks(cohort):
        ranks.append(blocks[0].shape[1])
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch.add(block)
    if not sketches[0].exact:  # all see the same ranks
        return ranks, _cut_rows(cohort, [sketch.directions()[0] for sketch in sketches])
    return ranks, [_exact_rows(*sketch.directions()) for sketch in sketches]


def _exact_rows(basis: Float64, R: Float64 | None) -> _Rows:
    assert R is not None
    used, exponents = _used(np.abs(R).sum(axis=1))
    return _Rows(Q=_columns(basis, used).astype(np.float32), exponents=exponents, R=R[used])


def _cut_rows(cohort: Cohort, bases: list[Float64]) -> list[_Rows]:
    """Norms of the rows of R, and how much of the stacked B lies outside Q, by another pass."""
    norms = [np.zeros(basis.shape[1]) for basis in bases]
    kept = np.zeros(len(bases))
    total = np.zeros(len(bases))
    for blocks in _blocks(cohort):
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
    return _Rows(Q=kept.astype(np.float32), exponents=exponents, energy_left_out=energy_left_out, basis=kept)


def _columns(basis: Float64, used: NDArray[np.intp]) -> Float64:
    return basis if len(used) == basis.shape[1] else np.ascontiguousarray(basis[:, used])


def _used(norms: Float64) -> tuple[NDArray[np.intp], tuple[int, ...]]:
    """Rows of R that some update uses, and the exponent of each from its norm."""
    used = np.flatnonzero(norms > NEGLIGIBLE * norms.max(initial=0))
    return used, tuple(math.floor(math.log2(SUM_LIMIT / norm)) for norm in norms[used])


class _EncryptedSlots:
    """The encrypted slots of a shard of matrices: ciphertexts of those who encrypt, plaintext of those who do not."""

    def __init__(self, layout: Layout, index: int, accumulator: Accumulates, row_count: int) -> None:
        self._layout = layout
        self._shard = layout.shards[index]
        self._segments = KIND.segments(layout, self._shard)
        self._accumulator = accumulator
        self._clear = np.zeros((row_count, KIND.slot_count(layout, self._shard)))

    @classmethod
    def create(cls, cohort: Cohort, engine: Engine, row_count: int) -> "_EncryptedSlots | None":
        """None if nothing of the shard is encrypted or the aggregate is zero."""
        layout, segments = cohort.layout, KIND.segments(cohort.layout, cohort.shard)
        if not segments or not row_count:
            return None
        sums = engine(layout.ckks, layout.key_id).accumulator([s.slots for s in segments], row_count)
        return cls(layout, cohort.index, sums, row_count)

    def add(self, content: UpdateShardContent, scaled: list[Float64]) -> None:
        """Adds one client's columns; scaled[item] is 2^e R_i [q, rank] of each matrix."""
        encrypted = len(KIND.segments(self._layout, self._shard, content.encrypted_tiers))
        shape = KIND.update_block_shape(self._layout, content)
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

    def partial(self) -> PartialSum:
        self._accumulator.add_clear(self._clear)
        return self._accumulator.partial()

    def merge(self, arrays: Arrays) -> None:
        self._accumulator.merge(PartialSum.from_arrays(arrays, self._accumulator.shape))

    def finish(self) -> bytes:
        if self._clear.any():
            self._accumulator.add_clear(self._clear)
        return encode_block(self._accumulator.finish())
