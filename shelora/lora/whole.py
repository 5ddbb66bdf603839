"""Shards of tensors averaged whole: classification heads, biases, sealed votes. Under CKKS, or in the clear.

Slots hold values over the tensor's bound, and the average times TENSOR_HEADROOM, so that no slot passes the limit.
"""

from typing import Final

import numpy as np

from shelora.ckks.parameters import SUM_LIMIT
from shelora.ckks.partial import PartialSum
from shelora.ckks.wire import BlockReader, encode_block
from shelora.lora.arrays import pack, taken, unpack
from shelora.lora.fields import from_bytes
from shelora.lora.kind import (
    Cohort,
    Contribution,
    Engine,
    Fields,
    ShardSum,
    UpdateHead,
    check_values,
    expect,
)
from shelora.lora.layout import FLOAT_BYTES, WHOLE, Layout, Shard, Tensor, refuse
from shelora.lora.shards import Float32, Float64, ResultShardContent, UpdateShardContent
from shelora.lora.slots import Segment, Slotted, consecutive

TENSOR_HEADROOM: Final = SUM_LIMIT
"""Slots of averaged tensors hold the average times this over the tensor's bound."""


class Whole(Slotted):
    """The kind `whole`."""

    name: Final = WHOLE

    def require(self, layout: Layout, shard: Shard) -> None:
        """As of `ShardKind`."""
        if not shard.tensors:
            raise refuse("a shard of whole tensors holds tensors")

    def segments(self, layout: Layout, shard: Shard, tiers: int | None = None) -> tuple[Segment, ...]:
        """As of `Slotted`: tensor by tensor, the same for every client."""
        sizes = [layout.tensors[i].size for i in shard.tensors] if layout.encrypt_tensors else []
        return tuple(consecutive((item, size, 0) for item, size in enumerate(sizes)))

    def clear_bytes(self, layout: Layout, shard: Shard, rank: int, tiers: int) -> int:
        """As of `Slotted`: everything or nothing."""
        return 0 if layout.encrypt_tensors else FLOAT_BYTES * sum(t.size for t in _tensors(layout, shard))

    def update_rows(self, rank: int) -> int:
        """As of `Slotted`."""
        return 1

    def partial_rows(self, layout: Layout) -> int:
        """As of `Slotted`."""
        return 1

    def clear_values(self, layout: Layout, shard: Shard) -> int:
        """As of `Slotted`: everything or nothing."""
        return 0 if layout.encrypt_tensors else sum(t.size for t in _tensors(layout, shard))

    def result_rows(self, content: ResultShardContent) -> int:
        """As of `Slotted`."""
        return 1

    def read_update(self, layout: Layout, head: UpdateHead, fields: Fields) -> UpdateShardContent:
        """As of `ShardKind`."""
        expect(head.rank == 1, f"rank {head.rank}")
        expect(head.encrypted_tiers <= len(layout.tiers), f"encrypted_tiers {head.encrypted_tiers}")
        return UpdateShardContent(
            shard=head.shard,
            rank=head.rank,
            encrypted_tiers=head.encrypted_tiers,
            matrices=(),
            clear_tensors=_read(layout, layout.shards[head.shard], fields),
            ciphertexts=fields.ciphertexts,
        )

    def check_update(self, layout: Layout, content: UpdateShardContent) -> None:
        """As of `ShardKind`."""
        _check(layout, layout.shards[content.shard], content.clear_tensors)

    def read_result(
        self, layout: Layout, shard: int, contributor_count: int, fields: Fields
    ) -> ResultShardContent:
        """As of `ShardKind`."""
        clear_tensors = _read(layout, layout.shards[shard], fields)
        _check(layout, layout.shards[shard], clear_tensors)
        return ResultShardContent(
            shard=shard,
            contributor_count=contributor_count,
            matrices=(),
            clear_tensors=clear_tensors,
            ciphertexts=fields.ciphertexts,
        )

    def squared_norm(self, layout: Layout, content: UpdateShardContent) -> float:
        """As of `ShardKind`: what is sent in the clear counts as it is; encrypted tensors cannot be measured."""
        return float(sum(np.square(value, dtype=np.float64).sum() for value in content.clear_tensors))

    def common(self, cohort: Cohort) -> bytes:
        """As of `ShardKind`: nothing."""
        return b""

    def sum(self, cohort: Cohort, common: bytes, engine: Engine) -> ShardSum:
        """As of `ShardKind`: the weighted mean."""
        return EncryptedMean(cohort, engine) if cohort.layout.encrypt_tensors else ClearMean(cohort)


