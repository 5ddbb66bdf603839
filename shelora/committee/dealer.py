"""A client's part in one attempt: it encrypts its update under a fresh secret and deals the secret to the committee."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shelora.additive.sampler import Csprng
from shelora.additive.secret import Encryption, SecretKey
from shelora.committee import merkle
from shelora.committee.context import RoundContext
from shelora.committee.dealing import COMBINATIONS, share_leaves, update_digest
from shelora.committee.field import PRIME, Int64Array, encode_values, uniform
from shelora.committee.keys import KeySet
from shelora.committee.proof import multipliers, prove
from shelora.committee.sealing import new_exchange_key, seal_share
from shelora.committee.shamir import PackedSharing
from shelora.committee.statements import Signer, StatementKind
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb


class Dealer:
    """Encrypts one update and deals its secret, each once.

    A dealt update is spent: another attempt deals another one, unless both have the same committee, which certifies
    one set for the round's number.
    """

    def __init__(self, context: RoundContext, keys: KeySet, signer: Signer, rng: Csprng) -> None:
        """Draws the secret. Args: rng: the source of all randomness, `Csprng.fresh()` outside tests.

        Raises: DomainError(NOT_IN_COHORT): the signer was not asked.
        """
        context.bits(frozenset({signer.name}))
        self.context = context
        self._keys = keys
        self._signer = signer
        self._rng = rng
        self._sharing = PackedSharing(context.rule)
        self._secret: SecretKey | None = SecretKey.draw(context.parameters, rng)
        self.encryption: Encryption = self._secret.encryption(context.digest, context.most_contributors, rng)
        """Encrypts the update's shards, in order."""

    def deal(self, shard_digests: Sequence[bytes], weight: int) -> pb.DealtShares:
        """The signed dealing and the sealed shares, once; the secret is forgotten.

        Args:
            shard_digests: SHA-256 of every uploaded shard, in order.
            weight: Weight of the update in the sum, 1 to `most_weight`.

        Raises: DomainError: INVALID_ARGUMENT: weight; SECRET_UNAVAILABLE: a second call; COMMITTEE_REFUSED: a member's
            key is not a point of the curve that could be used.
        """
        context = self.context
        if not 1 <= weight <= context.most_weight:
            raise DomainError(Reason.INVALID_ARGUMENT, f"weight must be 1 to {context.most_weight}")
        if self._secret is None:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "this secret was dealt; a new attempt draws another")
        secret, self._secret = self._secret, None
        polynomials = _polynomials(self._sharing, secret.coefficients, self._rng)
        ephemeral = new_exchange_key(self._rng)
        shares = self._sealed(polynomials, ephemeral)
        dealing = pb.Dealing(
            update_digest=update_digest(shard_digests),
            weight=weight,
            ephemeral_key=ephemeral.public_key().public_bytes_raw(),
            keys_digest=self._keys.digest,
            shares_root=merkle.root(share_leaves(context, shares)),
        )
        proof = prove(polynomials, multipliers(context, self._signer.name, dealing))
        dealing.proof = encode_values(proof.reshape(-1))
        statement = self._signer.sign(
            StatementKind.DEALING, context, dealing.SerializeToString(deterministic=True)
        )
        return pb.DealtShares(dealing=statement, shares=shares)

    def _sealed(self, polynomials: Int64Array, ephemeral: X25519PrivateKey) -> list[pb.SealedShare]:
        """One share a member, by increasing position."""
        positions = sorted(self._keys.keys)
        sealed = []
        for position, share in zip(positions, self._sharing.shares(polynomials, positions), strict=True):
            key, content = self._keys.keys[position], encode_values(share)
            box = seal_share(self.context, self._signer.name, position, ephemeral, key, content)
            sealed.append(pb.SealedShare(position=position, sealed=box))
        return sealed

    def __repr__(self) -> str:
        return f"Dealer({self.context.round_id}, {self._signer.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a dealer is not pickled or copied")


def _polynomials(sharing: PackedSharing, secret: Int64Array, rng: Csprng) -> Int64Array:
    """Polynomials of the secret, then the masks of the proof: [T + l, N / l + 8]."""
    masks = uniform(rng, COMBINATIONS * sharing.rule.packing)
    return sharing.polynomials(np.concatenate([secret % PRIME, masks]), rng)
