"""The port of a kind of shard: what it demands of a layout, its bytes, its sum, its norm. No secret.

A kind is one object that serves every party alike: who lays out asks how large a shard gets, who receives one has it
read and checked, who aggregates has it summed, without a fork by kind anywhere. Kinds are found by name in
`shelora.lora.kinds`. What agents alone do with a shard, fill it and open it, is a strategy's (`shelora.strategies`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shelora.ckks.parameters import CkksParameters
from shelora.ckks.partial import PartialSum
from shelora.ckks.wire import BlockReader, BlockShape, FullBlock
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout, Shard
from shelora.lora.shards import Buffer, Float32, Float64, ResultShardContent, UpdateShardContent

ENVELOPE_BYTES = 2**16
"""Room for the fields of a serialized shard that are not its values."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part in an aggregate."""

    client_id: str
    weight: float
    """w_i; all weights sum to 1. Not used where the update carries its weight."""
    scaling: float = 1.0
    """s_i = alpha / rank; not used for tensors."""

    def block(self, B: Float32) -> Float64:
        """w_i s_i B_i."""
        return np.multiply(B, self.weight * self.scaling, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Fields:
    """The large fields of a serialized shard, as views."""

    matrices: Sequence[Buffer]
    tensors: Sequence[Buffer]
    ciphertexts: Buffer


@dataclass(frozen=True, slots=True)
class UpdateHead:
    """What a serialized update shard says of itself."""

    shard: int
    rank: int
    encrypted_tiers: int


class Accumulates(Protocol):
    """What `shelora.ckks.evaluator.Accumulator` does."""

    shape: BlockShape
    """Of the sum."""

    def add(self, block: BlockReader, weights: Float64) -> None:
        """Adds a block times weights [rows, rows of the block, segments]."""

    def add_clear(self, values: Float64) -> None:
        """Adds plaintext [rows, slots]."""

    def partial(self) -> PartialSum:
        """What was added, for another accumulator of the same segments and rows; closes this one."""

    def merge(self, partial: PartialSum) -> None:
        """Adds what another one summed."""

    def finish(self) -> FullBlock:
        """The sum."""


class Evaluates(Protocol):
    """What `shelora.ckks.evaluator.Evaluator` does; named here so that only a worker needs the library behind it."""

    def accumulator(self, segments: Sequence[int], rows: int) -> Accumulates:
        """An empty sum."""


Engine = Callable[[CkksParameters, bytes], Evaluates]
"""Makes an evaluator for a key by its parameters and identifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The contributions to one shard, read one at a time."""

    layout: Layout
    index: int
    contributions: Sequence[Contribution]
    read: Callable[[str], UpdateShardContent]
    """A client's shard, whose values were checked when it arrived."""

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.layout.shards[self.index]

    def __iter__(self) -> Iterator[tuple[Contribution, UpdateShardContent]]:
        for contribution in self.contributions:
            yield contribution, self.read(contribution.client_id)


class ShardSum(Protocol):
    """The aggregate of one shard under construction: contributions added, other workers' partial sums merged.

    Ciphertexts are summed to the same bits, in whatever parts; clear values may differ in their last bit.
    """

    def add(self, contribution: Contribution, content: UpdateShardContent) -> None:
        """Adds one client's shard."""

    def partial(self) -> bytes:
        """What was added, for `merge` of another sum over the same cohort; ends this one."""

    def merge(self, data: bytes) -> None:
        """Adds another sum's `partial`. Raises SHARD_MALFORMED, SHAPE_MISMATCH, CIPHERTEXT_*."""

    def finish(self) -> ResultShardContent:
        """The aggregate, once every contribution is in it."""


class ShardKind(Protocol):
    """A kind of shard."""

    @property
    def name(self) -> str:
        """What `Shard.kind` names it by."""

    @property
    def protect_copies(self) -> int:
        """Times the largest update shard that making it takes in memory; measured."""

    @property
    def restore_copies(self) -> int:
        """Times the largest result shard that opening it and cutting it to a rank takes in memory; measured."""

    def require(self, layout: Layout, shard: Shard) -> None:
        """Raises INVALID_ARGUMENT unless the shard can be of this kind in that layout."""

    def largest_update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """Bound of a serialized update shard of a client of that rank in bytes, for refusing a transfer early."""

    def update_bytes(self, layout: Layout, shard: Shard, rank: int) -> int:
        """About the bytes of an update shard of a client of that rank that encrypts every tier."""

    def read_update(self, layout: Layout, head: UpdateHead, fields: Fields) -> UpdateShardContent:
        """The content, its shape checked. Raises SHAPE_MISMATCH, SHARD_MALFORMED."""

    def check_update(self, layout: Layout, content: UpdateShardContent) -> None:
        """Checks the clear values of an update shard. Raises VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE."""

    def check_ciphertexts(self, layout: Layout, content: UpdateShardContent) -> None:
        """Checks the ciphertexts of an update shard to the last coefficient. Raises SHAPE_MISMATCH, CIPHERTEXT_*."""

    def read_result(
        self, layout: Layout, shard: int, contributor_count: int, fields: Fields
    ) -> ResultShardContent:
        """The content of a result shard, all checked but its ciphertexts. Raises as reading and checking an update."""

    def squared_norm(self, layout: Layout, content: UpdateShardContent) -> float:
        """A shard's part of the update's squared norm, without the scaling (`shelora.lora.screening`); 0 for none."""

    def partial_bytes(self, layout: Layout, shard: Shard) -> int:
        """About the bytes of a partial sum."""

    def common(self, cohort: Cohort) -> bytes:
        """What all partial sums over a cohort need to know of all of it; empty if nothing. May read every update."""

    def sum(self, cohort: Cohort, common: bytes, engine: Engine) -> ShardSum:
        """An empty sum, in memory that does not grow with the cohort. `common` is what `common` gave, anywhere."""


def expect(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    """Raises SHAPE_MISMATCH unless the condition holds."""
    if not condition:
        raise DomainError(Reason.SHAPE_MISMATCH, f"the shard does not fit its layout: {what}")


def check_values(values: Float32, what: str, bound: float | None = None) -> None:
    """Raises VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE (beyond the bound in magnitude), naming `what`."""
    if not np.isfinite(values).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, f"{what} holds NaN or infinity")
    if bound is not None and values.size and np.abs(values).max() > bound:
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, f"{what} exceeds {bound} in magnitude")
