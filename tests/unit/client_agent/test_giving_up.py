"""What an agent says of work that it cannot do, and how it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from client_agent import link
from client_agent.agent import Outcome, _Follower
from client_agent.session import Backoff
from client_agent.session import Session as RealSession
from shelora.errors import DomainError, Reason
from shelora.protocol import MAX_WHY, plain
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

LEARNER = SimpleNamespace(model=None, examples=())
TRAIN = pb.Assignment(assignment_id="train/1", train=pb.Train())


class Session:
    """Gives assignments out, and writes down what it is told."""

    def __init__(self, *assignments: pb.Assignment | DomainError, heartbeat: DomainError | None = None):
        self.to_give = assignments
        self.refusal = heartbeat
        self.given_up: list[tuple[str, Reason, str]] = []
        self.troubles: list[Reason | None] = []
        self.joins = 0

    async def join(self, _model: object, _example_count: int) -> None:
        self.joins += 1

    async def assignments(self) -> AsyncIterator[pb.Assignment]:
        for assignment in self.to_give:
            if isinstance(assignment, DomainError):
                raise assignment
            yield assignment
        await asyncio.sleep(3600)

    async def give_up(self, assignment_id: str, error: DomainError) -> None:
        self.given_up.append((assignment_id, error.reason, error.message))

    async def could_not_join(self, _error: DomainError) -> None:
        pass

    async def heartbeat(self, _progress: object, trouble: DomainError | None = None) -> float:
        self.troubles.append(trouble.reason if trouble else None)
        if self.refusal:
            raise self.refusal
        return 0.0


class Work:
    """Training that fails as it is told; results that are kept."""

    counted = 1

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.dropped = 0
        self.kept: list[str] = []

    def writing(self) -> nullcontext[None]:
        return nullcontext()

    def require_memory(self) -> None:
        pass

    async def train(self, *_: object) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def finish(self, *_: object) -> None:
        raise self.errors.pop(0)

    async def drop_update(self) -> None:
        self.dropped += 1

    async def keep_newest(self, halt: pb.Halt, _activity: object) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.kept.append(halt.result.round_id)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "next_s", lambda _: 0.0)


def failure(reason: Reason) -> DomainError:
    return DomainError(reason, "as told")


async def performed(session: Session, work: Work, retry_s: float = 0.0) -> _Follower:
    follower = _Follower(session, work, LEARNER, retry_s)
    await follower._take(TRAIN)
    await asyncio.gather(follower._task, return_exceptions=True)
    return follower


@pytest.mark.parametrize("reason", [Reason.VALUE_NOT_FINITE, Reason.LAYOUT_MISMATCH, Reason.PLAN_REFUSED])
async def test_work_that_is_dropped_is_said_to_be_with_its_reason(reason):
    session, work = Session(), Work(failure(reason))
    follower = await performed(session, work)
    assert session.given_up == [("train/1", reason, "as told")]
    assert work.dropped == 1
    assert not follower._ended.done()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(failure(Reason.DATA_INVALID), Reason.DATA_INVALID), (RuntimeError("secret"), Reason.INTERNAL)],
)
async def test_an_agent_that_ends_over_its_work_says_so_first_and_shows_no_payload(error, reason):
    session = Session()
    follower = await performed(session, Work(error))
    with pytest.raises(type(error)):
        await follower._ended
    (said,) = session.given_up
    assert said[:2] == ("train/1", reason)
    assert "secret" not in said[2]


async def test_an_agent_that_cannot_open_the_final_result_shows_it_to_the_operator_before_it_ends():
    """The next heartbeat would come too late."""
    session = Session()
    follower = _Follower(session, Work(failure(Reason.SUM_UNREADABLE)), LEARNER, 0.0)
    await follower._take(pb.Assignment(assignment_id="finish/1", finish=pb.Finish()))
    with pytest.raises(DomainError):
        await follower._ended
    assert session.troubles == [Reason.SUM_UNREADABLE]


async def test_a_spent_privacy_budget_gives_the_round_up_and_the_agent_goes_on_following():
    session = Session()
    follower = await performed(session, Work(failure(Reason.PRIVACY_EXHAUSTED)))
    assert [said[:2] for said in session.given_up] == [("train/1", Reason.PRIVACY_EXHAUSTED)]
    assert not follower._ended.done()


async def test_what_is_tried_again_is_not_given_up_and_heartbeats_name_it_meanwhile():
    session, work = Session(), Work(failure(Reason.MEMORY_UNAVAILABLE))
    follower = _Follower(session, work, LEARNER, 0.05)
    await follower._take(TRAIN)
    beating = asyncio.create_task(follower.beat())
    await asyncio.sleep(0.02)
    await follower._task
    beating.cancel()
    assert session.troubles == [Reason.MEMORY_UNAVAILABLE]
    assert session.given_up == []
    assert follower._trouble is None, "it passed"


async def test_the_copy_that_loses_ends_with_the_reason():
    session = Session(heartbeat=failure(Reason.CLIENT_REPLACED))
    follower = _Follower(session, Work(), LEARNER, 0.0)
    beating = asyncio.create_task(follower.beat())
    with pytest.raises(DomainError) as replaced:
        await follower.follow()
    assert replaced.value.reason is Reason.CLIENT_REPLACED
    beating.cancel()


async def test_a_halted_agent_keeps_the_newest_result():
    halt = pb.Assignment(
        assignment_id="halt/1", halt=pb.Halt(why="no", result=common_pb2.ResultRef(round_id="fed.1.3"))
    )
    work = Work()
    assert await _Follower(Session(halt), work, LEARNER, 0.0).follow() is Outcome.HALTED
    assert work.kept == ["fed.1.3"]


async def test_a_halted_agent_that_cannot_have_the_result_halts_all_the_same():
    halt = pb.Assignment(assignment_id="halt/1", halt=pb.Halt(why="no"))
    work = Work(failure(Reason.RESULT_UNKNOWN))
    assert await _Follower(Session(halt), work, LEARNER, 0.0).follow() is Outcome.HALTED


async def test_an_agent_that_comes_after_the_end_says_so_and_ends():
    session = Session(failure(Reason.CLIENT_UNKNOWN))

    async def closed(_model: object, _example_count: int) -> None:
        raise failure(Reason.FEDERATION_CLOSED)

    session.join = closed
    follower = _Follower(session, Work(), LEARNER, 0.0)
    await follower.join()
    with pytest.raises(DomainError) as late:
        await follower.follow()
    assert late.value.reason is Reason.FEDERATION_CLOSED


@pytest.mark.parametrize(
    ("joins", "watched"),
    [
        pytest.param(["FEDERATION_UNKNOWN"], None, id="joining"),
        pytest.param([None], "FEDERATION_UNKNOWN", id="following"),
        pytest.param(["FEDERATION_CLOSED", "FEDERATION_UNKNOWN"], "CLIENT_UNKNOWN", id="joining again"),
    ],
)
async def test_an_agent_whose_federation_is_deleted_halts_wherever_it_hears_of_it(joins, watched, capsys):
    """Simulation seed 20544: one that came while it was being deleted, and asked to join again, ended as if refused."""
    session, left = Session(*[failure(Reason(watched))] if watched else ()), list(joins)

    async def join(_model: object, _example_count: int) -> None:
        if reason := left.pop(0):
            raise failure(Reason(reason))

    session.join = join
    assert await _Follower(session, Work(), LEARNER, 0.0).take_part() is Outcome.HALTED
    assert not left
    assert "federation_gone" in "".join(capsys.readouterr())


@pytest.mark.parametrize("words", ["a\nb\x1b[31m", "x" * 1000, " \t ", "ünïcode"])
def test_words_that_leave_the_agent_are_printable_and_short(words):
    said = plain(words)
    assert len(said) <= MAX_WHY
    assert said.isprintable()


@pytest.mark.parametrize(
    ("reason", "told"),
    [(Reason.STORE_UNAVAILABLE, False), (Reason.STORE_FULL, False), (Reason.INTERNAL, True)],
)
async def test_an_objection_that_the_coordinator_did_not_take_for_now_is_told_again(
    monkeypatch: pytest.MonkeyPatch, reason: Reason, *, told: bool
):
    """Else a coordinator that restarts lets a useless result stand. INTERNAL: it is older, and has no such call."""

    def unread() -> None:
        raise DomainError(Reason.CONFIGURATION_INVALID, "no identity")

    async def refuse(*_arguments: object, **_limits: float) -> None:
        raise DomainError(reason, "not now")

    address = "127.0.0.1:1"
    config = SimpleNamespace(
        coordinator=address,
        key_authority=address,
        federation="f",
        client_id="a",
        identity=SimpleNamespace(read=unread),
    )
    monkeypatch.setattr(link, "call", refuse)
    talking = RealSession(config, None)
    try:
        with nullcontext() if told else pytest.raises(DomainError, match="not now"):
            await talking.object_to_result("f.1", "it forgets")
    finally:
        await talking.close()
