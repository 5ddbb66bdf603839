"""The bridge to Microsoft SEAL (through `tenseal.sealapi`): checked integers in, integers out.

SEAL's own loader never sees foreign bytes. Arrays that passed the checks of `wire.py` are laid out here as
an uncompressed SEAL buffer and loaded from that; results are saved by SEAL and read back as arrays. The
binding loads and saves by file name only, so buffers pass through an anonymous memory file (Linux) that
lives for one call: nothing touches a disk, and threads and forked workers share nothing.

The layout below is that of SEAL 4 (`Ciphertext::save_members`, `DynArray::save_members`). A context proves
on creation that the loaded library still writes it, and refuses to start otherwise.
"""

import os
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard
from tenseal import sealapi

from shelora.ckks.packing import UInt64Array
from shelora.ckks.parameters import CkksParameters
from shelora.ckks.wire import SEED_BYTES, FullCiphertext, SeededCiphertext, UInt8Array
from shelora.errors import DomainError, Reason

FloatArray: TypeAlias = npt.NDArray[np.float64]
Native: TypeAlias = Any
"""An object of the binding, which has no types."""

_FILE_HEADER: Final = struct.Struct("<HBBBBHQ")
"""SEALHeader: magic, header size, version major, minor, compression, reserved, total size."""

_MAGIC: Final = 0xA15E
_UNCOMPRESSED: Final = 0
_ZSTANDARD: Final = 2

_CIPHERTEXT_MEMBERS: Final = struct.Struct("<32sBQQQdQ")
"""parms_id, NTT form, polynomials, N, primes, scale, correction factor (BGV only, one)."""

_PLAINTEXT_MEMBERS: Final = struct.Struct("<32sQd")
"""parms_id, coefficients, scale."""

_COUNT: Final = struct.Struct("<Q")
_BLAKE2XB: Final = b"\x01"
"""`prng_type::blake2xb`, SEAL's default generator."""

_WORD: Final = np.dtype("<u8")

_LOAD_ERRORS: Final = (ValueError, RuntimeError, IndexError)
"""What the binding turns SEAL's C++ exceptions into."""


