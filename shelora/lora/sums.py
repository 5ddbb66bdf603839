"""Shards under additive encryption: servers only add, and no key opens one client's (`shelora.additive`).

A shard is a run of values in a fixed order. Of tensors it is the tensors, row major. Of a matrix of update ΔW it is

    P = ΔW Ω [out, k],  N = Ψ ΔW [l, in],  Z = Φ₂ ΔW Χ₂ [s - l, s - k],  two exponents

row major, with secret Φ = [Ψ; Φ₂] and Χ = [Ω, Χ₂] (`shelora.lora.sketches`): as many values whatever the client's
rank. All values of a client are multiplied by its weight, which is what makes the sum a weighted one. After the values
of the last shard come those of `shelora.lora.figures`, if the layout's terms say so.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final

from shelora.additive.adder import Adder, validate_shard
from shelora.additive.wire import ShardShape
from shelora.lora import figures
from shelora.lora.kind import ENVELOPE_BYTES, Cohort, Contribution, Engine, Fields, UpdateHead, expect
from shelora.lora.layout import (
    SKETCHES,
    SUMS,
    Layout,
    Matrix,
    Shard,
    SumTerms,
    Tensor,
    refuse,
)
from shelora.lora.shards import Buffer, ResultShardContent, UpdateShardContent

EXPONENTS: Final = 2
"""Values of a sketched matrix that say by which bounds P with Z, and N, were divided."""
SHARD_VALUES: Final = 2**20
"""Values at which a shard is closed: 3 MiB at the standard profile."""


class Summed(ABC):
    """What kinds under additive encryption have in common."""

    protect_copies: Final = 12
    """A value has 3 bytes on the wire and 8 in memory; 9.6 measured."""
    restore_copies: Final = 9
    """6.7 to 6.9 measured."""

    @abstractmethod
    def item_values(self, layout: Layout, shard: Shard) -> int:
        """Values of a shard's matrices or tensors."""

    def values(self, layout: Layout, shard: Shard) -> int:
        """All values of a shard."""
        last = shard == layout.shards[-1]
        return self.item_values(layout, shard) + (figures.COUNT if last and terms_of(layout).figures else 0)

    def shape(self, layout: Layout, index: int) -> ShardShape:
        """What the additive encoding of a shard must be."""
        return ShardShape(terms_of(layout).additive, index, self.values(layout, layout.shard(index)))

    def largest_update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """As of `ShardKind`: all are of one size."""
        return self._encoded_bytes(layout, shard) + ENVELOPE_BYTES

    def update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """As of `ShardKind`: whatever the rank."""
        return self._encoded_bytes(layout, shard)

    def read_update(self, layout: Layout, head: UpdateHead, fields: Fields) -> UpdateShardContent:
        """As of `ShardKind`: nothing but the encoding, of exactly its size."""
        expect(head.rank == 1, f"rank {head.rank}")
        expect(head.encrypted_tiers == 0, f"encrypted_tiers {head.encrypted_tiers}")
        self._expect_size(layout, head.shard, fields)
        return update_of(head.shard, fields.ciphertexts)

    def check_update(self, layout: Layout, content: UpdateShardContent) -> None:  # noqa: B027 - nothing to do
        """As of `ShardKind`: nothing is clear."""

    def check_ciphertexts(self, layout: Layout, content: UpdateShardContent) -> None:
        """As of `ShardKind`."""
        validate_shard(content.ciphertexts, self.shape(layout, content.shard))

    def read_result(
        self, layout: Layout, shard: int, contributor_count: int, fields: Fields
    ) -> ResultShardContent:
        """As of `ShardKind`."""
        self._expect_size(layout, shard, fields)
        return ResultShardContent(
            shard=shard,
            contributor_count=contributor_count,
            matrices=(),
            clear_tensors=(),
            ciphertexts=fields.ciphertexts,
        )

    def squared_norm(self, layout: Layout, content: UpdateShardContent) -> float:
        """As of `ShardKind`: servers see no norm. Agents bound what a sum may change (`shelora.lora.moderation`)."""
        return 0.0

    def partial_bytes(self, layout: Layout, shard: Shard) -> int:
        """As of `ShardKind`: a sum is as long as a summand."""
        return self._encoded_bytes(layout, shard)

    def common(self, cohort: Cohort) -> bytes:
        """As of `ShardKind`: nothing."""
        return b""

    def sum(self, cohort: Cohort, common: bytes, engine: Engine) -> "AddedSum":
        """As of `ShardKind`: the sum; values carry their weights."""
        return AddedSum(cohort.index, Adder(self.shape(cohort.layout, cohort.index)))

    def _expect_size(self, layout: Layout, index: int, fields: Fields) -> None:
        expect(not fields.matrices, f"{len(fields.matrices)} matrices")
        expect(not fields.tensors, f"{len(fields.tensors)} clear tensors")
        wanted, found = self._encoded_bytes(layout, layout.shard(index)), len(fields.ciphertexts)
        expect(found == wanted, f"{found} bytes of ciphertext in place of {wanted}")

    def _encoded_bytes(self, layout: Layout, shard: Shard) -> int:
        return ShardShape(terms_of(layout).additive, 0, self.values(layout, shard)).encoded_bytes


