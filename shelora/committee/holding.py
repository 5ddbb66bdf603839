"""What a member holds of a dealing, and all that it checks before it does."""

from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shelora.committee import merkle
from shelora.committee.context import RoundContext
from shelora.committee.dealing import COMBINATIONS, dealing_digest, read_dealing, refused
from shelora.committee.field import decode_values
from shelora.committee.keys import KeySet
from shelora.committee.proof import fits, multipliers
from shelora.committee.sealing import open_share
from shelora.committee.shamir import PackedSharing
from shelora.committee.statements import StatementKind, Trust
from shelora.v1 import committee_pb2 as pb

_MAX_PATH: Final = 6
"""Levels of a tree over 64 shares."""


@dataclass(frozen=True, eq=False, repr=False)
class HeldShare:
    """A sound share, and what identifies its dealing. No `repr`."""

    digest: bytes
    """`dealing_digest` of the dealing."""
    weight: int
    share: npt.NDArray[np.uint16]
    """[N / l], without its masks."""


class Inspector:
    """Opens and checks what a member is shown. Holds the private half of its key."""

    def __init__(self, context: RoundContext, position: int, private: X25519PrivateKey, trust: Trust) -> None:
        self._context = context
        self._position = position
        self._private = private
        self._trust = trust
        self._sharing = PackedSharing(context.rule)

    def held(self, dealer: str, dealt: pb.DealtShare, keys: KeySet) -> HeldShare:
        """The share of one dealer.

        Raises: DomainError: NOT_IN_COHORT; SIGNATURE_REFUSED; DEALING_REFUSED: other committee keys, a share that is
            not this member's or not the signed one, does not open, or does not fit its proof.
        """
        self._context.bits(frozenset({dealer}))
        self._trust.verify(dealt.dealing, StatementKind.DEALING, self._context, dealer)
        dealing = read_dealing(self._context, dealt.dealing.content)
        if dealing.keys_digest != keys.digest:
            raise refused(f"{dealer} dealt to other committee keys")
        self._check_path(dealer, dealing, dealt)
        share = self._share(dealer, dealing, dealt.share.sealed)
        return HeldShare(dealing_digest(dealt.dealing), dealing.weight, share)

    def _check_path(self, dealer: str, dealing: pb.Dealing, dealt: pb.DealtShare) -> None:
        if len(dealt.path) > _MAX_PATH or dealt.share.position != self._position:
            raise refused(f"the share of {dealer} is not for this member")
        leaf = merkle.leaf(self._position, dealt.share.sealed)
        if merkle.root_from(leaf, self._position - 1, dealt.path) != dealing.shares_root:
            raise refused(f"the share of {dealer} is not the one it signed")

    def _share(self, dealer: str, dealing: pb.Dealing, sealed: bytes) -> npt.NDArray[np.uint16]:
        context, rule = self._context, self._context.rule
        content = open_share(context, dealer, self._position, dealing.ephemeral_key, self._private, sealed)
        share = decode_values(content, context.shares + COMBINATIONS)
        proof = decode_values(dealing.proof, COMBINATIONS * rule.needed)
        if share is None or proof is None:
            raise refused(f"the share of {dealer} is malformed")
        scalars = multipliers(context, dealer, dealing)
        if not fits(self._sharing, self._position, share, scalars, proof.reshape(rule.needed, COMBINATIONS)):
            raise refused(f"the share of {dealer} does not fit its proof")
        return share[:-COMBINATIONS].astype(np.uint16)

    def __reduce__(self) -> NoReturn:
        raise TypeError("what holds a private key is not pickled or copied")
