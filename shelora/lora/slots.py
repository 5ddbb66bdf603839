"""Shards under CKKS: which values fill which slots, and the ciphertext blocks that follow.

Within a shard the protected columns of all its matrices fill CKKS slots tier by tier: the slots of a client that
encrypts `t` tiers are a prefix, and a small budget costs few ciphertexts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from shelora.ckks.wire import BlockShape, validate_block
from shelora.lora.kind import ENVELOPE_BYTES, expect
from shelora.lora.layout import Layout, Shard, even
from shelora.lora.shards import ResultShardContent, UpdateShardContent

_LARGEST_COEFFICIENT_BYTES = 8
_CIPHERTEXT_FRAME_BYTES = 64
FLOAT64_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive slots of a shard that hold columns of one matrix (of one tier) or values of one tensor."""

    item: int
    """Position in the shard's matrices or tensors."""
    slot: int
    """First slot, even: two slots that share a complex number of CKKS share their weights."""
    length: int
    column: int
    """First position in the matrix's column order; 0 for tensors."""

    @property
    def slots(self) -> int:
        """Slots it takes up: its length, made even."""
        return even(self.length)


class Slotted(ABC):
    """What kinds under CKKS have in common."""

    protect_copies: Final = 4
    """2.2 to 3.3 measured."""
    restore_copies: Final = 3
    """1.3 to 2.3 measured."""

    @abstractmethod
    def segments(self, layout: Layout, shard: Shard, tiers: int | None = None) -> tuple[Segment, ...]:
        """Slots of the encrypted values of a shard, for a client that encrypts `tiers` tiers (all by default).

        The segments of fewer tiers are a prefix of those of more.
        """

    @abstractmethod
    def clear_bytes(self, layout: Layout, shard: Shard, rank: int, tiers: int) -> int:
        """Bytes that an update shard holds in the clear, of a client of that rank that encrypts so many tiers."""

    @abstractmethod
    def update_rows(self, rank: int) -> int:
        """Rows of ciphertexts in an update shard of a client of that rank."""

    @abstractmethod
    def partial_rows(self, layout: Layout) -> int:
        """Most rows of a partial sum."""

    @abstractmethod
    def clear_values(self, layout: Layout, shard: Shard) -> int:
        """Values a row of a partial sum that no client encrypts."""

    @abstractmethod
    def result_rows(self, content: ResultShardContent) -> int:
        """Rows of ciphertexts in a result shard."""

    def slot_count(self, layout: Layout, shard: Shard, tiers: int | None = None) -> int:
        """Slots a row of a shard, for a client that encrypts `tiers` tiers (all by default)."""
        segments = self.segments(layout, shard, tiers)
        return segments[-1].slot + segments[-1].slots if segments else 0

    def chunk_count(self, layout: Layout, shard: Shard, tiers: int | None = None) -> int:
        """Ciphertexts a row of a shard."""
        return -(-self.slot_count(layout, shard, tiers) // layout.ckks.slots)

    def largest_update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """As of `ShardKind`."""
        per_ciphertext = layout.ckks.poly_degree * _LARGEST_COEFFICIENT_BYTES + _CIPHERTEXT_FRAME_BYTES
        encrypted = self.update_rows(rank) * self.chunk_count(layout, shard) * per_ciphertext
        return self.clear_bytes(layout, shard, rank, 0) + encrypted + ENVELOPE_BYTES

    def update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """As of `ShardKind`: a seeded ciphertext is one polynomial."""
        seeded = layout.ckks.poly_degree * layout.ckks.coefficient_bits // 8
        ciphertexts = self.update_rows(rank) * self.chunk_count(layout, shard)
        return self.clear_bytes(layout, shard, rank, len(layout.tiers)) + ciphertexts * seeded

    def partial_bytes(self, layout: Layout, shard: Shard) -> int:
        """As of `ShardKind`: ciphertexts of two polynomials, and what may be clear as float64."""
        ckks, rows = layout.ckks, self.partial_rows(layout)
        ciphertexts = (
            rows * self.chunk_count(layout, shard) * 2 * ckks.poly_degree * ckks.coefficient_bits // 8
        )
        values = self.slot_count(layout, shard) + self.clear_values(layout, shard)
        return ciphertexts + FLOAT64_BYTES * rows * values

    def update_block_shape(self, layout: Layout, content: UpdateShardContent) -> BlockShape | None:
        """The shape the ciphertexts of an update shard must have; None if it must have none."""
        chunks = self.chunk_count(layout, layout.shards[content.shard], content.encrypted_tiers)
        if not chunks:
            return None
        return BlockShape(
            parameters=layout.ckks, key_id=layout.key_id, rows=content.rank, chunks=chunks, seeded=True
        )

    def result_block_shape(self, layout: Layout, content: ResultShardContent) -> BlockShape | None:
        """The shape the ciphertexts of a result shard must have; None if it must have none."""
        chunks, rows = self.chunk_count(layout, layout.shards[content.shard]), self.result_rows(content)
        if not (chunks and rows):
            return None
        return BlockShape(
            parameters=layout.ckks, key_id=layout.key_id, rows=rows, chunks=chunks, seeded=False
        )

    def check_ciphertexts(self, layout: Layout, content: UpdateShardContent) -> None:
        """As of `ShardKind`."""
        shape = self.update_block_shape(layout, content)
        if shape is None:
            expect(not content.ciphertexts, "ciphertexts where none belong")
        else:
            validate_block(content.ciphertexts, shape)


def consecutive(runs: Iterable[tuple[int, int, int]]) -> Iterator[Segment]:
    """Lays runs of (item, length, column) one after the other, leaving out empty ones."""
    slot = 0
    for item, length, column in runs:
        if length:
            yield Segment(item=item, slot=slot, length=length, column=column)
            slot += even(length)
