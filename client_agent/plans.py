"""Plans of a federation: fetched, opened, checked against the votes that they claim to rank."""

from typing import TypeAlias

from client_agent.keys import EpochSecrets
from client_agent.negotiators import Negotiator
from client_agent.progress import Activity
from client_agent.session import Session, digest_from_proto
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.negotiation.plan import Plan
from shelora.v1 import coordinator_pb2 as pb

_Key: TypeAlias = tuple[bytes, str]
"""SHA-256 of a plan as it was published, and its vote: under another vote the same labels are other columns."""


class Plans:
    """Plans that this process has opened, and those that it has checked."""

    def __init__(self, session: Session, negotiator: Negotiator) -> None:
        self._session = session
        self._negotiator = negotiator
        self._opened: dict[_Key, Plan] = {}
        self._checked: set[_Key] = set()
        """Plans that agree with the summed votes."""

    async def checked(
        self, train: pb.Train, layout: Layout, secrets: EpochSecrets, activity: Activity
    ) -> Plan | None:
        """The plan of a round, checked against the summed votes; a wrong one is rejected."""
        if not train.HasField("plan"):
            return None
        reference = train.plan
        try:
            plan = await self.opened(reference, secrets)
            if _key(reference) not in self._checked:
                await self._negotiator.check(plan, reference, layout, secrets, activity)
                self._checked.add(_key(reference))
        except DomainError as error:
            if error.reason is Reason.PLAN_REFUSED:
                digest = digest_from_proto(reference.digest)
                await self._session.reject_plan(reference.plan_number, digest, error.message)
            raise
        return plan

    async def opened(self, reference: pb.PlanRef, secrets: EpochSecrets) -> Plan:
        """A plan as it was published. Raises: PLAN_UNKNOWN, PLAN_REFUSED."""
        key = _key(reference)
        if key not in self._opened:
            content = await self._session.fetch_plan(
                reference.plan_number, digest_from_proto(reference.digest)
            )
            self._opened[key] = self._negotiator.open(content, reference, secrets)
        return self._opened[key]


def _key(reference: pb.PlanRef) -> _Key:
    return reference.digest.sha256, reference.vote_round_id
