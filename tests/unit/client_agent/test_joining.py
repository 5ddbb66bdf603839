import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from client_agent.agent import _Follower
from client_agent.session import Backoff
from shelora.errors import DomainError, Reason
from shelora.protocol import Stage
from shelora.v1 import coordinator_pb2 as pb

LEARNER = SimpleNamespace(model=None, examples=())


class Session:
    """Refuses a join for each of the reasons in turn, then accepts."""

    def __init__(self, *reasons: Reason) -> None:
        self.reasons = list(reasons)
        self.joined = False
        self.said: list[Reason] = []

    async def could_not_join(self, error: DomainError) -> None:
        self.said.append(error.reason)

    async def join(self, model: object, example_count: int) -> None:
        if self.reasons:
            raise DomainError(self.reasons.pop(0), "as told")
        self.joined = True


class Roomy:
    """Work that finds enough memory, after it found too little for some times."""

    counted = 1

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals

    def require_memory(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise DomainError(Reason.MEMORY_UNAVAILABLE, "as told")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "next_s", lambda _: 0.0)


async def test_an_agent_waits_for_a_coordinator_that_does_not_answer_however_long_it_takes() -> None:
    session = Session(*[Reason.STORE_UNAVAILABLE] * 20, Reason.RECORD_UNREADABLE)
    follower = _Follower(session, Roomy(), LEARNER, 0.0)
    await follower.join()
    assert session.reasons == []
    assert session.joined


async def test_an_agent_that_must_be_changed_first_says_so_and_ends() -> None:
    session = Session(Reason.STORE_UNAVAILABLE, Reason.VERSION_REFUSED)
    with pytest.raises(DomainError) as refused:
        await _Follower(session, Roomy(), LEARNER, 0.0).take_part()
    assert refused.value.reason is Reason.VERSION_REFUSED
    assert session.said == [Reason.VERSION_REFUSED]


async def test_a_member_follows_a_federation_that_has_ended() -> None:
    await _Follower(Session(Reason.FEDERATION_CLOSED), Roomy(), LEARNER, 0.0).join()


async def test_an_agent_with_too_little_memory_waits_with_joining_so_that_no_round_waits_for_it() -> None:
    session, work = Session(), Roomy(refusals=3)
    await _Follower(session, work, LEARNER, 0.0).join()
    assert session.joined
    assert not work.refusals


class FullDisk:
    """Work that finds no room."""

    def writing(self) -> nullcontext[None]:
        return nullcontext()

    async def train(self, *_: object) -> None:
        raise DomainError(Reason.DISK_UNAVAILABLE, "as told")


async def test_a_client_whose_work_waits_to_be_tried_again_says_that_it_is_paused() -> None:
    follower = _Follower(Session(), FullDisk(), LEARNER, 3600.0)
    await follower._take(pb.Assignment(assignment_id="1", train=pb.Train()))
    while follower._activity.progress.stage is not Stage.PAUSED:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    await follower.drop()
