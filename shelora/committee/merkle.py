"""A Merkle tree of SHA-256 over a few leaves: one signature covers all shares, and each travels alone."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

_LEAF: Final = b"\x00"
_NODE: Final = b"\x01"
_EMPTY: Final = bytes(32)


def leaf(position: int, content: bytes) -> bytes:
    """Digest of the content at a position, 1 to 255."""
    return sha256(_LEAF + bytes([position]) + content).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaves, filled up to a power of two with zeros."""
    level = _filled(leaves)
    while len(level) > 1:
        level = _above(level)
    return level[0]


def paths(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """For each leaf its siblings from there to the root, lowest first."""
    levels = [_filled(leaves)]
    while len(levels[-1]) > 2:
        levels.append(_above(levels[-1]))
    siblings = levels if len(levels[0]) > 1 else []
    return [
        [level[(index >> depth) ^ 1] for depth, level in enumerate(siblings)] for index in range(len(leaves))
    ]


def root_from(leaf_digest: bytes, index: int, siblings: Sequence[bytes]) -> bytes:
    """The root that a leaf and its path lead to."""
    digest = leaf_digest
    for sibling in siblings:
        pair = (sibling, digest) if index & 1 else (digest, sibling)
        digest, index = sha256(_NODE + pair[0] + pair[1]).digest(), index // 2
    return digest


def _filled(leaves: Sequence[bytes]) -> list[bytes]:
    size = 1 << max(0, (len(leaves) - 1).bit_length())
    return [*leaves, *[_EMPTY] * (size - len(leaves))]


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = zip(level[::2], level[1::2], strict=True)
    return [sha256(_NODE + left + right).digest() for left, right in pairs]
