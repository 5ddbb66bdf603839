"""All servers in one hostile hand, with one colluding client, against the members of a round of `complete`.

One round in this process, of the product's own dealers, members and readers, under certificates of its own authority.
The victim's update is what a client of a captured federation trained. Every attack is tried against members that check,
and against the round as it would be without what stops it: the controls, which must give the victim's words away.
"""

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import numpy as np

from attack.experiments import in_sums, setting
from attack.findings import Finding
from attack.public import Public
from attack.stage import Performance
from services.key_authority.ca import Issuer, Root, RootFile
from services.key_authority.sealer import KEY_BYTES, Sealer, SealingKey
from shelora.additive.adder import Adder
from shelora.additive.parameters import DEFAULT
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SumOpener
from shelora.additive.wire import ShardShape, sum_header, summand_planes
from shelora.committee.certificate import assemble
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import shown_to
from shelora.committee.field import PRIME, signed
from shelora.committee.keys import KeySet
from shelora.committee.member import Member
from shelora.committee.reader import open_round
from shelora.committee.rules import committee_rule
from shelora.committee.shamir import PackedSharing
from shelora.committee.statements import Signer, Trust
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.shards import Float64
from shelora.lora.sketches import Sketcher, flat, parted, sketch_sizes
from shelora.obfuscation import Obfuscation
from shelora.transport.certificates import new_key, signing_request, utc_now
from shelora.transport.identity import Identity, Role
from shelora.v1 import committee_pb2 as pb

COHORT: Final = tuple(f"client-{index}" for index in range(5))
VICTIM, SPY = COHORT[0], COHORT[1]
_FEDERATION: Final = "attacked"
MALICIOUS: Final = "malicious servers"
_CONTROL: Final = 0.3
"""Recall that a control must reach: of one sentence after ten steps the attack finds about half."""
_LOSS: Final = 0.02
"""Of the values of the others, beside the victim's."""


@dataclass(slots=True)
class _Notes:
    """As a member's disk keeps them."""

    sets: dict[tuple[str, str, int], bytes] = field(default_factory=dict)

    def certified(self, instance: str, kind: str, round_number: int) -> bytes | None:
        return self.sets.get((instance, kind, round_number))

    def note(self, instance: str, kind: str, round_number: int, set_digest: bytes) -> None:
        self.sets[instance, kind, round_number] = set_digest


class _People:
    """Clients with certificates, the epoch's secret, and notes that outlive a round."""

    def __init__(self, secret: Obfuscation) -> None:
        self.secret, self._root = secret, _root()
        issuer = Issuer(self._root, timedelta(hours=1), utc_now)
        self.signers = {name: self._signer(issuer, name) for name in COHORT}
        self.notes = {name: _Notes() for name in COHORT}
        self.trust = Trust(self._root.der, _FEDERATION, utc_now)

    @staticmethod
    def _signer(issuer: Issuer, name: str) -> Signer:
        key = new_key()
        certificate = issuer.issue(signing_request(key), Identity(Role.CLIENT, _FEDERATION, name))
        return Signer(name, key, certificate)


def _root() -> Root:
    with tempfile.TemporaryDirectory() as folder:
        sealer = Sealer(SealingKey(np.random.default_rng().bytes(KEY_BYTES)))
        return RootFile(Path(folder) / "authority", sealer, "attack").load_or_create()


