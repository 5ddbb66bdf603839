"""What opens a round's sum: put together once from what members stated, then handed to every client."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from coordinator.committees import context_of
from coordinator.records import FederationRecord, RoundRecord, Statement
from coordinator.statements import key_of
from coordinator.store import Store
from services.common.single_flight import SingleFlight
from shelora.committee.bare import bare, certificates_in, numbered
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb

OPENED_KEPT: Final = 8
"""Openings kept, 100 KB each of the largest committees."""


async def opening_of(store: Store, federation: FederationRecord, record: RoundRecord) -> bytes:
    """What opens an aggregated round: a serialized GetOpeningResponse."""
    place = (federation, record.sequence)
    signatures = await store.committees.statements(Statement.SIGNATURE, *place)
    answers = await store.committees.statements(Statement.ANSWER, *place)
    views = await store.committees.statements(Statement.VIEW, *place, record.order)
    opening = committee_pb2.Opening(
        certificate=certificate_of(record, signatures),
        answers=[committee_pb2.Signed.FromString(answer) for answer in answers.values()],
    )
    keys = (key for view in views.values() if (key := key_of(view)))
    return pb.GetOpeningResponse(
        context=context_of(federation, record).to_proto(), opening=numbered(opening, certificates_in(keys))
    ).SerializeToString(deterministic=True)


def certificate_of(record: RoundRecord, signatures: Mapping[str, bytes]) -> committee_pb2.Certificate:
    """The certificate of the proposed set, of its stored signatures by member."""
    read = (committee_pb2.Signed.FromString(signed) for signed in signatures.values())
    return committee_pb2.Certificate(
        content=bytes.fromhex(record.proposed),
        signatures=[
            committee_pb2.SetSignature(signature=signed.signature, certificate=signed.certificate)
            for signed in read
        ],
    )


@dataclass(frozen=True)
class Openings:
    """The openings of a store.

    Attributes:
        store: State.
        newest: What opens the newest results, by federation and digest, and for whom: read once for all clients.
    """

    store: Store
    newest: SingleFlight[tuple[str, str, bool], pb.GetOpeningResponse] = field(
        default_factory=lambda: SingleFlight(OPENED_KEPT)
    )

    async def of(self, federation_id: str, round_id: str, *, has_keys: bool = False) -> pb.GetOpeningResponse:
        """What opens a round's sum, without certificates if the caller has the committee's keys.

        Raises: RESULT_UNKNOWN.
        """
        federation = (await self.store.federations.read(federation_id)).record
        sequence = federation.sequence_of(round_id)
        found = await self.store.rounds.read(federation, sequence) if sequence else None
        if found is None or found.record.opening is None:
            raise DomainError(Reason.RESULT_UNKNOWN, "no committee has opened that result")
        sha256 = found.record.opening.sha256
        read = partial(self._read, federation_id, sha256, has_keys=has_keys)
        return await self.newest.get((federation_id, sha256, has_keys), read)

    async def _read(self, federation_id: str, sha256: str, *, has_keys: bool) -> pb.GetOpeningResponse:
        stored = await self.store.committees.opening(federation_id, sha256)
        whole = pb.GetOpeningResponse.FromString(stored)
        return pb.GetOpeningResponse(opening=bare(whole.opening)) if has_keys else whole
