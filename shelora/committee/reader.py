"""Opening a round: from certificate and answers to the sum S of the contributors' secrets, with every check there is.

What is left to the sum itself is the guard of `shelora.additive.secret.SumOpener`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import comb
from typing import Final

import numpy as np

from shelora.additive.sampler import Csprng
from shelora.additive.secret import SumOpener, check_secret_sum
from shelora.committee.certificate import ContributorSet, verified_set
from shelora.committee.context import Committee, RoundContext
from shelora.committee.field import Int64Array, decode_values, signed
from shelora.committee.sealing import open_answer
from shelora.committee.shamir import Opened, PackedSharing
from shelora.committee.statements import StatementKind, Trust, parsed
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

_MOST_GUESSES: Final = 100
"""Choices of answers that are tried when they do not fit together: all of committees up to seven."""


@dataclass(frozen=True, kw_only=True)
class OpenedRound:
    """What a client learns before it decrypts the sum."""

    context: RoundContext = field(repr=False)
    contributors: tuple[str, ...]
    """Sorted, at least `min_updates`."""
    total_weight: int
    secret_sum: Int64Array = field(repr=False)
    """S, [N]."""
    liars: tuple[str, ...]
    """Members whose answers were malformed or wrong; the sum is right without them."""

    def sum_opener(self) -> SumOpener:
        """Decrypts the shards of the sum. Values carry their weights, so that no honest sum exceeds these."""
        return SumOpener(
            self.context.parameters,
            self.secret_sum,
            self.context.digest,
            len(self.contributors),
            self.context.most_contributors,
            self.total_weight / self.context.most_weight,
        )


def open_round(
    context: RoundContext,
    committee: Committee,
    opening: pb.Opening,
    answer_key: bytes,
    trust: Trust,
    rng: Csprng,
) -> OpenedRound:
    """Opens S.

    Args:
        context: As this client computed it from its assignment.
        committee: As this client computed it, never as a server says.
        opening: What came with the result.
        answer_key: From the epoch's secret, 32 bytes: `Obfuscation.answer_key`.
        trust: Verifies signatures.
        rng: Source of the random combinations in which liars are looked for.

    Raises: DomainError: as `verified_set`; ANSWERS_REFUSED: too few sound answers, or they do not fit together and
        cannot be told apart; SUM_UNREADABLE: S is larger than any honest sum.
    """
    chosen = verified_set(context, committee, opening.certificate, trust)
    if len(opening.answers) > context.rule.size:
        raise DomainError(Reason.ANSWERS_REFUSED, "more answers than the committee has members")
    found: dict[int, list[Int64Array | None]] = {}
    for statement in _distinct(opening.answers):
        position = _position(context, committee, statement, trust)
        if position is not None:
            found.setdefault(position, []).append(_answer(context, chosen, position, statement, answer_key))
    answers = {p: given[0] for p, given in found.items() if len(given) == 1 and given[0] is not None}
    liars = found.keys() - answers.keys()  # an honest member signs one answer, and a sound one
    positions = sorted(answers)
    stacked = np.array([answers[p] for p in positions], dtype=np.int64).reshape(
        len(positions), context.shares
    )
    opened = _opened(context, chosen, positions, stacked, rng)
    secret_sum = signed(opened.secrets)
    check_secret_sum(context.parameters, secret_sum, len(chosen.contributors))
    return OpenedRound(
        context=context,
        contributors=chosen.contributors,
        total_weight=chosen.total_weight,
        secret_sum=secret_sum,
        liars=tuple(committee.members[p - 1] for p in sorted({*liars, *opened.liars})),
    )


def _opened(
    context: RoundContext, chosen: ContributorSet, positions: list[int], answers: Int64Array, rng: Csprng
) -> Opened:
    """S modulo the prime. In a small committee, liars are also told by an S that no honest sum has.

    Raises: DomainError(ANSWERS_REFUSED).
    """
    sharing = PackedSharing(context.rule)
    try:
        return sharing.open(positions, answers, rng)
    except DomainError:
        if len(positions) <= context.rule.needed or comb(len(positions), context.rule.needed) > _MOST_GUESSES:
            raise
        likely = [
            guess for guess in sharing.guesses(positions, answers) if _is_honest(context, chosen, guess)
        ]
        if len(likely) != 1:  # a liar that knows S can make two that look honest
            raise
        return likely[0]


def _is_honest(context: RoundContext, chosen: ContributorSet, guess: Opened) -> bool:
    try:
        check_secret_sum(context.parameters, signed(guess.secrets), len(chosen.contributors))
    except DomainError:
        return False
    return True


def _distinct(statements: Iterable[pb.Signed]) -> Iterable[pb.Signed]:
    """One statement of each content: a server that repeats an answer makes no liar of its member."""
    return {statement.content: statement for statement in statements}.values()


def _position(context: RoundContext, committee: Committee, statement: pb.Signed, trust: Trust) -> int | None:
    """Position of the member that signed an answer; None if no member did: then it counts for nothing."""
    try:
        return committee.position(trust.author(statement, StatementKind.ANSWER, context))
    except DomainError:
        return None


def _answer(
    context: RoundContext, chosen: ContributorSet, position: int, statement: pb.Signed, answer_key: bytes
) -> Int64Array | None:
    """What a member answered; None if it signed something else than an answer."""
    try:
        sealed = parsed(pb.Answer, statement.content).sealed
        return decode_values(open_answer(answer_key, chosen.digest, position, sealed), context.shares)
    except DomainError:
        return None
