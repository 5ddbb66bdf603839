"""In which parts a shard is aggregated: the one rule that workers on all replicas follow."""

from typing import Final

from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout

LEAST_RUN: Final = 8
"""Contributors of a part: a partial sum costs about as much as one of them adds."""
MOST_PARTS: Final = 32
MOST_PARTIAL_BYTES: Final = 256 * 2**20
"""Bytes of a shard's partial sums together. A model whose shards are so large has many, which workers share anyway."""


def part_count(layout: Layout, index: int, contributors: int) -> int:
    """Parts of a shard's aggregation, runs of contributors: 1 for a small cohort or a shard of large sums."""
    shard = layout.shard(index)
    fitting = MOST_PARTIAL_BYTES // max(1, kind_of(shard).partial_bytes(layout, shard))
    return max(1, min(contributors // LEAST_RUN, MOST_PARTS, fitting))


def run_of(part: int, parts: int, contributors: int) -> slice:
    """The contributors of a part."""
    return slice(part * contributors // parts, (part + 1) * contributors // parts)
