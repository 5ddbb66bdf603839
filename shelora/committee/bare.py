"""Openings without the certificates that their readers have: those that came with the committee's keys.

A certificate is four fifths of a statement, and a member makes three that all clients of a round read: its key, its
signature of the set, its answer. Readers that have the keys are sent the others without.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress

from shelora.committee.statements import parsed
from shelora.errors import DomainError
from shelora.v1 import committee_pb2 as pb


def certificates_in(keys: Iterable[pb.Signed]) -> dict[int, bytes]:
    """The certificates of members by their position, of the statements of their keys. Nothing is verified."""
    found = {}
    for key in keys:
        with suppress(DomainError):
            found[parsed(pb.CommitteeKey, key.content).position] = key.certificate
    return found


def numbered(opening: pb.Opening, certificates: Mapping[int, bytes]) -> pb.Opening:
    """The opening, its signers named where their certificate is that of their key: not if it was renewed since."""
    positions = {certificate: position for position, certificate in certificates.items()}
    found = _copied(opening)
    for statement in _statements(found):
        statement.signer = positions.get(statement.certificate, 0)
    return found


def bare(opening: pb.Opening) -> pb.Opening:
    """The opening without the certificates of the signers it names."""
    found = _copied(opening)
    for statement in _statements(found):
        if statement.signer:
            statement.ClearField("certificate")
    return found


def completed(opening: pb.Opening, certificates: Mapping[int, bytes]) -> pb.Opening:
    """The opening with the certificates that `bare` left out. One that is not known stays away: it vouches for none."""
    found = _copied(opening)
    for statement in _statements(found):
        if not statement.certificate:
            statement.certificate = certificates.get(statement.signer, b"")
    return found


def _statements(opening: pb.Opening) -> list[pb.Signed | pb.SetSignature]:
    return [*opening.certificate.signatures, *opening.answers]


def _copied(opening: pb.Opening) -> pb.Opening:
    found = pb.Opening()
    found.CopyFrom(opening)
    return found
