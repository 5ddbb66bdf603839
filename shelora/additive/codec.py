"""Coefficients as planes of bits: the lower 16 bits of all, then the upper 0, 2, 4 or 8 bits of all.

Planes are added as they arrive, by whole vectors; interleaved bytes would cost 50 times as much. Where several upper
parts share a byte, byte i holds those of the coefficients i, i + n/p, i + 2n/p, ..., lowest bits first, so that each
part of the plane is again a run of coefficients.
"""

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.additive.parameters import LOW_BITS, AdditiveParameters

UInt32Array: TypeAlias = npt.NDArray[np.uint32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_STEP: Final = 1 << 16
"""Coefficients at a time: what is added stays in the processor's cache."""


def encoded_bytes(parameters: AdditiveParameters, coefficients: int) -> int:
    """Length of the planes of so many coefficients, a multiple of 64."""
    return 2 * coefficients + coefficients * parameters.high_bits // 8


def encode(parameters: AdditiveParameters, coefficients: UInt32Array) -> bytes:
    """The planes of coefficients [n], each below 2^kept_bits; n is a multiple of 64."""
    low = coefficients.astype("<u2").tobytes()
    return low + _packed(coefficients >> np.uint32(LOW_BITS), parameters.high_bits)


def _packed(high: UInt32Array, bits: int) -> bytes:
    if not bits:
        return b""
    runs = high.astype(np.uint8).reshape(8 // bits, -1)
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
        if self._parameters.high_bits:
            self._add_high(np.frombuffer(planes, dtype=np.uint8, offset=2 * count))

    def _add_high(self, plane: UInt8Array) -> None:
        bits = self._parameters.high_bits
        mask = np.uint8((1 << bits) - 1)
        for index, run in enumerate(self._high.reshape(8 // bits, -1)):
            for start in range(0, len(run), _STEP):
                part = run[start : start + _STEP]
                part += (plane[start : start + _STEP] >> np.uint8(bits * index)) & mask

    def coefficients(self) -> UInt32Array:
        """The sum so far, [n], each below 2^kept_bits."""
        total = self._low.copy()
        if self._parameters.high_bits:
            total += self._high.astype(np.uint32) << np.uint32(LOW_BITS)
        total &= np.uint32((1 << self._parameters.kept_bits) - 1)
        return total


def decode(parameters: AdditiveParameters, planes: memoryview, coefficients: int) -> UInt32Array:
    """Coefficients [n], each below 2^kept_bits; every string of that length is an encoding."""
    total = PlaneSum(parameters, coefficients)
    total.add(planes)
    return total.coefficients()
