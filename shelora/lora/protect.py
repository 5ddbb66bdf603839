"""A client's update, shard by shard: column order, row normalization, encryption of the client's tiers.

Rows of A are scaled by powers of two to a largest magnitude in [1/2, 1) and the columns of B take the factor up:
B A is unchanged to the bit (but for entries 2^100 times smaller than their row's largest, which float32 may lose),
nothing needs clipping, and every row uses the full precision of the ciphertext.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.ckks.wire import SeededBlock, encode_block
from shelora.errors import DomainError, Reason
from shelora.lora import products, whole
from shelora.lora.layout import Layout, Matrix, Tensor
from shelora.lora.shards import Float32, Float64, LoraFactors, MatrixPart, UpdateShardContent


class Encrypts(Protocol):
    """What `shelora.ckks.secret.Encryptor` does; named here so that this module needs no secret key."""

    def encrypt(self, values: Float64) -> SeededBlock:
        """Encrypts rows of values in [-1, 1]."""


def protect(
    layout: Layout,
    factors: Mapping[str, LoraFactors],
    tensors: Mapping[str, Float32],
    encrypted_tiers: int,
    orders: Mapping[str, NDArray[np.int64]],
    encryptor: Encrypts | None,
) -> Iterator[UpdateShardContent]:
    """Yields the shards of an update, one at a time.

    Args:
        layout: Layout of the round.
        factors: B [out, rank] and A [rank, in] by matrix name, all of one rank.
        tensors: Values by tensor name.
        encrypted_tiers: Tiers this client encrypts (as many as cover its budget).
        orders: Column order by matrix name: entry k is the true index of the column at position k.
        encryptor: None if the layout encrypts nothing.

    Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE, naming the matrix or tensor.
    """
    fill = {
        products.KIND.name: lambda index: matrix_shard(
            layout, index, factors, encrypted_tiers, orders, encryptor
        ),
        whole.KIND.name: lambda index: tensor_shard(layout, index, tensors, encryptor),
    }
    for index, shard in enumerate(layout.shards):
        yield fill[shard.kind](index)


def matrix_shard(
    layout: Layout,
    index: int,
    factors: Mapping[str, LoraFactors],
    tiers: int,
    orders: Mapping[str, NDArray[np.int64]],
    encryptor: Encrypts | None,
) -> UpdateShardContent:
    """A shard of matrices; arguments and errors as in `protect`."""
    shard = layout.shards[index]
    matrices = [layout.matrices[i] for i in shard.matrices]
    rank = _common_rank(layout, factors)
    ordered = [_ordered(m, factors.get(m.name), rank, orders[m.name]) for m in matrices]
    rows = np.zeros((rank, products.KIND.slot_count(layout, shard, tiers)))
    for segment in products.KIND.segments(layout, shard, tiers):
        columns = slice(segment.column, segment.column + segment.length)
        rows[:, segment.slot : segment.slot + segment.length] = ordered[segment.item].A[:, columns]
    return UpdateShardContent(
        shard=index,
        rank=rank,
        encrypted_tiers=tiers,
        matrices=tuple(
            MatrixPart(f.B, f.A[:, m.protected(tiers) :]) for m, f in zip(matrices, ordered, strict=True)
        ),
        clear_tensors=(),
        ciphertexts=_encrypted(rows, encryptor),
    )


def tensor_shard(
    layout: Layout, index: int, values: Mapping[str, Float32], encryptor: Encrypts | None
) -> UpdateShardContent:
    """A shard of tensors; arguments and errors as in `protect`."""
    shard = layout.shards[index]
    tensors = [layout.tensors[i] for i in shard.tensors]
    checked = [checked_tensor(t, values.get(t.name)) for t in tensors]
    row = np.zeros((1, whole.KIND.slot_count(layout, shard)))
    for segment in whole.KIND.segments(layout, shard):
        # A value at the bound may pass it by the rounding of float32, and slots hold at most 1.
        values_of_one = checked[segment.item].ravel().astype(np.float64) / tensors[segment.item].bound
        row[0, segment.slot : segment.slot + segment.length] = np.clip(values_of_one, -1, 1)
    return UpdateShardContent(
        shard=index,
        rank=1,
        encrypted_tiers=len(layout.tiers),
        matrices=(),
        clear_tensors=() if layout.encrypt_tensors else tuple(checked),
        ciphertexts=_encrypted(row, encryptor),
    )


def _encrypted(rows: Float64, encryptor: Encrypts | None) -> bytes:
    if not rows.shape[1]:
        return b""
    if encryptor is None:
        raise DomainError(Reason.SECRET_UNAVAILABLE, "the layout encrypts, but there is no key")
    return encode_block(encryptor.encrypt(rows))


def _common_rank(layout: Layout, factors: Mapping[str, LoraFactors]) -> int:
    ranks = {f.A.shape[0] for f in factors.values()}
    rank = max(ranks, default=0)
    if len(ranks) != 1 or not 1 <= rank <= layout.max_rank:
        raise DomainError(
            Reason.SHAPE_MISMATCH, f"the factors need one rank for all matrices, 1 to {layout.max_rank}"
        )
    return rank


def _ordered(matrix: Matrix, factors: LoraFactors | None, rank: int, order: NDArray[np.int64]) -> LoraFactors:
    """Factors with columns in column order and rows of A normalized."""
    shapes = (matrix.out_features, rank), (rank, matrix.in_features)
    if factors is None or (factors.B.shape, factors.A.shape) != shapes:
        raise DomainError(
            Reason.SHAPE_MISMATCH, f"the update has no factors of the right shape for {matrix.name}"
        )
    if not (np.isfinite(factors.A).all() and np.isfinite(factors.B).all()):
        raise DomainError(Reason.VALUE_NOT_FINITE, f"the factors of {matrix.name} hold NaN or infinity")
    exponents = np.frexp(np.abs(factors.A).max(axis=1))[1]
    A = np.ldexp(factors.A, -exponents[:, None])[:, order].astype(np.float32)
    B = np.ldexp(factors.B, exponents).astype(np.float32)
    if not np.isfinite(B).all():
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, f"the factors of {matrix.name} exceed float32")
    return LoraFactors(B, A)


def checked_tensor(tensor: Tensor, value: Float32 | None) -> Float32:
    """The tensor's value. Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE, naming it."""
    if value is None or value.shape != tensor.shape:
        raise DomainError(
            Reason.SHAPE_MISMATCH, f"the update has no tensor {tensor.name} of shape {tensor.shape}"
        )
    if not np.isfinite(value).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, f"{tensor.name} holds NaN or infinity")
    if np.abs(value).max() > tensor.bound:
        raise DomainError(
            Reason.VALUE_OUT_OF_RANGE,
            f"{tensor.name} exceeds {tensor.bound}: lower the learning rate or raise protection.tensor_bound",
        )
    return value
