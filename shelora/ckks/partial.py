"""What one accumulator has summed, for another one to go on from. Needs no native code and no key."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shelora.ckks.wire import BlockShape, FullBlock, decode_block, encode_block
from shelora.errors import DomainError, Reason


@dataclass(frozen=True, slots=True, eq=False)
class PartialSum:
    """A sum over some of the blocks."""

    block: FullBlock
    """Of the ciphertexts alone, [rows, chunks]."""
    weights: npt.NDArray[np.float64]
    """[rows, segments]: magnitudes of the weights used, added up."""
    clear: npt.NDArray[np.float64]
    """[rows, slots]: the clear values."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Its three parts, for `shelora.lora.arrays`."""
        block = np.frombuffer(encode_block(self.block), dtype=np.uint8)
        return {"block": block, "weights": self.weights, "clear": self.clear}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], shape: BlockShape) -> "PartialSum":
        """What `arrays` gave of a sum of that shape. Raises what `decode_block` raises, SHARD_MALFORMED."""
        if not {"block", "weights", "clear"} <= arrays.keys():
            raise DomainError(Reason.SHARD_MALFORMED, "a partial sum is not whole")
        block = decode_block(arrays["block"].tobytes(), shape)
        assert isinstance(block, FullBlock)  # the shape is one of sums
        return cls(block, arrays["weights"], arrays["clear"])
