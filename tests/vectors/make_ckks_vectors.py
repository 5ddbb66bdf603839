"""Writes tests/vectors/ckks/. Run from the repository root: `python -m tests.vectors.make_ckks_vectors [--new-key]`.

`seeded.bin` and `full.bin` are encodings of hand-made blocks: the same bytes on every run. `key.bin`, `fresh.bin`
and `sum.bin` are a real key, a real ciphertext and a real sum at INSECURE_TOY; encryption is random, so they are
rewritten only with --new-key, which is a decision to stop reading old ciphertexts.
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shelora.ckks import INSECURE_TOY, BlockShape, FullBlock, SeededBlock, encode_block
from shelora.ckks.evaluator import Evaluator
from shelora.ckks.secret import Encryptor, SecretKey

FOLDER: Final = Path(__file__).parent / "ckks"
ROWS, CHUNKS, TOTAL_SLOTS = 2, 3, 140
SEGMENTS = (40, 60, 40)
KEY_ID: Final = bytes(range(16))


def hand_made_seeded() -> SeededBlock:
    """Coefficients walk through the whole range, first and last residue included."""
    shape = BlockShape(parameters=INSECURE_TOY, key_id=KEY_ID, rows=ROWS, chunks=CHUNKS, seeded=True)
    seeds = np.arange(ROWS * CHUNKS * 64, dtype=np.uint64).astype(np.uint8).reshape(ROWS, CHUNKS, 64)
    return SeededBlock(shape, _ramp(), seeds)


def hand_made_full() -> FullBlock:
    shape = BlockShape(parameters=INSECURE_TOY, key_id=KEY_ID, rows=ROWS, chunks=CHUNKS, seeded=False)
    return FullBlock(shape, _ramp(), _ramp()[::-1].copy())


def values() -> npt.NDArray[np.float64]:
    return np.sin(np.arange(ROWS * TOTAL_SLOTS, dtype=np.float64)).reshape(ROWS, TOTAL_SLOTS)


def weights() -> npt.NDArray[np.float64]:
    return np.cos(np.arange(2 * ROWS * 3, dtype=np.float64)).reshape(2, ROWS, 3) / 8


def clear() -> npt.NDArray[np.float64]:
    return values() / 8


def _ramp() -> npt.NDArray[np.uint64]:
    count = ROWS * CHUNKS * INSECURE_TOY.poly_degree
    residues = [index * (INSECURE_TOY.modulus - 1) // (count - 1) for index in range(count)]
    return np.array(residues, dtype=np.uint64).reshape(ROWS, CHUNKS, INSECURE_TOY.poly_degree)


def _write(name: str, content: bytes) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_bytes(content)


def _write_key() -> None:
    key = SecretKey.generate(INSECURE_TOY)
    fresh = Encryptor(key).encrypt(values())
    accumulator = Evaluator(INSECURE_TOY, key.key_id).accumulator(SEGMENTS, rows=2)
    accumulator.add(fresh, weights())
    accumulator.add_clear(clear())
    _write("key.bin", key.to_bytes())
    _write("fresh.bin", encode_block(fresh))
    _write("sum.bin", encode_block(accumulator.finish()))


def main() -> None:
    _write("seeded.bin", encode_block(hand_made_seeded()))
    _write("full.bin", encode_block(hand_made_full()))
    if "--new-key" in sys.argv[1:]:
        _write_key()


if __name__ == "__main__":
    main()
