"""Products in Z_q[X]/(X^N + 1), exact, by a complex Fourier transform of N / 2 points.

A polynomial modulo X^N + 1 is folded to N / 2 complex numbers u_j = (p_j + i p_(j + N/2)) w^j with w = exp(i pi / N);
pointwise products of their transforms are products modulo X^N + 1. In float64 the error of a product is at most
126 * 2^-53 * |a| * |s| in Euclidean norms (Percival, Math. Comp. 72, 2003, theorem 5.1, for nine levels, three
transforms and three twists). `Multiplier` splits the public factor where that bound does not stay below 1/4, so that
rounding gives the one right integer on every machine.
"""

from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shelora.additive.parameters import AdditiveParameters

Int32Array: TypeAlias = npt.NDArray[np.int32]
UInt32Array: TypeAlias = npt.NDArray[np.uint32]
ComplexArray: TypeAlias = npt.NDArray[np.complex128]
FloatArray: TypeAlias = npt.NDArray[np.float64]

ERROR_CONSTANT: Final = 126 * 2.0**-53
LARGEST_ERROR: Final = 0.25
LIMB_BITS: Final = 13

_DOMAIN: Final = b"shelora/additive/v1/public"
_WORD_BYTES: Final = 4
_BLOCK_BYTES: Final = 16


def expand_public(
    parameters: AdditiveParameters, context: bytes, shard: int, first: int, count: int
) -> Int32Array:
    """The public polynomials `first` to `first + count - 1` of a shard, [count, N], centred: -q/2 to q/2 - 1.

    AES-256 in counter mode under a key from (parameters, context, shard), as in FrodoKEM: everyone who knows the
    context has the same ones, and nobody chooses them.
    """
    info = b"/".join((_DOMAIN, parameters.digest, len(context).to_bytes(4, "little"), context))
    key = HKDF(SHA256(), 32, None, info + b"/" + shard.to_bytes(4, "little")).derive(b"")
    size = _WORD_BYTES * parameters.degree
    counter = (first * size // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(size * count))
    words = np.frombuffer(stream, dtype="<i4") >> np.int32(32 - parameters.modulus_bits)
    return words.reshape(count, parameters.degree)


class Multiplier:
    """Multiplies public polynomials by one small secret polynomial."""

    def __init__(self, parameters: AdditiveParameters, small: npt.NDArray[np.int64]) -> None:
        """Args: small: [N], of any magnitude below 2^20."""
        self._half = parameters.degree // 2
        self._twist = _twist(parameters.degree)
        values = small.astype(np.float64)
        self._transform = self._forward(values)
        largest = np.sqrt(parameters.degree) * parameters.modulus / 2
        error = ERROR_CONSTANT * largest * float(np.linalg.norm(values))
        self._split = error > LARGEST_ERROR

    def times(self, public: Int32Array) -> npt.NDArray[np.int64]:
        """The products, [count, N]: exact integers, not yet reduced modulo q."""
        if not self._split:
            return self._product(public)
        high = public >> np.int32(LIMB_BITS)
        low = public - (high << np.int32(LIMB_BITS))
        return (self._product(high) << np.int64(LIMB_BITS)) + self._product(low)

    def _product(self, public: Int32Array) -> npt.NDArray[np.int64]:
        spectrum = self._forward(public)
        spectrum *= self._transform
        folded = np.fft.ifft(spectrum, axis=-1, out=spectrum)
        folded *= np.conj(self._twist)
        product = np.empty((*folded.shape[:-1], 2 * self._half))
        np.rint(folded.real, out=product[..., : self._half])
        np.rint(folded.imag, out=product[..., self._half :])
        return product.astype(np.int64)

    def _forward(self, values: npt.NDArray[np.int32] | FloatArray) -> ComplexArray:
        folded: ComplexArray = np.empty((*values.shape[:-1], self._half), dtype=np.complex128)
        folded.real = values[..., : self._half]
        folded.imag = values[..., self._half :]
        folded *= self._twist
        spectrum: ComplexArray = np.fft.fft(folded, axis=-1, out=folded)
        return spectrum


@lru_cache(maxsize=4)
def _twist(degree: int) -> ComplexArray:
    twist: ComplexArray = np.exp(1j * np.pi * np.arange(degree // 2) / degree)
    return twist
