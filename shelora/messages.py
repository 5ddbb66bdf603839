"""Layouts to protobuf messages and back, checked. Shards are bytes of their own: `shelora.lora.codec`.

How many there are of something is looked at before any is converted: a message of some MiB holds millions.
"""

from collections.abc import Sized
from dataclasses import asdict

from shelora.lora.kinds import require_kinds
from shelora.lora.layout import (
    CLEAR_BITS,
    MAX_ITEMS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TIERS,
    Layout,
    Matrix,
    Shard,
    SumTerms,
    Tensor,
    refuse,
)
from shelora.lora.noise import ClientNoise
from shelora.v1 import common_pb2 as pb


def matrix_to_proto(matrix: Matrix) -> pb.Matrix:
    return pb.Matrix(
        name=matrix.name,
        out_features=matrix.out_features,
        in_features=matrix.in_features,
        tier_columns=matrix.tier_columns,
    )


def matrix_from_proto(message: pb.Matrix) -> Matrix:
    """Raises INVALID_ARGUMENT naming what is wrong with the matrix."""
    require_at_most(MAX_TIERS, message.tier_columns, "tier_columns")
    return Matrix(
        message.name, message.out_features, message.in_features, tier_columns=tuple(message.tier_columns)
    )


def tensor_to_proto(tensor: Tensor) -> pb.Tensor:
    return pb.Tensor(name=tensor.name, shape=tensor.shape, bound=tensor.bound)


def tensor_from_proto(message: pb.Tensor) -> Tensor:
    """Raises INVALID_ARGUMENT naming what is wrong with the tensor."""
    return Tensor(message.name, tensor_shape(message), message.bound)


def tensor_shape(message: pb.Tensor) -> tuple[int, ...]:
    """Raises INVALID_ARGUMENT."""
    require_at_most(MAX_TENSOR_DIMENSIONS, message.shape, "shape")
    return tuple(message.shape)


def require_at_most(most: int, items: Sized, field: str) -> None:
    """Raises INVALID_ARGUMENT if a repeated field has more items."""
    if len(items) > most:
        raise refuse(f"{field} has {len(items)} items, at most {most} are accepted")


def layout_to_proto(layout: Layout) -> pb.Layout:
    return pb.Layout(
        parameters=layout.parameters,
        key_id=layout.key_id,
        matrices=[matrix_to_proto(m) for m in layout.matrices],
        tensors=[tensor_to_proto(t) for t in layout.tensors],
        tiers=layout.tiers,
        encrypt_tensors=layout.encrypt_tensors,
        max_rank=layout.max_rank,
        max_directions=layout.max_directions,
        shards=[_shard_to_proto(shard) for shard in layout.shards],
        sums=_sums_to_proto(layout.sums) if layout.sums else None,
        clear_bits=None if layout.clear_bits == CLEAR_BITS[-1] else layout.clear_bits,
    )


def layout_from_proto(message: pb.Layout) -> Layout:
    """Raises INVALID_ARGUMENT naming what is wrong with the layout."""
    require_at_most(MAX_ITEMS, message.matrices, "matrices")
    require_at_most(MAX_ITEMS, message.tensors, "tensors")
    require_at_most(MAX_TIERS, message.tiers, "tiers")
    require_at_most(2 * MAX_ITEMS, message.shards, "shards")
    for shard in message.shards:
        require_at_most(MAX_ITEMS, shard.matrices, "matrices of a shard")
        require_at_most(MAX_ITEMS, shard.tensors, "tensors of a shard")
    layout = Layout(
        parameters=message.parameters,
        key_id=message.key_id,
        matrices=tuple(matrix_from_proto(m) for m in message.matrices),
        tensors=tuple(tensor_from_proto(t) for t in message.tensors),
        tiers=tuple(message.tiers),
        encrypt_tensors=message.encrypt_tensors,
        max_rank=message.max_rank,
        max_directions=message.max_directions,
        shards=tuple(Shard(tuple(s.matrices), tuple(s.tensors), s.kind) for s in message.shards),
        sums=_sums_from_proto(message.sums) if message.HasField("sums") else None,
        clear_bits=message.clear_bits if message.HasField("clear_bits") else CLEAR_BITS[-1],
    )
    return require_kinds(layout)


def _sums_to_proto(terms: SumTerms) -> pb.SumTerms:
    return pb.SumTerms(**{**asdict(terms), "figures": True if terms.figures else None})


def _sums_from_proto(message: pb.SumTerms) -> SumTerms:
    return SumTerms(
        profile=message.profile,
        sketch_columns=message.sketch_columns,
        sketch_rows=message.sketch_rows,
        noise=_noise_from_proto(message.noise) if message.HasField("noise") else None,
        figures=message.figures,
    )


def _noise_from_proto(message: pb.ClientNoise) -> ClientNoise:
    return ClientNoise(
        bound=message.bound, clip=message.clip, multiplier=message.multiplier, honest=message.honest
    )


def _shard_to_proto(shard: Shard) -> pb.Shard:
    """The usual kind goes without saying."""
    kind = "" if shard.kind == shard.usual_kind else shard.kind
    return pb.Shard(matrices=shard.matrices, tensors=shard.tensors, kind=kind)
