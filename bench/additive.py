"""What the complete mode costs: `python -m bench.additive`. CPU time of this process, one thread; best of some runs.

Clients' certificates come from a certificate authority in this process. Takes about a minute.
"""

import gzip
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from services.key_authority.ca import Issuer, Root, RootFile
from services.key_authority.sealer import Sealer, SealingKey
from shelora.additive import BALANCED, COMPACT, SMALL, STANDARD, Adder, AdditiveParameters, ShardShape
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey, SumOpener
from shelora.committee.bare import bare, certificates_in, numbered
from shelora.committee.certificate import assemble
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import shown_to
from shelora.committee.keys import KeySet
from shelora.committee.member import Member
from shelora.committee.reader import open_round
from shelora.committee.rules import committee_rule
from shelora.committee.statements import Signer, Trust
from shelora.transport.certificates import new_key, signing_request
from shelora.transport.identity import Identity, Role
from shelora.v1 import committee_pb2 as pb
from shelora.v1.coordinator_pb2 import GetCommitteeKeysResponse

VALUES: Final = 1 << 20
COHORTS: Final = (3, 5, 8, 40, 300, 1000)
SECRET: Final = bytes(32)


def best(action: Callable[[], object], runs: int = 5) -> float:
    """CPU seconds of the fastest run."""
    seconds = []
    for _ in range(runs):
        begin = time.process_time()
        action()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def scheme(parameters: AdditiveParameters) -> str:
    """Encryption, addition and opening of one shard of 2^20 values."""
    values = np.random.default_rng(0).uniform(-1, 1, VALUES)
    shape = ShardShape(parameters, 0, VALUES)

    def encrypted() -> bytes:
        secret = SecretKey.draw(parameters, Csprng.fresh())
        return secret.encryption(SECRET, 8, Csprng.fresh()).encrypt(values)

    encrypting = best(encrypted)
    secrets = [SecretKey.draw(parameters, Csprng.fresh()) for _ in range(2)]
    data = [s.encryption(SECRET, 8, Csprng.fresh()).encrypt(values) for s in secrets]
    adder = Adder(shape)
    adding = best(lambda: adder.add(data[0]))
    total = Adder(shape)
    for shard in data:
        total.add(shard)
    opener = SumOpener(parameters, secrets[0].coefficients + secrets[1].coefficients, SECRET, 2, 8)
    opening = best(lambda: opener.open(total.finish(), shape))
    per = 1e6 / VALUES
    return (
        f"{parameters.name:9} {len(data[0]) / VALUES:5.2f} B a value; encrypt {encrypting * per:.3f}, "
        f"open {opening * per:.3f} us a value; add {1000 * adding * per:.2f} ns a value and client"
    )


class Notes:
    """Notes in memory: the disk is not measured."""

    def __init__(self) -> None:
        self._sets: dict[tuple[str, str, int], bytes] = {}

    def certified(self, instance: str, kind: str, round_number: int) -> bytes | None:
        return self._sets.get((instance, kind, round_number))

    def note(self, instance: str, kind: str, round_number: int, set_digest: bytes) -> None:
        self._sets[instance, kind, round_number] = set_digest


@dataclass(frozen=True)
class Cohort:
    """A cohort with certificates, and the keys of its committee."""

    context: RoundContext
    signers: dict[str, Signer]
    trust: Trust

    @classmethod
    def of(cls, size: int, root: Root) -> "Cohort":
        names = tuple(f"client-{i:05}" for i in range(size))
        issuer, signers = Issuer(root, timedelta(days=1)), {}
        for name in names:
            key = new_key()
            certificate = issuer.issue(signing_request(key), Identity(Role.CLIENT, "bench", name))
            signers[name] = Signer(name, key, certificate)
        context = RoundContext(
            federation_id="bench",
            instance="00000001",
            round_id="bench.0.1",
            kind="TRAIN",
            round_number=1,
            attempt=1,
            epoch=1,
            layout_digest=bytes(32),
            parameters=STANDARD,
            cohort=names,
            most_contributors=size,
            rule=committee_rule(size),
            min_updates=2,
            most_weight=1,
        )
        return cls(context, signers, Trust(root.der, "bench", lambda: datetime.now(UTC)))

    def member(self, name: str, order_key: bytes = SECRET, answer_key: bytes = SECRET) -> Member:
        """One of the committee's."""
        committee, signer = self.context.committee(order_key), self.signers[name]
        return Member(self.context, committee, signer, self.trust, Notes(), answer_key, Csprng.fresh())


def committee(size: int, root: Root) -> str:
    """Bytes and CPU of one client and one member."""
    cohort = Cohort.of(size, root)
    context, order = cohort.context, cohort.context.committee(SECRET)
    members = {name: cohort.member(name) for name in order.members}
    statements = [member.key for member in members.values()]
    keys = KeySet.of(context, order, statements, cohort.trust)
    fresh_trust = best(lambda: KeySet.of(context, order, statements, cohort.trust), 2)
    digests = [hashlib.sha256(b"").digest()]
    dealt = {n: Dealer(context, keys, s, Csprng.fresh()).deal(digests, 1) for n, s in cohort.signers.items()}
    one = cohort.signers[context.cohort[0]]
    dealing = best(lambda: Dealer(context, keys, one, Csprng.fresh()).deal(digests, 1))
    shown = {
        m.position: {n: shown_to(context, d, m.position) for n, d in dealt.items()} for m in members.values()
    }
    first = next(iter(members.values()))
    begin = time.process_time()
    for name, share in shown[first.position].items():
        assert share is not None
        assert first.receive(name, share, keys) is None
    checking = time.process_time() - begin
    for member in list(members.values())[1:]:
        for name, share in shown[member.position].items():
            assert share is not None
            member.receive(name, share, keys)
    certificate = assemble(context, [member.certify(context.cohort) for member in members.values()])
    assert certificate is not None
    begin = time.process_time()
    answers = [first.release(certificate)]
    releasing = time.process_time() - begin
    answers += [member.release(certificate) for member in list(members.values())[1:]]
    opening = pb.Opening(certificate=certificate, answers=answers)
    response = GetCommitteeKeysResponse(keys=statements)
    sent = bare(numbered(opening, certificates_in(statements)))
    reading = best(lambda: open_round(context, order, opening, SECRET, cohort.trust, Csprng.fresh()), 2)
    down = sum(share.ByteSize() for share in shown[first.position].values() if share is not None)
    return (
        f"K={size:5} m={context.rule.size:2} client: keys {len(gzip.compress(response.SerializeToString()))} B "
        f"{1000 * fresh_trust:.1f} ms, deals {len(bytes_of(dealt[context.cohort[0]]))} B {1000 * dealing:.1f} ms, "
        f"opening {len(bytes_of(sent))} B {1000 * reading:.1f} ms; "
        f"member: dealings {down} B {checking:.3f} s, certificate {len(bytes_of(certificate))} B {releasing:.3f} s"
    )


def bytes_of(message: pb.Signed | pb.DealtShares | pb.Opening | pb.Certificate) -> bytes:
    """What travels."""
    return message.SerializeToString()


def main() -> None:
    """Prints the figures."""
    for parameters in (STANDARD, BALANCED, COMPACT, SMALL):
        print(scheme(parameters))
    with TemporaryDirectory() as folder:
        root = RootFile(Path(folder) / "root", Sealer(SealingKey(bytes(32))), "5e" * 16).load_or_create()
        for size in COHORTS:
            print(committee(size, root))


if __name__ == "__main__":
    main()
