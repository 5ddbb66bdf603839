"""From captured bytes to factors: what an attacker reads out of an update, with and without secrets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attack.capture import Round
from shelora.additive.codec import decode
from shelora.additive.wire import summand_planes
from shelora.lora.codec import parse_update
from shelora.lora.layout import SKETCHES
from shelora.lora.shards import Float64, UpdateShardContent
from shelora.lora.sketches import Sketch, parted
from shelora.lora.sums import SKETCHES_KIND, sketch_values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """One matrix of one update, as far as it travelled in the clear."""

    B: Float64
    """[out, rank]; columns scaled by the powers of two of the row normalization."""
    A: Float64
    """[rank, clear columns], in the order in which they travelled."""


def clear_parts(round_: Round, client: str) -> Mapping[str, Seen]:
    """The clear factors of a client's update, by matrix; empty where nothing travels in the clear."""
    seen: dict[str, Seen] = {}
    for index, content in sorted(round_.of(client).items()):
        parsed = parse_update(round_.layout, index, content)
        seen |= dict(_matrices(round_, parsed))
    return seen


def _matrices(round_: Round, content: UpdateShardContent) -> list[tuple[str, Seen]]:
    shard = round_.layout.shards[content.shard]
    if not content.matrices:  # nothing of the shard is in the clear
        return []
    return [
        (
            round_.layout.matrices[index].name,
            Seen(B=part.B.astype(np.float64), A=part.clear_A.astype(np.float64)),
        )
        for index, part in zip(shard.matrices, content.matrices, strict=True)
    ]


def sketches_as_stored(round_: Round, client: str) -> Mapping[str, Sketch]:
    """By matrix, the ciphertexts of `complete` read as if they were values: these, if they hide nothing."""
    layout, found = round_.layout, dict[str, Sketch]()
    for index, content in sorted(round_.of(client).items()):
        shard = layout.shards[index]
        if shard.kind != SKETCHES or layout.sums is None:
            continue
        shape = SKETCHES_KIND.shape(layout, index)
        planes = summand_planes(parse_update(layout, index, content).ciphertexts, shape)
        kept = decode(shape.parameters, planes, shape.coefficients).astype(np.int64)
        half = shape.parameters.modulus // 2
        values = (((kept << shape.parameters.dropped_bits) + half) % shape.parameters.modulus - half).astype(
            float
        )
        matrices = [layout.matrices[i] for i in shard.matrices]
        ends = np.cumsum([sketch_values(layout.sums, matrix) for matrix in matrices])
        for matrix, part in zip(matrices, np.split(values[: ends[-1]], ends[:-1]), strict=True):
            found[matrix.name] = parted(matrix, layout.sums, part)
    return found


def normalization(A: NDArray[np.floating]) -> NDArray[np.int32]:
    """Exponents e by which a client scales the rows of A down, and the columns of B up."""
    exponents: NDArray[np.int32] = np.frexp(np.abs(A).max(axis=1))[1]
    return exponents