KIND: Final = Whole()


def _tensors(layout: Layout, shard: Shard) -> list[Tensor]:
    return [layout.tensors[i] for i in shard.tensors]


def _read(layout: Layout, shard: Shard, fields: Fields) -> tuple[Float32, ...]:
    clear = [] if layout.encrypt_tensors else _tensors(layout, shard)
    expect(not fields.matrices, f"{len(fields.matrices)} matrices")
    expect(len(fields.tensors) == len(clear), f"{len(fields.tensors)} clear tensors")
    return tuple(from_bytes(part, t.shape, t.name) for part, t in zip(fields.tensors, clear, strict=True))


def _check(layout: Layout, shard: Shard, values: tuple[Float32, ...]) -> None:
    for tensor, value in zip(
        _tensors(layout, shard), values, strict=False
    ):  # no values if they are encrypted
        check_values(value, tensor.name, tensor.bound)


def _mean(cohort: Cohort, clear: tuple[Float32, ...], ciphertexts: bytes) -> ResultShardContent:
    return ResultShardContent(
        shard=cohort.index,
        contributor_count=len(cohort.contributions),
        matrices=(),
        clear_tensors=clear,
        ciphertexts=ciphertexts,
    )


class EncryptedMean:
    """A `ShardSum` of tensors under CKKS."""

    def __init__(self, cohort: Cohort, engine: Engine) -> None:
        self._cohort = cohort
        layout = cohort.layout
        slots = KIND.slot_count(layout, cohort.shard)
        self._sum = engine(layout.ckks, layout.key_id).accumulator([slots], 1)

    def add(self, contribution: Contribution, content: UpdateShardContent) -> None:
        """As of `ShardSum`."""
        shape = KIND.update_block_shape(self._cohort.layout, content)
        if shape is not None:
            weight = TENSOR_HEADROOM * contribution.weight
            self._sum.add(BlockReader(content.ciphertexts, shape), np.full((1, 1, 1), weight))

    def partial(self) -> bytes:
        """As of `ShardSum`."""
        return pack(self._sum.partial().arrays())

    def merge(self, data: bytes) -> None:
        """As of `ShardSum`."""
        self._sum.merge(PartialSum.from_arrays(unpack(data), self._sum.shape))

    def finish(self) -> ResultShardContent:
        """As of `ShardSum`."""
        return _mean(self._cohort, (), encode_block(self._sum.finish()))


class ClearMean:
    """A `ShardSum` of tensors in the clear."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._means: list[Float64] = [np.zeros(t.shape) for t in _tensors(cohort.layout, cohort.shard)]

    def add(self, contribution: Contribution, content: UpdateShardContent) -> None:
        """As of `ShardSum`."""
        for mean, value in zip(self._means, content.clear_tensors, strict=True):
            np.add(mean, contribution.weight * value, out=mean)

    def partial(self) -> bytes:
        """As of `ShardSum`."""
        return pack({str(item): mean for item, mean in enumerate(self._means)})

    def merge(self, data: bytes) -> None:
        """As of `ShardSum`."""
        found = unpack(data)
        for item, mean in enumerate(self._means):
            mean += taken(found, str(item), mean.shape)  # noqa: PLW2901 - in place

    def finish(self) -> ResultShardContent:
        """As of `ShardSum`."""
        return _mean(self._cohort, tuple(mean.astype(np.float32) for mean in self._means), b"")
