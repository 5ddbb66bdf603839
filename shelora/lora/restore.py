"""From published result shards back to updates in true column order. Only agents do this: it decrypts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.ckks.parameters import SUM_LIMIT
from shelora.ckks.wire import FullBlock, decode_block
from shelora.errors import DomainError, Reason
from shelora.lora.aggregate import MIN_CONTRIBUTORS, TENSOR_HEADROOM
from shelora.lora.layout import Layout
from shelora.lora.shards import FactoredUpdate, Float32, Float64, ResultShardContent
from shelora.messages import result_block_shape


class Decrypts(Protocol):
    """What `shelora.ckks.secret.Decryptor` does."""

    def decrypt(self, block: FullBlock, total_slots: int) -> Float64:
        """Rows of slot values [rows, total_slots]."""


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """An aggregate in the clear."""

    matrices: dict[str, FactoredUpdate] = field(default_factory=dict)
    tensors: dict[str, Float32] = field(default_factory=dict)


def restore(
    layout: Layout,
    results: Iterable[ResultShardContent],
    orders: Mapping[str, NDArray[np.int64]],
    decryptor: Decrypts | None,
) -> Restored:
    """Decrypts result shards and puts columns back in their true places.

    Args:
        layout: Layout of the round.
        results: One content a shard, in any order.
        orders: Column order by matrix name.
        decryptor: None if the layout encrypts nothing.

    Raises: TOO_FEW_CONTRIBUTORS, CIPHERTEXT_*.
    """
    restored = Restored()
    for content in results:
        _expect_contributors(content)
        slots = _slots(layout, content, decryptor)
        if layout.shards[content.shard].tensors:
            restored.tensors.update(_tensors(layout, content, slots))
        else:
            restored.matrices.update(_matrices(layout, content, slots, orders))
    return restored


def _expect_contributors(content: ResultShardContent) -> None:
    if content.contributor_count < MIN_CONTRIBUTORS:
        raise DomainError(
            Reason.TOO_FEW_CONTRIBUTORS,
            f"an aggregate of {content.contributor_count} updates is not decrypted; the least is {MIN_CONTRIBUTORS}",
        )


def _slots(layout: Layout, content: ResultShardContent, decryptor: Decrypts | None) -> Float64:
    shape = result_block_shape(layout, content)
    slot_count = layout.slot_count(layout.shards[content.shard])
    if shape is None:
        return np.zeros((0, slot_count))
    if decryptor is None:
        raise DomainError(Reason.SECRET_UNAVAILABLE, "the result is encrypted, but there is no key")
    block = decode_block(content.ciphertexts, shape)
    assert isinstance(block, FullBlock)  # the shape asked for both polynomials
    slots = decryptor.decrypt(block, slot_count)
    # Entries of A of at most 1 and tensors within their bound add up to no more: what a member hides beyond is cut off.
    return np.clip(slots, -SUM_LIMIT, SUM_LIMIT, out=slots)


def _matrices(
    layout: Layout, content: ResultShardContent, slots: Float64, orders: Mapping[str, NDArray[np.int64]]
) -> dict[str, FactoredUpdate]:
    shard = layout.shards[content.shard]
    matrices = [layout.matrices[i] for i in shard.matrices]
    ordered = [
        np.zeros((part.Q.shape[1], m.in_features)) for m, part in zip(matrices, content.matrices, strict=True)
    ]
    for segment in layout.segments(shard):
        part = content.matrices[segment.item]
        q = part.Q.shape[1]
        values = slots[:q, segment.slot : segment.slot + segment.length]
        scale = np.exp2(-np.array(part.row_exponents, dtype=np.float64))[:, None]
        ordered[segment.item][:, segment.column : segment.column + segment.length] = values * scale
    restored = {}
    for matrix, part, columns in zip(matrices, content.matrices, ordered, strict=True):
        columns[:, matrix.protected() :] = part.clear_M
        M = np.empty_like(columns)
        M[:, orders[matrix.name]] = columns
        restored[matrix.name] = FactoredUpdate(part.Q.astype(np.float64), M)
    return restored


def _tensors(layout: Layout, content: ResultShardContent, slots: Float64) -> dict[str, Float32]:
    shard = layout.shards[content.shard]
    tensors = [layout.tensors[i] for i in shard.tensors]
    if not layout.encrypt_tensors:
        return {t.name: value for t, value in zip(tensors, content.clear_tensors, strict=True)}
    return {
        tensors[s.item].name: (
            slots[0, s.slot : s.slot + s.length] * (tensors[s.item].bound / TENSOR_HEADROOM)
        )
        .astype(np.float32)
        .reshape(tensors[s.item].shape)
        for s in layout.segments(shard)
    }
