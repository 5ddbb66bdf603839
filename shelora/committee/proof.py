"""The proof that shares lie on polynomials of degree below T + l, checked by each member alone.

The dealer deals 8 random masking polynomials beside those of its secret, commits to all sealed shares, and publishes
8 combinations: masks plus random multiples of the others, with multipliers hashed from the commitment. Members whose
shares fit them hold values of polynomials of that degree, but for a chance a try of C(m - T, T + l + 1) 65521^-8, which
is at most 2^-108 (docs/committee.md); the masks hide the rest.
(Atapoor, Baghery, Cozzo, Pedersen: VSS from Distributed ZK Proofs, ASIACRYPT 2023, eprint 2023/992, for batches.)
"""

from typing import Final

import numpy as np

from shelora.additive.sampler import Csprng
from shelora.committee.context import RoundContext, joined_digest
from shelora.committee.dealing import COMBINATIONS
from shelora.committee.field import PRIME, Int64Array, interpolation, uniform
from shelora.committee.shamir import PackedSharing
from shelora.v1 import committee_pb2 as pb

_DOMAIN: Final = b"shelora/committee/v1/proof"


def multipliers(context: RoundContext, dealer: str, dealing: pb.Dealing) -> Int64Array:
    """The multipliers [N / l, 8] that a dealing's commitments fix; its proof is left out."""
    seed = joined_digest(
        _DOMAIN,
        context.digest,
        dealer.encode(),
        dealing.update_digest,
        dealing.weight.to_bytes(4, "little"),
        dealing.ephemeral_key,
        dealing.keys_digest,
        dealing.shares_root,
    )
    return uniform(Csprng(seed), context.shares, COMBINATIONS)


def prove(polynomials: Int64Array, scalars: Int64Array) -> Int64Array:
    """The combinations, [T + l, 8], from values at the base points [T + l, N / l + 8], masks last."""
    return (polynomials[:, :-COMBINATIONS] @ scalars + polynomials[:, -COMBINATIONS:]) % PRIME


def fits(
    sharing: PackedSharing, position: int, share: Int64Array, scalars: Int64Array, proof: Int64Array
) -> bool:
    """Whether a share [N / l + 8] is one of the proven polynomials'. Args: proof: [T + l, 8]."""
    combined = (share[:-COMBINATIONS] @ scalars + share[-COMBINATIONS:]) % PRIME
    expected = interpolation(sharing.base_points, (position,)) @ proof % PRIME
    return bool(np.array_equal(expected[0], combined))
