"""Members that do what they like with the calls that a member has: they join and beat as everyone does."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from client_agent.agent import Outcome
from client_agent.learning import LocalModel
from client_agent.progress import Progress
from client_agent.session import Session, digest_from_proto
from shelora.errors import DomainError, Reason
from shelora.transport.channel import is_transient

BEAT_S: Final = 5.0
PASSING: Final = frozenset(
    {Reason.CLIENT_UNKNOWN, Reason.PLAN_UNKNOWN, Reason.FEDERATION_CLOSED, Reason.FEDERATION_UNKNOWN}
)
REJECTER, IDLER = "rejecter", "idler"
PARTIES: Final = (REJECTER, IDLER)


async def take_part(session: Session, model: LocalModel, examples: int, party: str) -> Outcome:
    """Follows the federation to its end, and does nothing but reject every plan, or nothing at all."""
    await _join(session, model, examples)
    beating = asyncio.create_task(_beat(session))
    try:
        while True:
            try:
                async for assignment in session.assignments():
                    kind = assignment.WhichOneof("work")
                    if kind == "train" and party == REJECTER and assignment.train.HasField("plan"):
                        plan = assignment.train.plan
                        digest = digest_from_proto(plan.digest)
                        await _until_done(
                            lambda plan=plan, digest=digest: session.reject_plan(
                                plan.plan_number, digest, "no"
                            )
                        )
                    if kind in {"finish", "halt"}:
                        return Outcome.FINISHED if kind == "finish" else Outcome.HALTED
            except DomainError as error:
                if error.reason is Reason.FEDERATION_UNKNOWN:
                    return Outcome.HALTED
                if error.reason not in PASSING:
                    raise
                await asyncio.sleep(1)
                await _join(session, model, examples)
    finally:
        beating.cancel()


async def _join(session: Session, model: LocalModel, examples: int) -> None:
    """Becomes a member, once there is a federation. Raises: FEDERATION_CLOSED if it has ended."""
    while True:
        try:
            await session.join(model, examples)
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_UNKNOWN and not is_transient(error):
                raise
            await asyncio.sleep(1)
        else:
            return


async def _beat(session: Session) -> None:
    while True:
        with suppress(DomainError):
            await session.heartbeat(Progress())
        await asyncio.sleep(BEAT_S)


async def _until_done(work: Callable[[], Awaitable[None]]) -> bool:
    """Tries until it succeeds; False if there is nothing to do any more."""
    while True:
        try:
            await work()
        except DomainError as error:
            if error.reason in PASSING:
                return False
            if not is_transient(error):
                raise
            await asyncio.sleep(1)
        else:
            return True
