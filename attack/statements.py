"""What the committee of a round states and is dealt, as the coordinator stores it: does it say more than it must?

Shares are sealed to members, answers to all clients. What is looked for: shares that can be read as they are, key
material that occurs twice, and statements with room for anything else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from google.protobuf.message import Message

from attack.capture import commands
from attack.stage import Performance
from attack.told import Told, told
from coordinator.statements import key_of
from shelora.committee.context import RoundContext
from shelora.committee.dealing import COMBINATIONS
from shelora.committee.field import decode_values
from shelora.committee.proof import fits, multipliers
from shelora.committee.sealing import NONCE_BYTES, TAG_BYTES
from shelora.committee.shamir import PackedSharing
from shelora.v1 import committee_pb2 as pb
from shelora.v1 import coordinator_pb2

LEFT: Final = b"left"
"""All that a member says that leaves its committee."""
_VALUE_BYTES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Shares, 0 to 1."""

    readable: float
    """Of the shares dealt, those whose stored bytes are the member's share itself."""
    repeated: float
    """Of the keys and nonces, those that occur more than once."""
    surplus: float
    """Of the statements, those of other lengths than they must have: there is room for something else."""
    shares: int
    keys: int
    statements: int


def exposure(performance: Performance) -> Exposure | None:
    """Over all rounds whose sum was opened; None if there is none."""
    rounds = contexts(performance.beside)
    of = [one for one in told(performance) if one.sequence in rounds and one.place.startswith("committee:")]
    if not of:
        return None
    dealings = {(o.sequence, o.client): pb.Dealing.FromString(_content(o)) for o in of if _is(o, "dealings")}
    shares = [
        _readable(rounds[o.sequence], o.client, dealings[o.sequence, o.client], share)
        for o in of
        if _is(o, "shares") and o.content
        for share in [pb.DealtShare.FromString(o.content).share]
    ]
    keys = Counter(_key_material(of, list(dealings.values())))
    surplus = [_has_surplus(rounds[o.sequence], o) for o in of if o.content]
    return Exposure(
        readable=sum(shares) / max(len(shares), 1),
        repeated=sum(n for n in keys.values() if n > 1) / keys.total(),
        surplus=sum(surplus) / len(surplus),
        shares=len(shares),
        keys=keys.total(),
        statements=len(surplus),
    )


def contexts(beside: bytes) -> Mapping[int, RoundContext]:
    """By sequence, what is signed over in the rounds whose sum was opened: everyone who opens it has it."""
    found: dict[int, RoundContext] = {}
    for command in commands(beside):
        if command[0].upper() == b"SET" and b"}:opening:" in command[1]:
            opening = coordinator_pb2.GetOpeningResponse.FromString(command[2])
            context = RoundContext.from_proto(opening.context, insecure=True)
            found[int(context.round_id.rpartition(".")[2])] = context
    return found


def _is(one: Told, kind: str) -> bool:
    return one.place.removeprefix("committee:").split(":")[0] == kind


def _content(one: Told) -> bytes:
    """What was signed."""
    return pb.Signed.FromString(one.content).content


def _readable(context: RoundContext, dealer: str, dealing: pb.Dealing, share: pb.SealedShare) -> bool:
    """Whether the stored bytes, read as values, fit the dealer's proof."""
    values = context.shares + COMBINATIONS
    read = decode_values(share.sealed[: _VALUE_BYTES * values], values)
    needed = context.rule.needed
    proof = decode_values(dealing.proof, COMBINATIONS * needed)
    if read is None or proof is None:
        return False
    sharing, scalars = PackedSharing(context.rule), multipliers(context, dealer, dealing)
    return fits(sharing, share.position, read, scalars, proof.reshape(needed, COMBINATIONS))


def _key_material(of: Sequence[Told], dealings: Sequence[pb.Dealing]) -> Iterator[bytes]:
    """Public keys that shares are sealed with and to, nonces of answers, and sealed boxes whole."""
    for dealing in dealings:
        yield dealing.ephemeral_key
    for one in of:
        if _is(one, "views") and (key := key_of(one.content)):
            yield pb.CommitteeKey.FromString(key.content).public_key
        elif _is(one, "answers"):
            yield pb.Answer.FromString(_content(one)).sealed[:NONCE_BYTES]
        elif _is(one, "shares") and one.content:
            yield pb.DealtShare.FromString(one.content).share.sealed


def _has_surplus(context: RoundContext, one: Told) -> bool:
    """Whether a statement has another length than what it must say."""
    kind = one.place.split(":")[1]
    if kind == "departures":
        return one.content != LEFT
    if kind == "shares":
        dealt = pb.DealtShare.FromString(one.content)
        content = dealt.share.SerializeToString()
        if dealt.further or dealt.HasField("dealing"):
            return True
    elif kind == "views":
        content = key.content if (key := key_of(one.content)) else b""
    else:
        content = _content(one)
    return bool(content) and _odd(content, *_lengths(context)[kind])


def _lengths(context: RoundContext) -> dict[str, tuple[type[Message], dict[str, int]]]:
    """By kind of statement its message, and the bytes of its fields of bytes."""
    bits, share = ceil(len(context.cohort) / 8), _VALUE_BYTES * context.shares
    masks = _VALUE_BYTES * COMBINATIONS
    digests = dict.fromkeys(("update_digest", "ephemeral_key", "keys_digest", "shares_root"), 32)
    return {
        "views": (pb.CommitteeKey, {"public_key": 32}),
        "checks": (pb.Check, {"held": bits, "refused": bits}),
        "signatures": (pb.ContributorSet, {"contributors": bits, "dealings_digest": 32}),
        "answers": (pb.Answer, {"sealed": NONCE_BYTES + share + TAG_BYTES}),
        "dealings": (pb.Dealing, digests | {"proof": masks * context.rule.needed}),
        "shares": (pb.SealedShare, {"sealed": share + masks + TAG_BYTES}),
    }


def _odd(content: bytes, kind: type[Message], lengths: Mapping[str, int]) -> bool:
    """Whether a field of bytes has another length than it must, or there are fields that nobody knows."""
    read = kind.FromString(content)
    if any(len(getattr(read, name)) != length for name, length in lengths.items()):
        return True
    whole = read.ByteSize()
    read.DiscardUnknownFields()
    return read.ByteSize() < whole
