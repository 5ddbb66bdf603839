"""Depth-one CKKS: symmetric encryption of values, weighted sums without any key, checked wire format.

`shelora.ckks.secret` (keys, encryption, decryption) is not imported from here: a party that imports this
package to aggregate has no code that decrypts.
"""

from shelora.ckks.bounds import accumulated_error_bound, slot_error_bound
from shelora.ckks.evaluator import Accumulator, Evaluator
from shelora.ckks.parameters import (
    INSECURE_TOY,
    LARGE,
    PROFILES,
    STANDARD,
    SUM_LIMIT,
    VALUE_LIMIT,
    CkksParameters,
    profile,
)
from shelora.ckks.wire import (
    KEY_ID_BYTES,
    BlockReader,
    BlockShape,
    CiphertextBlock,
    FullBlock,
    FullCiphertext,
    SeededBlock,
    SeededCiphertext,
    decode_block,
    encode_block,
    iterate_ciphertexts,
    read_ciphertext,
    validate_block,
)

__all__ = [
    "INSECURE_TOY",
    "KEY_ID_BYTES",
    "LARGE",
    "PROFILES",
    "STANDARD",
    "SUM_LIMIT",
    "VALUE_LIMIT",
    "Accumulator",
    "BlockReader",
    "BlockShape",
    "CiphertextBlock",
    "CkksParameters",
    "Evaluator",
    "FullBlock",
    "FullCiphertext",
    "SeededBlock",
    "SeededCiphertext",
    "accumulated_error_bound",
    "decode_block",
    "encode_block",
    "iterate_ciphertexts",
    "profile",
    "read_ciphertext",
    "slot_error_bound",
    "validate_block",
]