class SealContext:
    """One parameter set as SEAL sees it; holds no key. Get it from `seal_context`."""

    def __init__(self, parameters: CkksParameters) -> None:
        self.parameters = parameters
        self.native = _native_context(parameters)
        self.encoder = sealapi.CKKSEncoder(self.native)
        self._parms_id = struct.pack("<4Q", *self.native.first_parms_id())
        self._version = _library_version()
        self._order = reversed_bits(parameters.poly_degree // 2)
        self._polynomial_bytes = parameters.poly_degree * _WORD.itemsize
        self._check_layout()

    def load_seeded(self, ciphertext: SeededCiphertext) -> Native:
        """A fresh ciphertext at the value scale; SEAL expands the seed."""
        generator = self._nested(_BLAKE2XB + ciphertext.seed.tobytes())
        members = self._ciphertext_members(self.parameters.scale)
        payload = members + self._array(ciphertext.c0.tobytes()) + generator
        return self.load(sealapi.Ciphertext(), payload)

    def load_full(self, ciphertext: FullCiphertext) -> Native:
        """An accumulated ciphertext at the product scale."""
        members = self._ciphertext_members(self.parameters.product_scale)
        polynomials = ciphertext.c0.tobytes() + ciphertext.c1.tobytes()
        return self.load(sealapi.Ciphertext(), members + self._array(polynomials))

    def expand(self, ciphertext: SeededCiphertext) -> FullCiphertext:
        """Both polynomials of a fresh ciphertext."""
        return self._read_full(self.load_seeded(ciphertext), self.parameters.scale)

    def read_seeded(self, native: Native) -> SeededCiphertext:
        """c0 and seed of what `Encryptor.encrypt_symmetric(plaintext)` returned."""
        size = self._polynomial_bytes
        prefix = self._ciphertext_members(self.parameters.scale) + self._array_header(size)
        generator = self._nested(_BLAKE2XB + bytes(SEED_BYTES))[:-SEED_BYTES]
        body = self.save(native)
        seed_offset = len(prefix) + size + len(generator)
        _require_layout(body.startswith(prefix) and body.startswith(generator, seed_offset - len(generator)))
        _require_layout(len(body) == seed_offset + SEED_BYTES)
        seed: UInt8Array = np.frombuffer(body, dtype=np.uint8, offset=seed_offset)
        return SeededCiphertext(self._residues(body, len(prefix)), seed)

    def read_full(self, native: Native) -> FullCiphertext:
        """Both polynomials of a ciphertext at the product scale."""
        return self._read_full(native, self.parameters.product_scale)

    def _read_full(self, native: Native, scale: float) -> FullCiphertext:
        size = self._polynomial_bytes
        prefix = self._ciphertext_members(scale) + self._array_header(2 * size)
        body = self.save(native)
        _require_layout(body.startswith(prefix) and len(body) == len(prefix) + 2 * size)
        return FullCiphertext(self._residues(body, len(prefix)), self._residues(body, len(prefix) + size))

    def load_plaintext(self, native: Native, residues: UInt64Array, scale: float) -> Native:
        """Fills a `Plaintext`, or what SEAL stores as one (a secret key), with residues [N] in NTT order."""
        members = self._plaintext_members(scale)
        return self.load(native, members + self._array(residues.tobytes()))

    def read_plaintext(self, native: Native, scale: float) -> UInt64Array:
        """Residues [N], in NTT order, of a `Plaintext` or a secret key."""
        prefix = self._plaintext_members(scale) + self._array_header(self._polynomial_bytes)
        body = self.save(native)
        _require_layout(body.startswith(prefix) and len(body) == len(prefix) + self._polynomial_bytes)
        return self._residues(body, len(prefix))

    def encode(self, values: FloatArray, scale: float) -> Native:
        """A plaintext of N values: two to a complex slot of SEAL, slots in bit-reversed order (exact.py)."""
        plaintext = sealapi.Plaintext()
        self.encoder.encode(values.view(np.complex128)[self._order].tolist(), scale, plaintext)
        return plaintext

    def encode_factors(self, factors: FloatArray, scale: float) -> Native:
        """A plaintext of N / 2 real factors: a product by it scales both values of each pair."""
        plaintext = sealapi.Plaintext()
        self.encoder.encode(factors[self._order].tolist(), scale, plaintext)
        return plaintext

    def encode_scalar(self, value: float, scale: float) -> Native:
        """A plaintext with the same value in every slot: one rounding, no transform."""
        plaintext = sealapi.Plaintext()
        self.encoder.encode(value, scale, plaintext)
        return plaintext

    def decode(self, plaintext: Native) -> FloatArray:
        """Values [N] of a plaintext."""
        pairs: npt.NDArray[np.complex128] = np.array(self.encoder.decode_complex(plaintext))
        return pairs[self._order].view(np.float64)

    def from_ntt(self, residues: UInt64Array) -> UInt64Array:
        """Coefficients [N] of a polynomial given in NTT order."""
        return self._transform(residues, to_ntt=False)

    def to_ntt(self, residues: UInt64Array) -> UInt64Array:
        """NTT order [N] of a polynomial given by its coefficients."""
        return self._transform(residues, to_ntt=True)

    def load(self, native: Native, payload: bytes) -> Native:
        """Lets SEAL fill `native` from a payload built here. Raises: DomainError(INTERNAL): SEAL refuses."""
        try:
            _through_memory(lambda path: native.load(self.native, path), write=self._nested(payload))
        except _LOAD_ERRORS as error:
            raise DomainError(Reason.INTERNAL, "SEAL refused a buffer built from checked integers") from error
        return native

    def save(self, native: Native) -> bytes:
        """The decompressed payload of what SEAL saves."""
        limit = 2 * self._polynomial_bytes + 1024
        return _payload(_through_memory(native.save), limit)

    def _transform(self, residues: UInt64Array, *, to_ntt: bool) -> UInt64Array:
        # SEAL transforms ciphertexts only, so the polynomial travels as the second half of one. The scale is
        # without meaning here; load and read agree on the product scale.
        scale, evaluator = self.parameters.product_scale, sealapi.Evaluator(self.native)
        members = self._ciphertext_members(scale, ntt=not to_ntt)
        body = self._array(bytes(self._polynomial_bytes) + residues.tobytes())
        native = self.load(sealapi.Ciphertext(), members + body)
        (evaluator.transform_to_ntt_inplace if to_ntt else evaluator.transform_from_ntt_inplace)(native)
        return self._residues(self.save(native), len(members) + len(body) - self._polynomial_bytes)

    def _ciphertext_members(self, scale: float, *, ntt: bool = True) -> bytes:
        degree = self.parameters.poly_degree
        return _CIPHERTEXT_MEMBERS.pack(self._parms_id, ntt, 2, degree, 1, scale, 1)

    def _plaintext_members(self, scale: float) -> bytes:
        return _PLAINTEXT_MEMBERS.pack(self._parms_id, self.parameters.poly_degree, scale)

    def _array(self, content: bytes) -> bytes:
        return self._array_header(len(content)) + content

    def _array_header(self, size: int) -> bytes:
        return self._file_header(_COUNT.size + size) + _COUNT.pack(size // _WORD.itemsize)

    def _nested(self, content: bytes) -> bytes:
        return self._file_header(len(content)) + content

    def _file_header(self, size: int) -> bytes:
        header = _FILE_HEADER.size
        return _FILE_HEADER.pack(_MAGIC, header, *self._version, _UNCOMPRESSED, 0, header + size)

    def _residues(self, body: bytes, offset: int) -> UInt64Array:
        return np.frombuffer(body, dtype=_WORD, count=self.parameters.poly_degree, offset=offset)

    def _check_layout(self) -> None:
        """Loads and saves one ciphertext; a library with another layout stops here, not in a round."""
        ramp = np.arange(self.parameters.poly_degree, dtype=_WORD)
        found = self.read_full(self.load_full(FullCiphertext(ramp, ramp[::-1])))
        _require_layout(bool((found.c0 == ramp).all() and (found.c1 == ramp[::-1]).all()))


def reversed_bits(count: int) -> npt.NDArray[np.intp]:
    """The numbers below `count`, a power of two, with their bits in reverse: a permutation that is its own inverse."""
    order = np.zeros(1, dtype=np.intp)
    while len(order) < count:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


@lru_cache(maxsize=8)
def seal_context(parameters: CkksParameters) -> SealContext:
    """The context of a parameter set, built once a process (a few milliseconds).

    Raises: DomainError: INVALID_ARGUMENT: SEAL refuses the parameters, at 128-bit security if they are
        `secure`; CONFIGURATION_INVALID: not on Linux; INTERNAL: an unknown SEAL layout.
    """
    return SealContext(parameters)


def _native_context(parameters: CkksParameters) -> Native:
    literal = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    literal.set_poly_modulus_degree(parameters.poly_degree)
    literal.set_coeff_modulus([sealapi.Modulus(parameters.modulus)])
    levels = sealapi.SEC_LEVEL_TYPE
    expand_chain = False
    context = sealapi.SEALContext(literal, expand_chain, levels.TC128 if parameters.secure else levels.NONE)
    if not context.parameters_set():
        raise DomainError(Reason.INVALID_ARGUMENT, f"SEAL: {context.parameters_error_message()}")
    return context


def _library_version() -> tuple[int, int]:
    """(major, minor), from the header of something SEAL just saved."""
    saved = _through_memory(sealapi.Plaintext().save)
    _, _, major, minor, *_ = _FILE_HEADER.unpack_from(saved)
    return major, minor


def _payload(saved: bytes, limit: int) -> bytes:
    magic, header, _, _, compression, _, size = _FILE_HEADER.unpack_from(saved)
    _require_layout(magic == _MAGIC and header == _FILE_HEADER.size and size == len(saved))
    if compression == _UNCOMPRESSED:
        return saved[header:]
    _require_layout(compression == _ZSTANDARD)
    payload: bytes = zstandard.ZstdDecompressor().decompress(
        memoryview(saved)[header:], max_output_size=limit
    )
    return payload


def _through_memory(call: Callable[[str], None], write: bytes = b"") -> bytes:
    """Runs `call(path)` on an anonymous memory file that starts as `write`; returns what it holds after."""
    if not hasattr(os, "memfd_create"):
        raise DomainError(Reason.CONFIGURATION_INVALID, "the SEAL bridge needs Linux (memfd_create)")
    file = os.memfd_create("shelora-seal", os.MFD_CLOEXEC)
    try:
        if write and os.write(file, write) != len(write):
            raise DomainError(Reason.INTERNAL, "an anonymous memory file took only part of a buffer")
        call(f"/proc/self/fd/{file}")
        return b"" if write else os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)


def _require_layout(condition: bool) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INTERNAL, "this SEAL library writes a layout the bridge does not know")
