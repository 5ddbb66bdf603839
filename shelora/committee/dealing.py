"""Dealings as everyone reads them: digests, sizes, and what one member is shown."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from shelora.committee import merkle
from shelora.committee.context import DIGEST_BYTES, RoundContext, joined_digest
from shelora.committee.statements import parsed
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

COMBINATIONS: Final = 8
"""Masked combinations in a proof, and masks in a share."""

_UPDATE_DOMAIN: Final = b"shelora/committee/v1/update"
_DEALINGS_DOMAIN: Final = b"shelora/committee/v1/dealings"
_TAG_BYTES: Final = 16
_KEY_BYTES: Final = 32


def update_digest(shard_digests: Sequence[bytes]) -> bytes:
    """What a dealing says of its update: SHA-256 over the SHA-256 of its shards, in order, 32 bytes."""
    return joined_digest(_UPDATE_DOMAIN, *shard_digests)


def dealing_digest(statement: pb.Signed) -> bytes:
    """Identifies a dealing: SHA-256 of what was signed. Not of the signature, which anyone could vary."""
    return sha256(statement.content).digest()


def dealings_digest(dealings: Sequence[tuple[str, bytes]]) -> bytes:
    """SHA-256 over names and `dealing_digest`s of contributors, by name, 32 bytes."""
    parts = (part for name, digest in sorted(dealings) for part in (name.encode(), digest))
    return joined_digest(_DEALINGS_DOMAIN, *parts)


def share_bytes(context: RoundContext) -> int:
    """Length of a sealed share."""
    return 2 * (context.shares + COMBINATIONS) + _TAG_BYTES


def read_dealing(context: RoundContext, content: bytes) -> pb.Dealing:
    """A dealing whose fields have their sizes and ranges.

    Raises: DomainError(DEALING_REFUSED), naming the field.
    """
    try:
        dealing = parsed(pb.Dealing, content)
    except DomainError as error:
        raise refused(error.message) from None
    for field in ("update_digest", "keys_digest", "shares_root"):
        if len(getattr(dealing, field)) != DIGEST_BYTES:
            raise refused(f"{field} must have {DIGEST_BYTES} bytes")
    if len(dealing.ephemeral_key) != _KEY_BYTES:
        raise refused(f"ephemeral_key must have {_KEY_BYTES} bytes")
    if not 1 <= dealing.weight <= context.most_weight:
        raise refused(f"weight must be 1 to {context.most_weight}")
    if len(dealing.proof) != 2 * COMBINATIONS * context.rule.needed:
        raise refused("proof must have 16 bytes for each of T + l points")
    return dealing


def check_dealt(context: RoundContext, dealt: pb.DealtShares) -> pb.Dealing:
    """What a server can check of an upload before it keeps it: sizes, positions, the root over the shares.

    Raises: DomainError(DEALING_REFUSED), naming the field.
    """
    dealing = read_dealing(context, dealt.dealing.content)
    if not context.rule.quorum <= len(dealt.shares) <= context.rule.size:
        raise refused("shares must be one a member of at least a quorum")
    positions = [share.position for share in dealt.shares]
    increasing = all(a < b for a, b in zip([0, *positions], positions, strict=False))
    if not increasing or positions[-1] > context.rule.size:
        raise refused("positions of shares must increase from 1 to m")
    if any(len(share.sealed) != share_bytes(context) for share in dealt.shares):
        raise refused(f"a sealed share must have {share_bytes(context)} bytes")
    if merkle.root(share_leaves(context, dealt.shares)) != dealing.shares_root:
        raise refused("shares_root is not over these shares")
    return dealing


def share_leaves(context: RoundContext, shares: Sequence[pb.SealedShare]) -> list[bytes]:
    """Leaves of the tree over shares: one a position, zeros where there is no share."""
    leaves = {share.position: merkle.leaf(share.position, share.sealed) for share in shares}
    return [leaves.get(position, bytes(DIGEST_BYTES)) for position in range(1, context.rule.size + 1)]


def shown(context: RoundContext, dealt: pb.DealtShares) -> dict[int, pb.DealtShare]:
    """What members are shown of a dealing that `check_dealt` accepted, by position, without the dealing itself."""
    paths = merkle.paths(share_leaves(context, dealt.shares))
    return {s.position: pb.DealtShare(share=s, path=paths[s.position - 1]) for s in dealt.shares}


def shown_to(context: RoundContext, dealt: pb.DealtShares, position: int) -> pb.DealtShare | None:
    """What the member at a position is shown of such a dealing; None if it has no share."""
    part = shown(context, dealt).get(position)
    if part is not None:
        part.dealing.CopyFrom(dealt.dealing)
    return part


def refused(message: str) -> DomainError:
    """The refusal of a dealing."""
    return DomainError(Reason.DEALING_REFUSED, f"dealing: {message}")