class _Round:
    """One round, as far as honest clients take it before anything is asked of the committee."""

    def __init__(self, people: _People, values: Float64, number: int = 1, min_updates: int = 3) -> None:
        """Args: values: the victim's, within ±1."""
        self.people = people
        self.context = RoundContext(
            federation_id=_FEDERATION,
            instance="00000001",
            round_id=f"{_FEDERATION}.{number}",
            kind="TRAIN",
            round_number=number,
            attempt=1,
            epoch=1,
            layout_digest=bytes(32),
            parameters=DEFAULT,
            cohort=COHORT,
            most_contributors=len(COHORT),
            rule=committee_rule(len(COHORT)),
            min_updates=min_updates,
            most_weight=1,
        )
        self.committee = self.context.committee(people.secret.committee_key())
        self.shape = ShardShape(DEFAULT, 0, len(values))
        self.members = {name: self._member(name) for name in self.committee.members}
        self.keys = self.keys_of([member.key for member in self.members.values()])
        rng = np.random.default_rng(number)
        self.values = {name: _LOSS * rng.uniform(-1, 1, len(values)) for name in COHORT} | {VICTIM: values}
        self.uploads: dict[str, bytes] = {}
        for name in COHORT:
            self._send(name)

    def _member(self, name: str) -> Member:
        people = self.people
        answer_key = people.secret.answer_key()
        return Member(
            self.context,
            self.committee,
            people.signers[name],
            people.trust,
            people.notes[name],
            answer_key,
            Csprng.fresh(),
        )

    def keys_of(self, statements: Sequence[pb.Signed]) -> KeySet:
        """The committee's keys, as clients take them from what servers show."""
        return KeySet.of(self.context, self.committee, statements, self.people.trust)

    def _send(self, name: str) -> None:
        dealer = Dealer(self.context, self.keys, self.people.signers[name], Csprng.fresh())
        self.uploads[name] = dealer.encryption.encrypt(self.values[name])
        dealt = dealer.deal([hashlib.sha256(self.uploads[name]).digest()], 1)
        for member in self.members.values():
            shown = shown_to(self.context, dealt, member.position)
            if shown is not None and (refusal := member.receive(name, shown, self.keys)) is not None:
                raise refusal

    def certified(self, contributors: Collection[str]) -> tuple[pb.Certificate | None, int]:
        """A certificate of what members sign, and how many refused."""
        signatures = []
        for member in self.members.values():
            try:
                signatures.append(member.certify(contributors))
            except DomainError:
                continue
        return assemble(self.context, signatures), len(self.members) - len(signatures)

    def certificate(self) -> pb.Certificate:
        """That of the whole cohort."""
        certificate, refused = self.certified(COHORT)
        if certificate is None:
            raise DomainError(Reason.INTERNAL, f"{refused} members refuse the set of all, which is sound")
        return certificate

    def opened(self, certificate: pb.Certificate, contributors: Collection[str]) -> Float64:
        """The sum, as every client opens it."""
        answers = [member.release(certificate) for member in self.members.values()]
        opening = pb.Opening(certificate=certificate, answers=answers)
        return self.reader(opening).open(self.total(contributors), self.shape)

    def reader(self, opening: pb.Opening) -> SumOpener:
        """What opens the sum, of a client that is shown this opening."""
        people = self.people
        read = open_round(
            self.context, self.committee, opening, people.secret.answer_key(), people.trust, Csprng.fresh()
        )
        return read.sum_opener()

    def total(self, contributors: Collection[str]) -> bytes:
        """What an honest aggregation makes of those uploads."""
        adder = Adder(self.shape)
        for name in contributors:
            adder.add(self.uploads[name])
        return adder.finish()

    def secret_if_members_answered(self, contributors: Collection[str]) -> np.ndarray:
        """S of any set, of members that answer whatever they are asked: what a certificate keeps them from."""
        members = list(self.members.values())
        held = [member._held for member in members]  # noqa: SLF001 - the check is what is taken away
        shares = np.array([sum(h[n].share.astype(np.int64) for n in contributors) % PRIME for h in held])
        found = PackedSharing(self.context.rule).open([m.position for m in members], shares, Csprng.fresh())
        return signed(found.secrets)

    def unchecked(self, name: str, secret: np.ndarray) -> Float64:
        """One upload, opened under some secret without a look at whether it is the right one."""
        context, planes = self.context, summand_planes(self.uploads[name], self.shape)
        opener = SumOpener(DEFAULT, secret, context.digest, 1, context.most_contributors, np.inf)
        return opener.open(sum_header(self.shape, 1) + bytes(planes), self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Got:
    """What an attack came to."""

    values: Float64
    """The victim's sketches, as far as they were opened."""
    refused: int = 0
    """Members, or clients, that refused."""
    asked: int = 0


def findings(performance: Performance, public: Public, names: Sequence[str]) -> Iterator[Finding]:
    """What every attack finds of the victim's words, and its control.

    Args: performance: a federation whose first client is the victim; names: matrices of the first layer.
    """
    codec = _Codec(performance, public, names)
    for attack, words in _ATTACKS:
        for control in (False, True):
            got = attack(_People(performance.secrets.obfuscation), codec.values, control=control)
            row = in_sums(
                performance,
                public,
                codec.recovered(got.values),
                performance.scene.clients[:1],
                (f"one round of {setting(performance.scene)}", f"all servers and a client: {words[control]}"),
            )
            figures = {"recall": max(row.figures.values())}
            yield replace(
                row,
                attack=MALICIOUS,
                terms=words[0],
                column="control" if control else "members check",
                figures=figures,
                counts=row.counts | {"asked": got.asked, "refused": got.refused},
                error={
                    "recall": (row.chance["recall"] / row.counts["tokens"]) ** 0.5 + 1 / row.counts["tokens"]
                },
                at_least={"recall": _CONTROL} if control else {},
                no_better_than_chance=not control,
            )


class _Codec:
    """Between an update and the values that are encrypted: sketches of some matrices, divided by their largest."""

    def __init__(self, performance: Performance, public: Public, names: Sequence[str]) -> None:
        client, trained = performance.scene.clients[0], performance.insider.trained
        columns, rows = sketch_sizes(client.rank)
        self._terms = SumTerms(profile=DEFAULT.name, sketch_columns=columns, sketch_rows=rows)
        self._matrices = [m for m in public.model.matrices if m.name in names]
        known = performance.secrets.obfuscation
        self._sketchers = [Sketcher.draw(known, self._terms, matrix, 1) for matrix in self._matrices]
        parts = []
        for matrix, sketcher in zip(self._matrices, self._sketchers, strict=True):
            factors = trained.factors[matrix.name]
            scaled = client.alpha / client.rank * factors.B.astype(np.float64)
            parts.append(flat(sketcher.sketch(scaled, factors.A.astype(np.float64))))
        self._sizes = np.cumsum([len(part) for part in parts])[:-1]
        whole = np.concatenate(parts)
        self.values: Float64 = whole / np.abs(whole).max()

    def recovered(self, values: Float64) -> dict[str, Float64]:
        """What values say of the update, by matrix and up to a factor."""
        found = {}
        for matrix, sketcher, part in zip(
            self._matrices, self._sketchers, np.split(values, self._sizes), strict=True
        ):
            restored = sketcher.recovered(parted(_shape_of(matrix), self._terms, part))
            found[matrix.name] = restored.Q @ restored.M
        return found


def _shape_of(matrix: Matrix) -> Matrix:
    return Matrix(matrix.name, matrix.out_features, matrix.in_features)


def _dropping(people: _People, values: Float64, *, control: bool) -> _Got:
    """All but the victim and the spy are left out of the set; the spy takes its own part out of the sum."""
    round_ = _Round(people, values, min_updates=2 if control else 3)
    pair = (VICTIM, SPY)
    certificate, refused = round_.certified(pair)
    if certificate is None:  # the best that is left: the victim's upload under a secret of another set
        return _Got(values=_wrongly_opened(round_), refused=refused, asked=len(round_.members))
    opened = round_.opened(certificate, pair) - round_.values[SPY]
    return _Got(values=opened, refused=refused, asked=len(round_.members))


def _asking_twice(people: _People, values: Float64, *, control: bool) -> _Got:
    """Once with the victim and once without: the difference is its secret."""
    round_, others = _Round(people, values), [name for name in COHORT if name != VICTIM]
    round_.certificate()
    second, refused = round_.certified(others)
    if not control and second is None:
        return _Got(values=_wrongly_opened(round_), refused=refused, asked=len(round_.members))
    secret = round_.secret_if_members_answered(COHORT) - round_.secret_if_members_answered(others)
    return _Got(values=round_.unchecked(VICTIM, secret), asked=len(round_.members))


def _using_again(people: _People, values: Float64, *, control: bool) -> _Got:
    """The first round's keys and opening are shown again in the second."""
    first, second = _Round(people, values), _Round(people, values, number=2)
    if control:
        own = second.secret_if_members_answered([VICTIM])
        return _Got(values=second.unchecked(VICTIM, own), asked=len(second.members))
    certificate, secret = first.certificate(), first.secret_if_members_answered(COHORT)
    opening = pb.Opening(
        certificate=certificate, answers=[member.release(certificate) for member in first.members.values()]
    )
    tries: list[Callable[[], object]] = [
        lambda: second.keys_of([member.key for member in first.members.values()]),
        lambda: second.reader(opening),
        *(lambda member=member: member.release(certificate) for member in second.members.values()),
    ]
    refused = sum(_refuses(attempt) for attempt in tries)
    return _Got(values=second.unchecked(VICTIM, secret), refused=refused, asked=len(tries))


def _crafting(people: _People, values: Float64, *, control: bool) -> _Got:
    """Instead of the sum: the victim's upload as often as it takes, the sum with the victim's again, or without it."""
    round_ = _Round(people, values)
    certificate, left = round_.certificate(), _wrongly_opened(round_)
    if control:
        own = sum(part for name, part in round_.values.items() if name != VICTIM)
        return _Got(values=round_.opened(certificate, COHORT) - own, asked=1)
    crafted = ([VICTIM] * len(COHORT), [*COHORT[:-1], VICTIM], [*COHORT[1:], SPY])
    opened = [lambda names=names: round_.opened(certificate, names) for names in crafted]
    refused = sum(_refuses(attempt) for attempt in opened)
    return _Got(values=left, refused=refused, asked=len(crafted))


def _refuses(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except DomainError:
        return True
    return False


def _wrongly_opened(round_: _Round) -> Float64:
    """The victim's upload under the one secret that a round gives: that of the whole cohort."""
    return round_.unchecked(VICTIM, round_.secret_if_members_answered(COHORT))


_ATTACKS: Final[tuple[tuple[Callable[..., _Got], tuple[str, str]], ...]] = (
    (
        _dropping,
        (
            "all others are dropped from the set (min_updates 3)",
            "control: min_updates 2, so that all others but the client are dropped",
        ),
    ),
    (
        _asking_twice,
        ("a second set of the same round, without the victim", "control: members that answer for both sets"),
    ),
    (
        _using_again,
        ("keys and opening of another round are shown again", "control: members that answer for one update"),
    ),
    (
        _crafting,
        ("a crafted sum in place of the sum", "control: the sum, and every other client tells its part"),
    ),
)
