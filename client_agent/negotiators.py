"""An agent's half of a negotiation: how it votes, how a published plan is opened and checked. One object a protocol.

`protection.negotiation` names it; docs/negotiation.md says who learns what. `coordinator.votes` is the other half.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from client_agent.keys import EpochSecrets
from client_agent.progress import Activity
from client_agent.session import Session
from client_agent.state import Spool
from shelora.lora.codec import encode_update
from shelora.lora.layout import Layout, Matrix
from shelora.lora.protect import protect
from shelora.lora.shards import Float64
from shelora.negotiation.ope import Ope
from shelora.negotiation.plan import Plan, check_plan, open_plan, plan_context
from shelora.negotiation.protocol import Stake
from shelora.negotiation.ranking import Ranking, total_columns
from shelora.negotiation.sealed import Sealed
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What a negotiator needs of its agent."""

    federation_id: str
    matrices: tuple[Matrix, ...]
    """Those of the model."""
    session: Session
    send: Callable[[Spool, Activity], Awaitable[None]]
    """Uploads a spooled update and commits it."""
    summed_votes: Callable[[common_pb2.ResultRef, EpochSecrets, Activity], Awaitable[Mapping[str, Float64]]]
    """The decrypted sums of a published vote, by matrix."""


class Negotiator(Protocol):
    """A protocol's agent side."""

    def cast(
        self, layout: Layout, scores: Mapping[str, Float64], stake: Stake, vote: str, secrets: EpochSecrets
    ) -> Iterator[bytes]:
        """What is spooled as the vote of that identifier.

        Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE.
        """

    async def send(self, spool: Spool, activity: Activity) -> None:
        """Brings a spooled vote to where it is counted."""

    def open(self, content: bytes, reference: pb.PlanRef, secrets: EpochSecrets) -> Plan:
        """A plan as it was published. Raises: PLAN_REFUSED."""

    async def check(
        self, plan: Plan, reference: pb.PlanRef, layout: Layout, secrets: EpochSecrets, activity: Activity
    ) -> None:
        """Checks a plan against what agents can see of the votes. Raises: PLAN_REFUSED."""


class SealedNegotiator:
    """Votes are encrypted; aggregation adds them up, and every agent can rank the sums."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def cast(
        self,
        layout: Layout,
        scores: Mapping[str, Float64],
        stake: Stake,
        vote: str,  # noqa: ARG002 - of encrypted votes two are not told apart anyway
        secrets: EpochSecrets,
    ) -> Iterator[bytes]:
        """As of `Negotiator`: shards of whole tensors."""
        votes = Sealed(self._desk.matrices).cast(scores, stake)
        for content in protect(layout, {}, votes, 0, {}, secrets.encryptor_for(layout)):
            yield encode_update(layout, content)

    async def send(self, spool: Spool, activity: Activity) -> None:
        """As of `Negotiator`."""
        await self._desk.send(spool, activity)

    def open(self, content: bytes, reference: pb.PlanRef, secrets: EpochSecrets) -> Plan:
        """As of `Negotiator`."""
        context = plan_context(self._desk.federation_id, reference.plan_number)
        return open_plan(content, secrets.obfuscation.plan_key(), context)

    async def check(
        self, plan: Plan, reference: pb.PlanRef, layout: Layout, secrets: EpochSecrets, activity: Activity
    ) -> None:
        """As of `Negotiator`: the plan ranks the sums."""
        scores = await self._desk.summed_votes(reference.votes, secrets, activity)
        check_plan(plan, scores, self._desk.matrices, layout.tiers)


class BallotNegotiator:
    """Votes are ballots of secret labels, which the coordinator ranks."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def cast(
        self,
        layout: Layout,  # noqa: ARG002 - a ballot is not an update
        scores: Mapping[str, Float64],
        stake: Stake,
        vote: str,
        secrets: EpochSecrets,
    ) -> Iterator[bytes]:
        """As of `Negotiator`: the ballot."""
        yield self._ope(vote, secrets).cast(scores, stake).encode()

    async def send(self, spool: Spool, activity: Activity) -> None:  # noqa: ARG002 - one message
        """As of `Negotiator`."""
        count = await self._desk.session.cast_ballot(spool)
        _log.info("ballot_cast", round=spool.note.round_id, bytes_sent=spool.total_bytes, ballot_count=count)

    def open(self, content: bytes, reference: pb.PlanRef, secrets: EpochSecrets) -> Plan:
        """As of `Negotiator`."""
        ranking = Ranking.decode(content)
        return self._ope(reference.vote_round_id, secrets).plan(ranking, ranking.tiers)

    async def check(
        self,
        plan: Plan,
        reference: pb.PlanRef,  # noqa: ARG002 - agents see nothing of others' ballots
        layout: Layout,
        secrets: EpochSecrets,  # noqa: ARG002
        activity: Activity,  # noqa: ARG002
    ) -> None:
        """As of `Negotiator`: it fits, and more agents cannot see."""
        plan.require_fit(total_columns(self._desk.matrices), layout.tiers)

    def _ope(self, vote: str, secrets: EpochSecrets) -> Ope:
        return Ope(self._desk.matrices, secrets.obfuscation, vote)


_PROTOCOLS: Final[Mapping[str, Callable[[Desk], Negotiator]]] = {
    "sealed": SealedNegotiator,
    "ope": BallotNegotiator,
    "ope-refined": BallotNegotiator,
}


def negotiator_of(protocol: str, desk: Desk) -> Negotiator:
    """The agent's half of the protocol of that name."""
    return _PROTOCOLS[protocol](desk)
