"""Aggregation of one shard over a cohort, by the shard's kind. Decrypts nothing."""

from collections.abc import Callable, Sequence

from shelora.ckks.evaluator import Evaluator
from shelora.errors import DomainError, Reason
from shelora.lora.codec import encode_result, parse_update
from shelora.lora.kind import Cohort, Contribution
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout
from shelora.lora.shards import MIN_CONTRIBUTORS, UpdateShardContent

Load = Callable[[str], bytes]
"""Reads a client's serialized, validated UpdateShard."""


def aggregate_shard(layout: Layout, index: int, contributions: Sequence[Contribution], load: Load) -> bytes:
    """The serialized ResultShard of shard `index`.

    Deterministic: the same contributions give the same bytes, on any replica. Raises TOO_FEW_CONTRIBUTORS, and what
    `parse_update` raises if a stored shard is not what was validated.
    """
    if len(contributions) < MIN_CONTRIBUTORS:
        raise DomainError(
            Reason.TOO_FEW_CONTRIBUTORS,
            f"{len(contributions)} contributions; the least is {MIN_CONTRIBUTORS}",
        )

    def read(client_id: str) -> UpdateShardContent:
        return parse_update(layout, index, load(client_id))

    cohort = Cohort(layout=layout, index=index, contributions=contributions, read=read)
    return encode_result(layout, kind_of(layout.shard(index)).aggregate(cohort, Evaluator))
