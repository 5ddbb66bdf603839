"""Contents of update shards and result shards, as values. `shelora.lora.codec` turns them into bytes and back."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Buffer: TypeAlias = bytes | memoryview
"""Serialized bytes: one's own, or a view of the shard they came in."""

MIN_CONTRIBUTORS = 2
"""An aggregate of one update is that update: it is neither made nor decrypted."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """Factors of an update ΔW = scaling * B A: B [out, rank], A [rank, in]."""

    B: Float32
    A: Float32


@dataclass(frozen=True, slots=True, eq=False)
class FactoredUpdate:
    """An aggregated update ΔW = Q M with Q [out, q] of orthonormal columns, M [q, in]."""

    Q: Float64
    M: Float64


@dataclass(frozen=True, slots=True, eq=False)
class MatrixPart:
    """What a client sends in the clear of one matrix."""

    B: Float32
    """[out, rank]."""
    clear_A: Float32
    """[rank, clear columns], from the first column in column order that the client does not encrypt."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class UpdateShardContent:
    """One shard of one client's update."""

    shard: int
    rank: int
    encrypted_tiers: int
    matrices: tuple[MatrixPart, ...]
    clear_tensors: tuple[Float32, ...]
    ciphertexts: Buffer


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MatrixAggregate:
    """Aggregate of one matrix: Q [out, q], clear columns of M [q, clear], exponents of the encrypted rows."""

    Q: Float32
    clear_M: Float32
    row_exponents: tuple[int, ...]
    energy_left_out: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ResultShardContent:
    """The aggregate of one shard."""

    shard: int
    contributor_count: int
    matrices: tuple[MatrixAggregate, ...]
    clear_tensors: tuple[Float32, ...]
    ciphertexts: Buffer
