"""A committee member's part in one attempt: key, checks, one certified set, one answer; then it forgets.

The order of calls is key, receive (any number), check, certify, release. What is returned once is returned again as
the same bytes. All is kept in memory only, but for the note of the certified set: a member that restarts sits the
attempt out.
"""

from collections.abc import Collection
from typing import NoReturn, Protocol

import numpy as np

from shelora.additive.sampler import Csprng
from shelora.committee.certificate import ContributorSet, verified_set
from shelora.committee.context import Committee, RoundContext
from shelora.committee.dealing import refused
from shelora.committee.field import PRIME, encode_values
from shelora.committee.holding import HeldShare, Inspector
from shelora.committee.keys import KeySet
from shelora.committee.sealing import new_exchange_key, seal_answer
from shelora.committee.statements import Signer, StatementKind, Trust
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb


class CertifiedSets(Protocol):
    """Where a member notes which set it certified for a round number. Outlives restarts of the process."""

    def certified(self, instance: str, kind: str, round_number: int) -> bytes | None:
        """Digest of the set that was noted for the number; None if there is none."""

    def note(self, instance: str, kind: str, round_number: int, set_digest: bytes) -> None:
        """Notes a set; it is on disk when this returns. Never replaces another one."""


class Member:
    """One member in one attempt. No `repr` of what it holds, no pickle."""

    def __init__(
        self,
        context: RoundContext,
        committee: Committee,
        signer: Signer,
        trust: Trust,
        notes: CertifiedSets,
        answer_key: bytes,
        rng: Csprng,
    ) -> None:
        """Draws the member's key of this attempt.

        Args:
            context: Of the attempt, as this client computed it from its assignment.
            committee: As this client computed it, never as a server says.
            signer: Signs for this client.
            trust: Verifies dealers' and members' statements.
            notes: Where certified sets are noted.
            answer_key: From the epoch's secret, 32 bytes: `Obfuscation.answer_key`.
            rng: Source of key and nonce, `Csprng.fresh()` outside tests.

        Raises: DomainError(COMMITTEE_REFUSED): the signer is not a member.
        """
        position = committee.position(signer.name)
        if position is None:
            raise DomainError(Reason.COMMITTEE_REFUSED, f"{signer.name} is not a member of this committee")
        self.context = context
        self.position = position
        self._committee = committee
        self._signer = signer
        self._trust = trust
        self._notes = notes
        self._answer_key = answer_key
        self._rng = rng
        private = new_exchange_key(rng)
        self._inspector: Inspector | None = Inspector(context, position, private, trust)
        self._held: dict[str, HeldShare] = {}
        self._refused: set[str] = set()
        self._check: pb.Signed | None = None
        self._certified: tuple[frozenset[str], pb.Signed] | None = None
        self._answer: tuple[bytes, pb.Signed] | None = None
        message = pb.CommitteeKey(position=position, public_key=private.public_key().public_bytes_raw())
        self.key: pb.Signed = self._sign(StatementKind.COMMITTEE_KEY, message)
        """The statement of this member's key."""

    def receive(self, dealer: str, dealt: pb.DealtShare, keys: KeySet) -> DomainError | None:
        """Checks one dealing and keeps its share. Returns why it is refused; a dealer once refused stays so.

        Raises: DomainError(SECRET_UNAVAILABLE): after `check`, `certify`, `release` or `forget`: the list of dealings
            is closed.
        """
        if self._check is not None or self._inspector is None:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "this member has closed its list of dealings")
        try:
            held = self._inspector.held(dealer, dealt, keys)
            if dealer in self._held and self._held[dealer].digest != held.digest:
                raise refused(f"{dealer} made two")
        except DomainError as error:
            self._held.pop(dealer, None)
            self._refused.add(dealer)
            return error
        if dealer not in self._refused:
            self._held[dealer] = held
        return None

    def check(self) -> pb.Signed:
        """The signed Check; it closes the list of dealings."""
        if self._check is None:
            message = pb.Check(
                position=self.position,
                held=self.context.bits(frozenset(self._held)),
                refused=self.context.bits(frozenset(self._refused) & frozenset(self.context.cohort)),
            )
            self._check = self._sign(StatementKind.CHECK, message)
        return self._check

    def certify(self, contributors: Collection[str]) -> pb.Signed:
        """Signs the set of these contributors' dealings, the one set of this round number, once it is noted.

        Raises: DomainError: SET_REFUSED: fewer than `min_updates`, or no sound share of one is held; ROUND_SPENT:
            another set was certified for this number, in whichever attempt.
        """
        self.check()
        names = frozenset(contributors)
        if self._certified is None or self._certified[0] != names:
            chosen = self._set_of(names)
            self._note(chosen)
            self._certified = (names, self._signer.sign(StatementKind.SET, self.context, chosen.content))
        return self._certified[1]

    def release(self, certificate: pb.Certificate) -> pb.Signed:
        """The sum of the shares of the certified set, sealed and signed. Key and shares are forgotten.

        Raises: DomainError: as `verified_set`; ROUND_SPENT: this number has another set; SET_REFUSED: a share of the
            set is not held, or dealings differ from the ones that were certified.
        """
        chosen = verified_set(self.context, self._committee, certificate, self._trust)
        if self._answer is None:
            self._answer = (chosen.digest, self._answered(chosen))
            self.forget()
        digest, answer = self._answer
        if digest != chosen.digest:
            raise _spent(self.context)
        return answer

    def forget(self) -> None:
        """Drops key and shares, as `release` does: for attempts that were abandoned."""
        self.check()
        self._inspector = None
        self._held.clear()

    def _answered(self, chosen: ContributorSet) -> pb.Signed:
        if self._set_of(chosen.contributors).digest != chosen.digest:
            raise DomainError(Reason.SET_REFUSED, "the certified dealings are not the ones this member holds")
        self._note(chosen)
        total = np.zeros(self.context.shares, dtype=np.int64)
        for name in chosen.contributors:
            total += self._held[name].share
        content = encode_values(total % PRIME)
        sealed = seal_answer(self._answer_key, chosen.digest, self.position, content, self._rng)
        return self._sign(StatementKind.ANSWER, pb.Answer(position=self.position, sealed=sealed))

    def _set_of(self, contributors: Collection[str]) -> ContributorSet:
        """The set of the dealings held of these clients. Raises: DomainError(SET_REFUSED)."""
        missing = sorted(set(contributors) - self._held.keys())
        if missing:
            raise DomainError(Reason.SET_REFUSED, f"no sound share is held of {', '.join(missing)}")
        dealings = {name: (self._held[name].digest, self._held[name].weight) for name in contributors}
        return ContributorSet.of(self.context, dealings)

    def _note(self, chosen: ContributorSet) -> None:
        context = self.context
        place = (context.instance, context.kind, context.round_number)
        noted = self._notes.certified(*place)
        if noted is None:
            self._notes.note(*place, chosen.digest)
        elif noted != chosen.digest:
            raise _spent(context)

    def _sign(self, kind: StatementKind, message: pb.CommitteeKey | pb.Check | pb.Answer) -> pb.Signed:
        return self._signer.sign(kind, self.context, message.SerializeToString(deterministic=True))

    def __repr__(self) -> str:
        return f"Member({self.context.round_id}, position {self.position})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a member is not pickled or copied")


def _spent(context: RoundContext) -> DomainError:
    return DomainError(
        Reason.ROUND_SPENT,
        f"another set was certified for round {context.round_number}; a new round number and new updates are needed",
    )
