"""The context of a round: all that its statements are about, as a checked value with one digest."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final

from shelora.additive.parameters import MAX_CONTRIBUTORS, AdditiveParameters, profile
from shelora.committee.rules import SMALLEST_COHORT, CommitteeRule, committee_rule, ordered
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

DIGEST_BYTES: Final = 32
MAX_WEIGHT: Final = 2**31 - 1

_DOMAIN: Final = b"shelora/committee/v1/context"
_DECIDERS_DOMAIN: Final = b"shelora/committee/v1/deciders"
_ORDER_DOMAIN: Final = b"shelora/committee/v1/order"
_RESULT_DOMAIN: Final = b"shelora/committee/v1/result"
COMMON_START: Final = bytes(DIGEST_BYTES)
"""In place of `result_digest`, for rounds that start from no result."""
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KIND: Final = re.compile(r"[A-Z]{1,16}")


@dataclass(frozen=True, kw_only=True)
class RoundContext:
    """What a round of complete protection is about; the fields are those of the message RoundContext.

    Raises: DomainError(INVALID_ARGUMENT), naming the field.
    """

    federation_id: str
    instance: str
    round_id: str
    kind: str
    round_number: int
    attempt: int
    epoch: int
    layout_digest: bytes
    parameters: AdditiveParameters
    cohort: tuple[str, ...]
    most_contributors: int
    rule: CommitteeRule
    min_updates: int
    most_weight: int
    start: bytes = COMMON_START

    def __post_init__(self) -> None:
        for field in ("federation_id", "instance"):
            _require(
                bool(_NAME.fullmatch(getattr(self, field))), f"{field} must be 1 to 64 of [A-Za-z0-9._-]"
            )
        _require(1 <= len(self.round_id) <= 256, "round_id must have 1 to 256 characters")
        _require(bool(_KIND.fullmatch(self.kind)), "kind must be 1 to 16 capital letters")
        for field in ("round_number", "attempt", "epoch"):
            _require(1 <= getattr(self, field) < 2**32, f"{field} must be 1 to 2^32 - 1")
        for field in ("layout_digest", "start"):
            _require(len(getattr(self, field)) == DIGEST_BYTES, f"{field} must have 32 bytes")
        self._check_cohort()
        size, most = len(self.cohort), self.most_contributors
        _require(size <= most <= MAX_CONTRIBUTORS, "most_contributors must hold the cohort")
        _require(self.rule.size <= size, "the committee is larger than the cohort")
        least = committee_rule(size).threshold
        _require(
            self.rule.threshold >= least, f"the committee of {size} clients must tolerate {least} of them"
        )
        _require(self.parameters.degree % self.rule.packing == 0, "packing must divide the degree")
        _require(2 <= self.min_updates <= size, "min_updates must be 2 to the size of the cohort")
        _require(1 <= self.most_weight <= MAX_WEIGHT, "most_weight must be 1 to 2^31 - 1")
        self.parameters.scale(most)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes: every field behind its length, in the order of the message."""
        rule = self.rule
        texts = (self.federation_id, self.instance, self.round_id, self.kind)
        numbers = (self.round_number, self.attempt, self.epoch)
        limits = (
            self.most_contributors,
            rule.size,
            rule.threshold,
            rule.packing,
            self.min_updates,
            self.most_weight,
        )
        return joined_digest(
            _DOMAIN,
            *(text.encode() for text in texts),
            *map(_number, numbers),
            self.layout_digest,
            self.parameters.digest,
            _number(len(self.cohort)),
            *(name.encode() for name in self.cohort),
            *map(_number, limits),
            self.start,
        )

    @property
    def shares(self) -> int:
        """Values of a share without its masks, N / l."""
        return self.parameters.degree // self.rule.packing

    def committee(self, order_key: bytes) -> "Committee":
        """Who sits on the committee. Args: order_key: from the epoch's secret, `Obfuscation.committee_key`.

        It depends on the round's number and cohort, not on the attempt: attempts with one cohort have one committee.
        """
        subject = joined_digest(
            _ORDER_DOMAIN, self.instance.encode(), self.kind.encode(), _number(self.round_number)
        )
        return Committee(ordered(order_key, subject, self.cohort, self.rule.size))

    def deciders(self, committee: "Committee") -> bytes:
        """SHA-256 over what decides which set is opened: the number, the rule and the committee, not the attempt.

        An update that was dealt may be dealt again only under a context with the same deciders: they certify one set.
        Otherwise two sums may be opened that differ by one client, and their difference is that client's update.
        """
        rule = self.rule
        return joined_digest(
            _DECIDERS_DOMAIN,
            *(text.encode() for text in (self.federation_id, self.instance, self.kind)),
            *map(_number, (self.epoch, self.round_number, rule.size, rule.threshold, rule.packing)),
            *(name.encode() for name in committee.members),
        )

    def names(self, bits: bytes) -> tuple[str, ...]:
        """The clients of the cohort that bits name. Raises: DomainError(INVALID_ARGUMENT): not bits over the cohort."""
        size = len(self.cohort)
        value = int.from_bytes(bits, "little")
        _require(len(bits) == -(-size // 8) and value < 1 << size, "a set of clients has one bit a client")
        return tuple(name for index, name in enumerate(self.cohort) if value >> index & 1)

    def bits(self, names: frozenset[str]) -> bytes:
        """What `names` reads. Raises: DomainError(NOT_IN_COHORT)."""
        if not names <= self._members:
            raise DomainError(
                Reason.NOT_IN_COHORT, "a client that the round did not ask is not a contributor"
            )
        value = sum(1 << index for index, name in enumerate(self.cohort) if name in names)
        return value.to_bytes(-(-len(self.cohort) // 8), "little")

    @cached_property
    def _members(self) -> frozenset[str]:
        return frozenset(self.cohort)

    def _check_cohort(self) -> None:
        size = len(self.cohort)
        _require(
            SMALLEST_COHORT <= size <= MAX_CONTRIBUTORS, f"cohort must have 2 to {MAX_CONTRIBUTORS} clients"
        )
        _require(all(map(_NAME.fullmatch, self.cohort)), "cohort: names must be 1 to 64 of [A-Za-z0-9._-]")
        increasing = all(a < b for a, b in zip(self.cohort, self.cohort[1:], strict=False))
        _require(increasing, "cohort must be sorted, without repeats")

    def to_proto(self) -> pb.RoundContext:
        return pb.RoundContext(
            federation_id=self.federation_id,
            instance=self.instance,
            round_id=self.round_id,
            kind=self.kind,
            round_number=self.round_number,
            attempt=self.attempt,
            epoch=self.epoch,
            layout_digest=self.layout_digest,
            parameters=self.parameters.name,
            cohort=self.cohort,
            most_contributors=self.most_contributors,
            committee_size=self.rule.size,
            threshold=self.rule.threshold,
            packing=self.rule.packing,
            min_updates=self.min_updates,
            most_weight=self.most_weight,
            start=self.start,
        )

    @classmethod
    def from_proto(cls, message: pb.RoundContext, *, insecure: bool = False) -> "RoundContext":
        """Reads an untrusted message.

        What the federation promised (`min_updates`, `most_weight`, profile, layout) is the caller's to compare.

        Args: insecure: Whether a profile for tests is taken.
        Raises: DomainError(INVALID_ARGUMENT), naming the field.
        """
        parameters = profile(message.parameters)
        _require(parameters.secure or insecure, "parameters: this profile is for tests only")
        _require(len(message.cohort) <= MAX_CONTRIBUTORS, f"cohort must have 2 to {MAX_CONTRIBUTORS} clients")
        return cls(
            federation_id=message.federation_id,
            instance=message.instance,
            round_id=message.round_id,
            kind=message.kind,
            round_number=message.round_number,
            attempt=message.attempt,
            epoch=message.epoch,
            layout_digest=message.layout_digest,
            parameters=parameters,
            cohort=tuple(message.cohort),
            most_contributors=message.most_contributors,
            rule=CommitteeRule(message.committee_size, message.threshold, message.packing),
            min_updates=message.min_updates,
            most_weight=message.most_weight,
            start=message.start,
        )


@dataclass(frozen=True)
class Committee:
    """The members in their order."""

    members: tuple[str, ...]

    def position(self, name: str) -> int | None:
        """Position of a client, 1 to m; None if it is not a member."""
        return self.members.index(name) + 1 if name in self.members else None

    def name(self, position: int) -> str | None:
        """The client at a position; None if there is no such position."""
        return self.members[position - 1] if 1 <= position <= len(self.members) else None


def result_digest(round_id: str, shards: Iterable[bytes]) -> bytes:
    """What names a published result as the start of a round, 32 bytes. Args: shards: SHA-256 of each, in order."""
    return joined_digest(_RESULT_DOMAIN, round_id.encode(), *shards)


def joined_digest(*parts: bytes) -> bytes:
    """SHA-256 over parts, each behind its length, so that no two lists of parts have one digest."""
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, f"round context: {message}")