class AddedSum:
    """A `ShardSum` of integers: the same bytes in whatever order they are added."""

    def __init__(self, shard: int, adder: Adder) -> None:
        self._shard = shard
        self._adder = adder

    def add(self, contribution: Contribution, content: UpdateShardContent) -> None:
        """As of `ShardSum`."""
        self._adder.add(content.ciphertexts)

    def partial(self) -> bytes:
        """As of `ShardSum`."""
        return self._adder.finish()

    def merge(self, data: bytes) -> None:
        """As of `ShardSum`."""
        self._adder.merge(data)

    def finish(self) -> ResultShardContent:
        """As of `ShardSum`."""
        return ResultShardContent(
            shard=self._shard,
            contributor_count=self._adder.contributors,
            matrices=(),
            clear_tensors=(),
            ciphertexts=self._adder.finish(),
        )


class Sketches(Summed):
    """The kind `sketches`."""

    name: Final = SKETCHES

    def require(self, layout: Layout, shard: Shard) -> None:
        """As of `ShardKind`."""
        if not shard.matrices or layout.sums is None:
            raise refuse("a shard of sketches holds matrices, in a layout with terms of sums")

    def item_values(self, layout: Layout, shard: Shard) -> int:
        """As of `Summed`."""
        terms = terms_of(layout)
        return sum(sketch_values(terms, layout.matrices[i]) for i in shard.matrices)


class Sums(Summed):
    """The kind `sums`."""

    name: Final = SUMS

    def require(self, layout: Layout, shard: Shard) -> None:
        """As of `ShardKind`."""
        if not shard.tensors or layout.sums is None:
            raise refuse("a shard of sums holds tensors, in a layout with terms of sums")

    def item_values(self, layout: Layout, shard: Shard) -> int:
        """As of `Summed`."""
        return sum(layout.tensors[i].size for i in shard.tensors)


SKETCHES_KIND: Final = Sketches()
SUMS_KIND: Final = Sums()


def terms_of(layout: Layout) -> SumTerms:
    """The layout's terms of sums. Raises INVALID_ARGUMENT if it has none."""
    if layout.sums is None:
        raise refuse("the layout has no terms of sums")
    return layout.sums


def sketch_values(terms: SumTerms, matrix: Matrix) -> int:
    """Values of one matrix in a shard of sketches."""
    P = matrix.out_features * terms.columns(matrix)
    N = terms.rows(matrix) * matrix.in_features
    return P + N + math.prod(terms.corner(matrix)) + EXPONENTS


def update_of(shard: int, ciphertexts: Buffer) -> UpdateShardContent:
    """An update shard under additive encryption."""
    return UpdateShardContent(
        shard=shard, rank=1, encrypted_tiers=0, matrices=(), clear_tensors=(), ciphertexts=ciphertexts
    )


def build_sums_layout(
    *,
    parameters: str,
    matrices: Sequence[Matrix],
    tensors: Sequence[Tensor],
    max_rank: int,
    terms: SumTerms,
) -> Layout:
    """Lays matrices and tensors out in shards of at most SHARD_VALUES values, unless one alone has more."""
    sketches = _runs([sketch_values(terms, matrix) for matrix in matrices])
    sums = _runs([tensor.size for tensor in tensors])
    return Layout(
        parameters=parameters,
        key_id=b"",
        matrices=tuple(matrices),
        tensors=tuple(tensors),
        tiers=(),
        encrypt_tensors=False,
        max_rank=max_rank,
        max_directions=terms.sketch_columns,
        shards=(
            *(Shard(matrices=run, kind=SKETCHES) for run in sketches),
            *(Shard(tensors=run, kind=SUMS) for run in sums),
        ),
        sums=terms,
    )


def _runs(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    run: list[int] = []
    for index, size in enumerate(sizes):
        if run and sum(sizes[run[0] : index]) + size > SHARD_VALUES:
            yield tuple(run)
            run = []
        run.append(index)
    if run:
        yield tuple(run)
