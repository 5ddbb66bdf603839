"""Aggregation of one shard over a cohort, by the shard's kind, whole or in parts. Decrypts nothing.

A part is a run of contributors. Its partial sum can be made anywhere: many workers then share a large cohort's shard,
which is not faster than one worker otherwise. Sums of ciphertexts are exact, so that it does not matter who adds what.
"""

from collections.abc import Callable, Sequence

from shelora.ckks.evaluator import Evaluator
from shelora.errors import DomainError, Reason
from shelora.lora.codec import encode_result, parse_update
from shelora.lora.kind import Cohort, Contribution, ShardSum
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout
from shelora.lora.parts import part_count, run_of
from shelora.lora.shards import MIN_CONTRIBUTORS, UpdateShardContent

Load = Callable[[str], bytes]
"""Reads a client's serialized, validated UpdateShard."""


class Aggregation:
    """The aggregation of shard `index` over contributions.

    Sums of ciphertexts are the same to the bit however the parts are shared; clear values, which are added as floats,
    may differ in their last one. Raises TOO_FEW_CONTRIBUTORS.
    """

    def __init__(self, layout: Layout, index: int, contributions: Sequence[Contribution], load: Load) -> None:
        if len(contributions) < MIN_CONTRIBUTORS:
            raise DomainError(
                Reason.TOO_FEW_CONTRIBUTORS,
                f"{len(contributions)} contributions; the least is {MIN_CONTRIBUTORS}",
            )

        def read(client_id: str) -> UpdateShardContent:
            return parse_update(layout, index, load(client_id))

        self._cohort = Cohort(layout=layout, index=index, contributions=contributions, read=read)
        self._kind = kind_of(layout.shard(index))
        self.parts = part_count(layout, index, len(contributions))
        """Parts that it consists of, 1 or more."""

    def common(self) -> bytes:
        """What all partial sums need to know of the whole cohort. Raises as `part`."""
        return self._kind.common(self._cohort)

    def sum(self, common: bytes) -> ShardSum:
        """An empty sum. `common` is this aggregation's, from here or elsewhere; sums that merge have the same."""
        return self._kind.sum(self._cohort, common, Evaluator)

    def add(self, total: ShardSum, part: int) -> None:
        """Adds a part's contributions. Raises what `parse_update` raises if a shard is not what was validated."""
        contributions = self._cohort.contributions
        for contribution in contributions[run_of(part, self.parts, len(contributions))]:
            total.add(contribution, self._cohort.read(contribution.client_id))

    def whole(self) -> bytes:
        """The serialized ResultShard, by one worker. Raises as `add`."""
        total = self.sum(self.common())
        for part in range(self.parts):
            self.add(total, part)
        return self.finished(total)

    def finished(self, total: ShardSum) -> bytes:
        """The serialized ResultShard, once all parts are in the sum."""
        return encode_result(self._cohort.layout, total.finish())


def aggregate_shard(layout: Layout, index: int, contributions: Sequence[Contribution], load: Load) -> bytes:
    """The serialized ResultShard of shard `index`, by one worker. Raises as `Aggregation`."""
    return Aggregation(layout, index, contributions, load).whole()
