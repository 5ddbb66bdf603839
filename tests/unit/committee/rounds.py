"""A whole round in this process: clients with real certificates, a relay that may cheat, an adder."""

import hashlib
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np

from services.key_authority.ca import Issuer, Root
from services.key_authority.ca import _new_root as new_root
from shelora.additive import INSECURE_TOY, Adder, ShardShape
from shelora.additive.sampler import Csprng
from shelora.committee.certificate import assemble
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import check_dealt, dealing_digest, shown_to
from shelora.committee.keys import KeySet
from shelora.committee.member import Member
from shelora.committee.reader import open_round
from shelora.committee.rules import committee_rule
from shelora.committee.statements import Signer, Trust
from shelora.committee.verdict import Checked, judge
from shelora.obfuscation import Obfuscation
from shelora.transport.certificates import new_key, signing_request
from shelora.transport.identity import Identity, Role
from shelora.v1 import committee_pb2 as pb

NOW = datetime.now(UTC)
FEDERATION = "clinic"
VALUES = 100
SECRET = Obfuscation(bytes(range(32)), 1)
ORDER_KEY, ANSWER_KEY = SECRET.committee_key(), SECRET.answer_key()


@cache
def root() -> Root:
    return new_root()


def rng(*seed):
    """A stream that only these words determine."""
    return Csprng(hashlib.sha256(repr(seed).encode()).digest())


def certificate_of(name, key, *, federation=FEDERATION, authority=None, at=NOW, role=Role.CLIENT):
    identity = Identity(role, federation, name) if role is Role.CLIENT else Identity(role)
    issuer = Issuer(authority or root(), timedelta(hours=24), lambda: at)
    return issuer.issue(signing_request(key), identity)


@cache
def signer(name):
    key = new_key()
    return Signer(name, key, certificate_of(name, key))


def trust(at=NOW):
    return Trust(root().der, FEDERATION, lambda: at)


def names(size):
    return tuple(f"ward-{index:03}" for index in range(size))


def context_of(size, **changes):
    values = {
        "federation_id": FEDERATION,
        "instance": "00000001",
        "round_id": "clinic.0.1",
        "kind": "TRAIN",
        "round_number": 1,
        "attempt": 1,
        "epoch": 1,
        "layout_digest": bytes(32),
        "parameters": INSECURE_TOY,
        "cohort": names(size),
        "most_contributors": size,
        "rule": committee_rule(size),
        "min_updates": 2,
        "most_weight": 2,
    }
    return RoundContext(**(values | changes))


class Notes:
    """Notes that outlive a member, as a disk does."""

    def __init__(self):
        self.sets = {}

    def certified(self, *place):
        return self.sets.get(place)

    def note(self, *place_and_digest):
        *place, digest = place_and_digest
        assert self.sets.setdefault(tuple(place), digest) == digest


class World:
    """One attempt. Clients are honest; what the servers relay is the test's business."""

    def __init__(self, context, notes=None, seed=0):
        self.context = context
        self.seed = seed
        self.committee = context.committee(ORDER_KEY)
        self.notes = notes or {name: Notes() for name in context.cohort}
        self.trust = trust()
        self.members = {name: self.member(name) for name in self.committee.members}
        self.keys = self.key_set(m.key for m in self.members.values())
        self.shape = ShardShape(context.parameters, 0, VALUES)
        self.values, self.uploads, self.dealt, self.secrets = {}, {}, {}, {}

    def member(self, name):
        return Member(
            self.context,
            self.committee,
            signer(name),
            self.trust,
            self.notes[name],
            ANSWER_KEY,
            rng(self.seed, "member", name, self.context.digest),
        )

    def key_set(self, statements):
        return KeySet.of(self.context, self.committee, statements, self.trust)

    def deal(self, name, *, weight=2, keys=None, values=None):
        """One client uploads and deals."""
        dealer = Dealer(
            self.context, keys or self.keys, signer(name), rng(self.seed, "dealer", name, self.context.digest)
        )
        self.secrets[name] = dealer._secret.coefficients
        generator = np.random.default_rng([*name.encode(), self.seed])
        self.values[name] = generator.uniform(-1, 1, VALUES) if values is None else np.full(VALUES, values)
        self.uploads[name] = dealer.encryption.encrypt(self.values[name])
        self.dealt[name] = dealer.deal([hashlib.sha256(self.uploads[name]).digest()], weight)
        return self.dealt[name]

    def collect(self, absent=()):
        for name in self.context.cohort:
            if name not in absent and name not in self.dealt:
                self.deal(name)
        return self

    def show(self, member, dealer):
        """Relays one dealing. Returns the refusal, if any."""
        position = self.members[member].position
        shown = shown_to(self.context, self.dealt[dealer], position)
        return self.members[member].receive(dealer, shown, self.keys)

    def check(self, members=None):
        """All dealings to these members. Returns their checks by position."""
        checks = {}
        for member in members or self.members:
            for dealer in self.dealt:
                self.show(member, dealer)
            checked = Checked.read(self.context, self.members[member].check().content)
            checks[checked.position] = checked
        return checks

    @property
    def dealings(self):
        """What members hold of every dealing: digest and weight."""
        return {name: (dealing_digest(dealt.dealing), 2) for name, dealt in self.dealt.items()}

    def verdict(self, checks):
        for dealt in self.dealt.values():
            check_dealt(self.context, dealt)
        return judge(self.context, frozenset(self.dealt), checks)

    def certify(self, contributors, members=None):
        """The certificate of these members' signatures, or None."""
        return assemble(
            self.context, [self.members[m].certify(contributors) for m in members or self.members]
        )

    def release(self, certificate, members=None):
        return [self.members[m].release(certificate) for m in members or self.members]

    def open(self, certificate, answers, committee=None):
        opening = pb.Opening(certificate=certificate, answers=answers)
        return open_round(
            self.context, committee or self.committee, opening, ANSWER_KEY, self.trust, rng("reader")
        )

    def total(self, contributors):
        adder = Adder(self.shape)
        for name in contributors:
            adder.add(self.uploads[name])
        return adder.finish()

    def run(self):
        """The whole round. Returns what a client opened, and the decrypted sum."""
        self.collect()
        contributors = self.verdict(self.check()).contributors
        certificate = self.certify(contributors)
        opened = self.open(certificate, self.release(certificate))
        return opened, opened.sum_opener().open(self.total(contributors), self.shape)

    def true_sum(self, contributors):
        return np.sum([self.values[name] for name in contributors], axis=0)

    def tolerance(self, contributors):
        return self.context.parameters.noise_bound(contributors) / self.context.parameters.scale(
            self.context.most_contributors
        )
