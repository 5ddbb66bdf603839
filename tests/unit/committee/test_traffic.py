"""Openings without the certificates that readers have, and the bytes that a committee costs its clients."""

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest

from shelora.additive.parameters import DEFAULT
from shelora.committee.bare import bare, certificates_in, completed, numbered
from shelora.committee.dealer import Dealer
from shelora.committee.sealing import seal_answer
from shelora.committee.statements import StatementKind
from shelora.v1 import committee_pb2 as pb
from shelora.v1 import coordinator_pb2
from tests.unit.committee.rounds import ANSWER_KEY, World, certificate_of, context_of, rng, signer


def statements_of(opening: pb.Opening) -> Iterator[pb.Signed | pb.SetSignature]:
    yield from opening.certificate.signatures
    yield from opening.answers


def opened(world: World) -> pb.Opening:
    checks = world.collect().check()
    certificate = world.certify(world.verdict(checks).contributors)
    return pb.Opening(certificate=certificate, answers=world.release(certificate))


@pytest.fixture(scope="module")
def world() -> World:
    return World(context_of(5))


@pytest.fixture(scope="module")
def opening(world: World) -> pb.Opening:
    return opened(world)


@pytest.fixture(scope="module")
def keys(world: World) -> list[pb.Signed]:
    return [member.key for member in world.members.values()]


def test_what_a_reader_completes_is_what_was_left_out(opening: pb.Opening, keys: list[pb.Signed]):
    whole = numbered(opening, certificates_in(keys))
    sent = bare(whole)
    assert not any(statement.certificate for statement in statements_of(sent))
    assert completed(sent, certificates_in(keys)) == whole
    assert completed(opening, {}) == opening, "as an older coordinator sends it"
    assert {s.signer for s in opening.answers} == {0}, "what is given is not changed"


def test_a_certificate_that_was_renewed_since_travels(
    world: World, opening: pb.Opening, keys: list[pb.Signed]
):
    renewed = pb.Opening()
    renewed.CopyFrom(opening)
    name = world.committee.members[0]
    renewed.answers[0].certificate = certificate_of(name, signer(name)._key)
    sent = bare(numbered(renewed, certificates_in(keys)))
    assert sent.answers[0].certificate == renewed.answers[0].certificate
    assert not any(answer.certificate for answer in sent.answers[1:])


def test_a_position_that_is_not_the_signers_vouches_for_nothing(
    world: World, opening: pb.Opening, keys: list[pb.Signed]
):
    """A server may name whom it likes: what counts is the signature, under the certificate of who is named."""
    sent = bare(numbered(opening, certificates_in(keys)))
    for answer in sent.answers:
        answer.signer = answer.signer % 5 + 1
    for answer in completed(sent, certificates_in(keys)).answers:
        with pytest.raises(Exception, match="is not signed by it"):
            world.trust.author(answer, StatementKind.ANSWER, world.context)
    unknown = completed(sent, {})
    assert not any(answer.certificate for answer in unknown.answers)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a committee's messages for one client in a round."""

    keys: int
    opening: int
    whole_opening: int
    dealt: int


@cache
def traffic(clients: int) -> Traffic:
    """Answers hold noise: no byte of them can be saved, and their number is what counts."""
    world = World(context_of(clients, parameters=DEFAULT))
    context, members = world.context, world.committee.members
    keys = coordinator_pb2.GetCommitteeKeysResponse(keys=[world.members[name].key for name in members])
    content = pb.ContributorSet(
        contributors=context.bits(frozenset(context.cohort)),
        dealings_digest=bytes(32),
        total_weight=2 * clients,
    ).SerializeToString()
    opening = pb.Opening(certificate=pb.Certificate(content=content))
    for position, name in enumerate(members, 1):
        values = os.urandom(2 * context.shares)
        answer = pb.Answer(
            position=position,
            sealed=seal_answer(ANSWER_KEY, bytes(32), position, values, rng(position)),
        )
        said = signer(name).sign(StatementKind.ANSWER, context, answer.SerializeToString())
        opening.answers.append(said)
        if position <= context.rule.quorum:
            one = signer(name).sign(StatementKind.SET, context, content)
            opening.certificate.signatures.add(signature=one.signature, certificate=one.certificate)
    whole = numbered(opening, certificates_in(keys.keys))
    full = coordinator_pb2.GetOpeningResponse(context=context.to_proto(), opening=whole)
    sent = coordinator_pb2.GetOpeningResponse(opening=bare(whole))
    dealer = Dealer(context, world.keys, signer(context.cohort[0]), rng(clients))
    return Traffic(
        keys=len(gzip.compress(keys.SerializeToString())),
        opening=sent.ByteSize(),
        whole_opening=full.ByteSize(),
        dealt=dealer.deal([bytes(32)], 1).ByteSize(),
    )


@pytest.mark.parametrize(
    ("clients", "down", "up"),
    [(5, 14_000, 12_000), (40, 17_500, 11_000), (300, 41_000, 13_000), (1000, 41_000, 13_000)],
)
def test_a_committee_costs_a_client_no_more_bytes_than_docs_say(clients: int, down: int, up: int):
    """docs/committee.md, "Cost". The names of the cohort are in the assignment, once."""
    found = traffic(clients)
    assert found.keys + found.opening <= down
    assert found.dealt <= up
    assert found.opening < 0.75 * found.whole_opening, "what certificates would add"


def test_a_large_cohort_costs_its_clients_no_more_than_a_smaller_one():
    """The committee does not grow: what does is one bit a client in the certified set."""
    small, large = traffic(300), traffic(1000)
    assert abs(large.keys - small.keys) < 1000
    assert abs(large.opening - small.opening) < 1000
    assert abs(large.dealt - small.dealt) < 1000
