"""Coefficients as planes of bits: the lower 16 bits of all, then the upper bits in planes of 1, 2, 4 or 8 of all.

Planes are added as they arrive, by whole vectors; interleaved bytes would cost 50 times as much. Where several upper
parts share a byte, byte i holds those of the coefficients i, i + n/p, i + 2n/p, ..., lowest bits first, so that each
part of the plane is again a run of coefficients.
"""

from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.additive.parameters import LOW_BITS, AdditiveParameters

UInt32Array: TypeAlias = npt.NDArray[np.uint32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]

HIGH_PLANES: Final = MappingProxyType({0: (), 2: (2,), 4: (4,), 6: (4, 2), 8: (8,)})
"""Widths of the upper planes, lowest bits first, by the number of upper bits."""
PLANE_UNIT: Final = 64
"""Planes are of a multiple of that many coefficients: every one is of whole bytes, and of whole words."""
_STEP: Final = 1 << 16
"""Coefficients at a time: what is added stays in the processor's cache."""


def encoded_bytes(parameters: AdditiveParameters, coefficients: int) -> int:
    """Length of the planes of so many coefficients, a multiple of PLANE_UNIT."""
    return 2 * coefficients + coefficients * parameters.high_bits // 8


def encode(parameters: AdditiveParameters, coefficients: UInt32Array) -> bytes:
    """The planes of coefficients [n], each below 2^kept_bits; n is a multiple of PLANE_UNIT."""
    planes = [coefficients.astype("<u2").tobytes()]
    high = (coefficients >> np.uint32(LOW_BITS)).astype(np.uint8)
    for bits in HIGH_PLANES[parameters.high_bits]:
        planes.append(_packed(high & np.uint8((1 << bits) - 1), bits))
        high >>= np.uint8(bits % 8)
    return b"".join(planes)


def _packed(high: UInt8Array, bits: int) -> bytes:
    runs = high.reshape(8 // bits, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: UInt8Array = np.bitwise_or.reduce(runs << shifts[:, None], axis=0)
    return packed.tobytes()


class PlaneSum:
    """The sum of coefficients [n] modulo 2^kept_bits, in 4 to 5 bytes a coefficient.

    Both accumulators wrap: the lower one at 2^32, the upper one at 2^8, multiples of what the sum is taken modulo.
    """

    def __init__(self, parameters: AdditiveParameters, coefficients: int) -> None:
        self._parameters = parameters
        self._low = np.zeros(coefficients, dtype=np.uint32)
        self._high = np.zeros(coefficients if parameters.high_bits else 0, dtype=np.uint8)

    def add(self, planes: memoryview) -> None:
        """Adds one encoding, of exactly `encoded_bytes`."""
        count = len(self._low)
        low = np.frombuffer(planes, dtype="<u2", count=count)
        for start in range(0, count, _STEP):
            part = self._low[start : start + _STEP]
            np.add(part, low[start : start + _STEP], out=part)
        offset, lower = 2 * count, 0
        for bits in HIGH_PLANES[self._parameters.high_bits]:
            size = count * bits // 8
            self._add_high(np.frombuffer(planes, dtype=np.uint8, count=size, offset=offset), bits, lower)
            offset, lower = offset + size, lower + bits

    def _add_high(self, plane: UInt8Array, bits: int, lower: int) -> None:
        """Adds a plane of that many bits, above `lower` bits of the planes before it."""
        mask = np.uint8((1 << bits) - 1)
        for index, run in enumerate(self._high.reshape(8 // bits, -1)):
            for start in range(0, len(run), _STEP):
                part = run[start : start + _STEP]
                values = (plane[start : start + _STEP] >> np.uint8(bits * index)) & mask
                part += values << np.uint8(lower) if lower else values

    def coefficients(self) -> UInt32Array:
        """The sum so far, [n], each below 2^kept_bits."""
        mask = np.uint32((1 << self._parameters.kept_bits) - 1)
        if not self._parameters.high_bits:
            return self._low & mask
        total = np.empty_like(self._low)
        for start in range(0, len(total), _STEP):
            part = slice(start, start + _STEP)
            np.left_shift(self._high[part], np.uint32(LOW_BITS), out=total[part], dtype=np.uint32)
            total[part] += self._low[part]
            total[part] &= mask
        return total


def decode(parameters: AdditiveParameters, planes: memoryview, coefficients: int) -> UInt32Array:
    """Coefficients [n], each below 2^kept_bits; every string of that length is an encoding."""
    total = PlaneSum(parameters, coefficients)
    total.add(planes)
    return total.coefficients()
