"""From published result shards back to updates in true column order. Only agents do this: it decrypts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.ckks.parameters import SUM_LIMIT
from shelora.ckks.wire import FullBlock, decode_block
from shelora.errors import DomainError, Reason
from shelora.lora import products, whole
from shelora.lora.layout import Layout
from shelora.lora.shards import MIN_CONTRIBUTORS, FactoredUpdate, Float32, Float64, ResultShardContent
from shelora.lora.sketches import Exponents
from shelora.lora.slots import Segment, Slotted
from shelora.lora.whole import TENSOR_HEADROOM


class Decrypts(Protocol):
    """What `shelora.ckks.secret.Decryptor` does."""

    def decrypt(self, block: FullBlock, total_slots: int) -> Float64:
        """Rows of slot values [rows, total_slots]."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Restored:
    """An aggregate in the clear, or a part of one."""

    matrices: dict[str, FactoredUpdate] = field(default_factory=dict)
    tensors: dict[str, Float32] = field(default_factory=dict)
    exponents: dict[str, Exponents] = field(default_factory=dict)
    """By matrix, the bounds of the next round's sketches; none where no sketches are sent."""
    summed: bool = False
    """Whether servers could only add: then what lies beyond a client's rank stays in its model as a frozen part, and
    the client bounds what the result may change."""
    noisy: bool = False
    """Whether clients added noise to what they sent: then what they may change is bounded for all alike, and a result
    is not held against this client's own update (`shelora.lora.noise`)."""
    contributors: int = 0
    """How many clients' updates a sum has; 0 where that is not known."""
    own_share: float = 0.0
    """This client's share of a sum, 0 to 1; 0 if its update is not in it, or that is not known."""
    tensor_noise: float = 0.0
    """Standard deviation of the noise in a tensor's value; 0 where that is not known."""


def restore(
    layout: Layout,
    results: Iterable[ResultShardContent],
    orders: Mapping[str, NDArray[np.int64]],
    decryptor: Decrypts | None,
) -> Restored:
    """The whole aggregate at once. Arguments and errors as in `restored_parts`."""
    return merged(restored_parts(layout, results, orders, decryptor))


def merged(parts: Iterable[Restored]) -> Restored:
    """One aggregate of its parts."""
    every = list(parts)
    return Restored(
        matrices={name: update for part in every for name, update in part.matrices.items()},
        tensors={name: value for part in every for name, value in part.tensors.items()},
        exponents={name: bounds for part in every for name, bounds in part.exponents.items()},
        summed=any(part.summed for part in every),
        noisy=any(part.noisy for part in every),
        contributors=max((part.contributors for part in every), default=0),
        own_share=max((part.own_share for part in every), default=0.0),
        tensor_noise=max((part.tensor_noise for part in every), default=0.0),
    )


def restored_parts(
    layout: Layout,
    results: Iterable[ResultShardContent],
    orders: Mapping[str, NDArray[np.int64]],
    decryptor: Decrypts | None,
) -> Iterator[Restored]:
    """Decrypts result shards and puts columns back in their true places.

    Yields one matrix at a time, or the tensors of a shard: an aggregate has many times a client's rank, in float64, and
    who cuts every matrix to that rank need not hold all of them.

    Args:
        layout: Layout of the round.
        results: One content a shard, in any order.
        orders: Column order by matrix name.
        decryptor: None if the layout encrypts nothing.

    Raises: TOO_FEW_CONTRIBUTORS, CIPHERTEXT_*.
    """
    for content in results:
        yield from _parts(layout, content, orders, decryptor)


def _parts(
    layout: Layout,
    content: ResultShardContent,
    orders: Mapping[str, NDArray[np.int64]],
    decryptor: Decrypts | None,
) -> Iterator[Restored]:
    _expect_contributors(content)
    open_ = {
        products.KIND.name: lambda: restored_matrices(layout, content, orders, decryptor),
        whole.KIND.name: lambda: restored_tensors(layout, content, decryptor),
    }
    yield from open_[layout.shards[content.shard].kind]()


def _expect_contributors(content: ResultShardContent) -> None:
    if content.contributor_count < MIN_CONTRIBUTORS:
        raise DomainError(
            Reason.TOO_FEW_CONTRIBUTORS,
            f"an aggregate of {content.contributor_count} updates is not decrypted; the least is {MIN_CONTRIBUTORS}",
        )


def _slots(kind: Slotted, layout: Layout, content: ResultShardContent, decryptor: Decrypts | None) -> Float64:
    shape = kind.result_block_shape(layout, content)
    slot_count = kind.slot_count(layout, layout.shards[content.shard])
    if shape is None:
        return np.zeros((0, slot_count))
    if decryptor is None:
        raise DomainError(Reason.SECRET_UNAVAILABLE, "the result is encrypted, but there is no key")
    block = decode_block(content.ciphertexts, shape)
    assert isinstance(block, FullBlock)  # the shape asked for both polynomials
    slots = decryptor.decrypt(block, slot_count)
    # Entries of A of at most 1 and tensors within their bound add up to no more: what a member hides beyond is cut off.
    return np.clip(slots, -SUM_LIMIT, SUM_LIMIT, out=slots)


def restored_matrices(
    layout: Layout,
    content: ResultShardContent,
    orders: Mapping[str, NDArray[np.int64]],
    decryptor: Decrypts | None,
) -> Iterator[Restored]:
    """The matrices of a result shard, one at a time; errors as in `restored_parts`."""
    shard, slots = layout.shards[content.shard], _slots(products.KIND, layout, content, decryptor)
    segments: dict[int, list[Segment]] = {}
    for segment in products.KIND.segments(layout, shard):
        segments.setdefault(segment.item, []).append(segment)
    for item, (index, part) in enumerate(zip(shard.matrices, content.matrices, strict=True)):
        matrix = layout.matrices[index]
        order = orders[matrix.name]
        M = np.zeros((part.Q.shape[1], matrix.in_features))
        scale = np.exp2(-np.array(part.row_exponents, dtype=np.float64))[:, None]
        for segment in segments.get(item, []):
            columns = order[segment.column : segment.column + segment.length]
            M[:, columns] = slots[: len(M), segment.slot : segment.slot + segment.length] * scale
        M[:, order[matrix.protected() :]] = part.clear_M
        yield Restored(matrices={matrix.name: FactoredUpdate(part.Q.astype(np.float64), M)})


def restored_tensors(
    layout: Layout, content: ResultShardContent, decryptor: Decrypts | None
) -> Iterator[Restored]:
    """The tensors of a result shard together; errors as in `restored_parts`."""
    slots = _slots(whole.KIND, layout, content, decryptor)
    yield Restored(tensors=_tensors(layout, content, slots))


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
        for s in whole.KIND.segments(layout, shard)
    }
