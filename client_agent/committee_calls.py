"""The agent's calls to the coordinator about a round's committee: one method a call. Errors are DomainErrors."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol, TypeVar

import grpc

from client_agent.config import AgentConfig
from shelora.committee.rules import SHARES_AT_ONCE
from shelora.errors import DomainError, Reason
from shelora.transport.channel import RETRY_S, TIMEOUT_S
from shelora.transport.status import error_from_rpc
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc

KEYS_TIMEOUT_S: Final = 30.0
"""Seconds of one call for a committee's keys, which the coordinator holds open a while."""
KEYS_PAUSE_S: Final = 1.0
"""Seconds between two such calls."""
SHARES_TIMEOUT_S: Final = 300.0
"""Most seconds for the shares of all dealers on their way in."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Asks(Protocol):
    """What `client_agent.session.Session` does for every call."""

    async def __call__(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
    ) -> _Response:
        """The coordinator's answer. Raises: DomainError."""


class CommitteeCalls:
    """In the name of one client of one federation. Args: ask: makes a call, again while the coordinator is away."""

    def __init__(self, config: AgentConfig, coordinator: "pb_grpc.CoordinatorAsyncStub", ask: Asks) -> None:
        self._federation_id = config.federation
        self._client_id = config.client_id
        self._address = config.coordinator
        self._coordinator = coordinator
        self._ask = ask

    async def post_key(self, round_id: str, order: Sequence[str], key: committee_pb2.Signed | None) -> None:
        """States the committee that this client works out, with its key if it is a member.

        Raises: ROUND_UNKNOWN, NOT_IN_COHORT, STATEMENT_REWRITTEN, STEP_OVER.
        """
        request = pb.PostCommitteeKeyRequest(**self._in_round(round_id), order=order, key=key)
        await self._ask(self._coordinator.PostCommitteeKey, request)

    async def keys(self, round_id: str) -> Sequence[committee_pb2.Signed]:
        """The keys of the committee, waited for. Raises: ROUND_UNKNOWN, NOT_IN_COHORT, STEP_OVER."""
        request = pb.GetCommitteeKeysRequest(**self._in_round(round_id))
        while True:
            try:
                response = await self._ask(
                    self._coordinator.GetCommitteeKeys, request, timeout_s=KEYS_TIMEOUT_S
                )
            except DomainError as error:
                if error.reason is not Reason.COMMITTEE_INCOMPLETE:
                    raise
                await asyncio.sleep(KEYS_PAUSE_S)
            else:
                return response.keys

    async def leave(self, round_id: str) -> None:
        """Says that this member lost its key. Raises: ROUND_UNKNOWN, NOT_IN_COHORT."""
        request = pb.LeaveCommitteeRequest(**self._in_round(round_id))
        await self._ask(self._coordinator.LeaveCommittee, request)

    async def shares(self, round_id: str) -> AsyncIterator[committee_pb2.DealtShare]:
        """What this member is shown of every dealer. Raises: ROUND_UNKNOWN, STEP_OVER."""
        request = pb.GetSharesRequest(**self._in_round(round_id), at_once=SHARES_AT_ONCE)
        try:
            async for shown in self._coordinator.GetShares(request, timeout=SHARES_TIMEOUT_S):
                yield shown
                for further in shown.further:
                    yield further
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._address) from error

    async def post_check(self, round_id: str, check: committee_pb2.Signed) -> None:
        """Says whose shares this member holds. Raises: ROUND_UNKNOWN, STATEMENT_REWRITTEN, STEP_OVER."""
        request = pb.PostCheckRequest(**self._in_round(round_id), check=check)
        await self._ask(self._coordinator.PostCheck, request)

    async def sign_set(self, round_id: str, signature: committee_pb2.SetSignature) -> None:
        """Signs the proposed set. Raises: ROUND_UNKNOWN, SIGNATURE_REFUSED, STATEMENT_REWRITTEN, STEP_OVER."""
        request = pb.SignSetRequest(**self._in_round(round_id), signature=signature)
        await self._ask(self._coordinator.SignSet, request)

    async def post_answer(self, round_id: str, answer: committee_pb2.Signed) -> None:
        """Gives the sum of this member's shares. Raises: ROUND_UNKNOWN, STATEMENT_REWRITTEN, STEP_OVER."""
        request = pb.PostAnswerRequest(**self._in_round(round_id), answer=answer)
        await self._ask(self._coordinator.PostAnswer, request)

    async def opening(self, round_id: str, *, has_keys: bool) -> pb.GetOpeningResponse:
        """What opens a published result. Args: has_keys: whether this client has the committee's keys.

        Raises: RESULT_UNKNOWN.
        """
        request = pb.GetOpeningRequest(
            federation_id=self._federation_id, round_id=round_id, has_keys=has_keys
        )
        return await self._ask(self._coordinator.GetOpening, request)

    def _in_round(self, round_id: str) -> dict[str, str]:
        return {
            "federation_id": self._federation_id,
            "round_id": round_id,
            "client_id": self._client_id,
        }
