"""Depth-one CKKS: symmetric encryption of values, weighted sums without any key, checked wire format.

The package itself offers what needs numpy alone: parameters, bounds and the wire format. What computes is named
where it is used: `shelora.ckks.evaluator` (SEAL, no key) by servers that aggregate, `shelora.ckks.secret` (keys,
encryption, decryption) by agents and the key authority only. A coordinator loads no native code, and a party
that aggregates has no code that decrypts.
"""

from shelora.ckks.bounds import accumulated_error_bound, slot_error_bound
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
    "BlockReader",
    "BlockShape",
    "CiphertextBlock",
    "CkksParameters",
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
