"""The certificate: one set of contributors that a quorum of the committee signed, for one round number."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from shelora.committee.context import DIGEST_BYTES, Committee, RoundContext
from shelora.committee.dealing import dealings_digest
from shelora.committee.statements import StatementKind, Trust, parsed, signed_bytes
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

MOST_OVER_MEAN: Final = 4
"""Largest `most_weight` over the mean weight of a set. With a whole honest cohort it is at most 2 (no weight is above
2/K of the sum); members that stay away may double it, and so may half of the others that weigh next to
nothing. Agents hold sets to it, so no server can let one update weigh more than 4/n of n."""


@dataclass(frozen=True, kw_only=True)
class ContributorSet:
    """The one set of updates that a round number opens, as its bytes say."""

    contributors: tuple[str, ...]
    """Sorted, at least `min_updates`."""
    dealings_digest: bytes
    total_weight: int
    content: bytes
    """What members sign."""
    digest: bytes
    """SHA-256 over the context and the content: what a member notes, what answers are sealed to."""

    @classmethod
    def of(cls, context: RoundContext, dealings: Mapping[str, tuple[bytes, int]]) -> "ContributorSet":
        """The set of these dealings: name to (`dealing_digest`, weight).

        Raises: DomainError: NOT_IN_COHORT; SET_REFUSED: fewer than `min_updates`.
        """
        message = pb.ContributorSet(
            contributors=context.bits(frozenset(dealings)),
            dealings_digest=dealings_digest([(name, digest) for name, (digest, _) in dealings.items()]),
            total_weight=sum(weight for _, weight in dealings.values()),
        )
        return cls.read(context, message.SerializeToString(deterministic=True))

    @classmethod
    def read(cls, context: RoundContext, content: bytes) -> "ContributorSet":
        """Reads untrusted bytes.

        Raises: DomainError(SET_REFUSED): malformed, fewer than `min_updates`, or one of them could outweigh the others.
        """
        try:
            message = parsed(pb.ContributorSet, content)
            names = context.names(message.contributors)
        except DomainError as error:
            raise _refused(error.message) from None
        if len(names) < context.min_updates:
            raise _refused(f"it names {len(names)} updates and {context.min_updates} are needed")
        if len(message.dealings_digest) != DIGEST_BYTES:
            raise _refused(f"dealings_digest must have {DIGEST_BYTES} bytes")
        if not len(names) <= message.total_weight <= len(names) * context.most_weight:
            raise _refused("total_weight is not the sum of that many weights")
        if context.most_weight * len(names) > MOST_OVER_MEAN * message.total_weight:
            raise _refused(
                f"its {len(names)} updates weigh {message.total_weight} together, so that one that weighs "
                f"{context.most_weight} would outweigh the others"
            )
        return cls(
            contributors=names,
            dealings_digest=message.dealings_digest,
            total_weight=message.total_weight,
            content=content,
            digest=sha256(signed_bytes(StatementKind.SET, context, content)).digest(),
        )


def assemble(context: RoundContext, statements: Collection[pb.Signed]) -> pb.Certificate | None:
    """A certificate from members' statements of a set, if a quorum made one of the same content; else None.

    For servers: authors must have been verified and be different members.
    """
    by_content: dict[bytes, list[pb.Signed]] = {}
    for statement in statements:
        by_content.setdefault(statement.content, []).append(statement)
    for content, same in sorted(by_content.items()):
        if len(same) >= context.rule.quorum:
            signatures = [pb.SetSignature(signature=s.signature, certificate=s.certificate) for s in same]
            return pb.Certificate(content=content, signatures=signatures)
    return None


def verified_set(
    context: RoundContext, committee: Committee, certificate: pb.Certificate, trust: Trust
) -> ContributorSet:
    """The set that a certificate certifies. A signature that does not verify counts for nothing.

    Raises: DomainError: SET_REFUSED; QUORUM_MISSING: fewer members than a quorum signed it; the message says what was
        wrong with another signature.
    """
    if len(certificate.signatures) > context.rule.size:
        raise _refused("its certificate has more signatures than the committee has members")
    signed, why = set[str](), ""
    for s in certificate.signatures:
        statement = pb.Signed(content=certificate.content, signature=s.signature, certificate=s.certificate)
        try:
            signed.add(trust.author(statement, StatementKind.SET, context))
        except DomainError as error:
            why = f"; {error.message}"
    signed &= set(committee.members)
    if len(signed) < context.rule.quorum:
        wanted = f"{len(signed)} members of the committee certify the set and {context.rule.quorum} must"
        raise DomainError(Reason.QUORUM_MISSING, wanted + why)
    return ContributorSet.read(context, certificate.content)


def _refused(message: str) -> DomainError:
    return DomainError(Reason.SET_REFUSED, f"the set of contributors: {message}")
