"""The keys of a round's committee, as every client must have them to deal."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shelora.committee.context import Committee, RoundContext, joined_digest
from shelora.committee.statements import StatementKind, Trust, parsed
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

KEY_BYTES: Final = 32
_DOMAIN: Final = b"shelora/committee/v1/keys"


@dataclass(frozen=True)
class KeySet:
    """Public keys of the members that posted one, by position; at least a quorum."""

    keys: Mapping[int, bytes]
    digest: bytes
    """As `keys_digest` returns it."""

    @classmethod
    def of(
        cls, context: RoundContext, committee: Committee, statements: Iterable[pb.Signed], trust: Trust
    ) -> "KeySet":
        """The keys among statements that are the committee's.

        Statements of clients that are not members, or malformed, are left out; so is a member with two keys.

        Raises: DomainError(COMMITTEE_REFUSED): fewer than a quorum are left; the message names the missing, and what is
            wrong with the key of one of them.
        """
        found: dict[int, set[bytes]] = {}
        why = ""
        for statement in statements:
            try:
                position, key = _entry(context, committee, statement, trust)
            except DomainError as error:
                why = f"; {error.message}"
            else:
                found.setdefault(position, set()).add(key)
        keys = {
            position: next(iter(found[position])) for position in sorted(found) if len(found[position]) == 1
        }
        if len(keys) < context.rule.quorum:
            missing = ", ".join(n for p, n in enumerate(committee.members, 1) if p not in keys)
            wanted = f"{len(keys)} members of the committee have a key and {context.rule.quorum} must"
            raise DomainError(Reason.COMMITTEE_REFUSED, f"{wanted}; without: {missing}{why}")
        return cls(MappingProxyType(keys), keys_digest(context, keys))


def keys_digest(context: RoundContext, keys: Mapping[int, bytes]) -> bytes:
    """SHA-256 over context, positions and keys, 32 bytes: dealers with different keys have different ones."""
    parts = (part for position in sorted(keys) for part in (bytes([position]), keys[position]))
    return joined_digest(_DOMAIN, context.digest, *parts)


def _entry(
    context: RoundContext, committee: Committee, statement: pb.Signed, trust: Trust
) -> tuple[int, bytes]:
    """Position and key. Raises: DomainError: it counts for nothing."""
    author = trust.author(statement, StatementKind.COMMITTEE_KEY, context)
    message = parsed(pb.CommitteeKey, statement.content)
    if len(message.public_key) != KEY_BYTES or committee.name(message.position) != author:
        raise DomainError(
            Reason.COMMITTEE_REFUSED, f"the key of {author} is not that of a member at its position"
        )
    return message.position, message.public_key
