"""The daemon: follows assignments, one at a time, the newest first, and says that it is alive."""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Any, Final, TypeAlias

import structlog

from client_agent.acceptance import require_hidden, require_level
from client_agent.committees import Committees
from client_agent.config import AgentConfig, HiddenClient
from client_agent.drawing import seed_of
from client_agent.learning import LocalLearner
from client_agent.participation import Participation, Tools
from client_agent.progress import Activity, Progress, Stopped
from client_agent.replicas import replicas_for_transfers
from client_agent.session import Backoff, Session, is_fatal
from client_agent.state import AgentState
from client_agent.work import Work, work_of
from client_agent.worker import Worker
from shelora.errors import DomainError, Reason
from shelora.federation import ClientPrivacySpec, FederationSpec, TrainingSpec, one_step
from shelora.levels import Level
from shelora.protocol import Stage
from shelora.telemetry.outages import Outage
from shelora.transport.channel import OpenChannel, is_transient, open_channel
from shelora.transport.enrolment import keep_renewed, renewal_at
from shelora.transport.replicas import Replicas
from shelora.v1 import coordinator_pb2 as pb

Learn: TypeAlias = Callable[[AgentConfig, TrainingSpec, AgentState, int], LocalLearner]
"""Reads the data and loads the model, for that many rounds: `client_agent.learner.Learner`, or a stand-in."""

HEARTBEAT_S: Final = 5.0
"""Seconds to the next heartbeat unless the coordinator has named others."""
SOONEST_HEARTBEAT_S: Final = 1.0
LATEST_HEARTBEAT_S: Final = 3600.0
RETRY_S: Final = 5.0
"""Seconds before an assignment that failed for a reason that may pass is tried again, doubled each time."""
LONGEST_RETRY_S: Final = 60.0
STOP_GRACE_S: Final = 1.0
"""Seconds that work has to end by itself once it is no longer wanted."""

_OVER: Final = frozenset(
    {
        Reason.ROUND_NOT_COLLECTING,
        Reason.NOT_IN_COHORT,
        Reason.ROUND_UNKNOWN,
        Reason.UPDATE_REWRITTEN,
        Reason.LAYOUT_MISMATCH,
        Reason.TOO_FEW_CONTRIBUTORS,
        Reason.VALUE_NOT_FINITE,
        Reason.VALUE_OUT_OF_RANGE,
        Reason.EXAMPLES_MISMATCH,
        Reason.NORM_TOO_LARGE,
        Reason.PLAN_REFUSED,
        Reason.PLAN_UNKNOWN,
        Reason.NOT_LEADER,
        Reason.BALLOT_REFUSED,
        Reason.RESULT_UNKNOWN,
        Reason.RESULT_REFUSED,
        Reason.EPOCH_RETIRED,
        Reason.SIGNATURE_REFUSED,
        Reason.DEALING_REFUSED,
        Reason.SET_REFUSED,
        Reason.ROUND_SPENT,
        Reason.QUORUM_MISSING,
        Reason.ANSWERS_REFUSED,
        Reason.SUM_UNREADABLE,
        Reason.STATEMENT_REWRITTEN,
        Reason.STEP_OVER,
        Reason.PRIVACY_EXHAUSTED,
    }
)
"""The assignment cannot be done (any more), but the next one may."""

_log = structlog.get_logger(__name__)


class Outcome(StrEnum):
    """How an agent ended."""

    FINISHED = "finished"
    """The federation finished; the adapter is saved."""
    STOPPED = "stopped"
    """It was asked to stop; everything it needs to go on is on disk."""
    HALTED = "halted"
    """The federation failed."""


class Agent:
    """One client of one federation, from joining to the end.

    Args:
        config: Its settings.
        learn: Makes the learner; called in the worker.
        worker: Where blocking work is done; an agent of its own process has one to itself.
        connect: Opens its connections.
        retry_s: Seconds before a failed assignment is tried again, at first.
    """

    def __init__(
        self,
        config: AgentConfig,
        learn: Learn,
        *,
        worker: Worker | None = None,
        connect: OpenChannel = open_channel,
        retry_s: float = RETRY_S,
    ) -> None:
        self._config = config
        self._learn = learn
        self._worker = worker
        self._connect = connect
        self._retry_s = retry_s
        self._stopping = asyncio.Event()
        self._promised: Level | None = None
        """As its certificate says."""

    def stop(self) -> None:
        """Asks the agent to end soon; `run` then returns STOPPED. For signal handlers."""
        self._stopping.set()

    async def run(self) -> Outcome:
        """Follows the federation to its end.

        Raises: DomainError if something must be changed first: configuration, data, model, identity.
        """
        async with contextlib.AsyncExitStack() as stack:
            state = AgentState(self._config.state_dir)
            stack.callback(state.close)
            worker = self._worker or Worker()
            if self._worker is None:
                stack.push_async_callback(worker.close)
            credentials = self._config.credentials()
            self._promised = credentials.held.facts.promise
            session = Session(self._config, credentials, self._connect)
            stack.push_async_callback(session.close)
            shuffle = random.Random(seed_of(self._config.client_id, "replica")).shuffle  # noqa: S311 - no secret
            replicas = replicas_for_transfers(self._config.aggregation, credentials, self._connect, shuffle)
            stack.push_async_callback(replicas.close)
            obtain = renewal_at(self._config.key_authority, credentials)
            renewing = asyncio.create_task(keep_renewed(self._config.identity, obtain))
            stack.push_async_callback(_cancelled, renewing)
            following = asyncio.create_task(self._follow(state, worker, session, replicas))
            return await self._until_stopped(following)

    async def _until_stopped(self, following: asyncio.Task[Outcome]) -> Outcome:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return following.result() if following.done() else Outcome.STOPPED
        finally:
            await _cancelled(stopping)
            await _cancelled(following)

    async def _follow(
        self, state: AgentState, worker: Worker, session: Session, replicas: Replicas
    ) -> Outcome:
        async with _telling(session):
            follower = await self._prepared(state, worker, session, replicas)
        return await follower.take_part()

    async def _prepared(
        self, state: AgentState, worker: Worker, session: Session, replicas: Replicas
    ) -> "_Follower":
        """Holds the federation against what this client accepts, reads its data and loads its model."""
        spec = await self._specification(session)
        self._require_protection(spec.protection.level, state)
        if unwise := one_step(spec.protection.mode, spec.training.local_steps):
            _log.warning("one_step_a_round", why=unwise)
        self._require_hidden(spec.protection.client_privacy, state)
        learner = await worker.run(self._learn, self._config, spec.training, state, spec.round.rounds)
        _log.info("model_ready", matrices=len(learner.model.matrices), examples=len(learner.examples))
        tools = Tools(session=session, replicas=replicas, state=state, learner=learner, worker=worker)
        work = self._work(spec, tools)
        return _Follower(session, work, learner, self._retry_s)

    def _work(self, spec: FederationSpec, tools: Tools) -> Work:
        me = Participation(
            federation_id=self._config.federation,
            client_id=self._config.client_id,
            budget=self._config.budget,
            protection=spec.protection,
            reports_drift=spec.round.replan_below_overlap > 0,
            largest_move=spec.training.learning_rate * spec.training.local_steps,
            evaluation_every=spec.training.evaluation_every,
            examples_a_round=spec.training.seen(len(tools.learner.examples)),
            keeps_moments=self._config.training.keeps_moments,
        )
        committees = Committees(
            me.federation_id,
            me.client_id,
            spec.round,
            calls=tools.session.committee,
            state=tools.state,
            identity=self._config.identity,
            worker=tools.worker,
        )
        return work_of(me, tools, committees)

    def _require_protection(self, offered: Level, state: AgentState) -> None:
        """Refuses less than was promised or written, and remembers what it took part under.

        Raises: PROTECTION_REFUSED.
        """
        promises = (self._promised, state.promise())
        require_level(offered, self._config.protection.accept, promises)
        state.save_promise(offered)
        if offered is Level.NONE:
            _log.warning("updates_are_not_protected", federation=self._config.federation)

    def _require_hidden(self, offered: ClientPrivacySpec | None, state: AgentState) -> None:
        """The same of what sums tell of this client. Raises: PROTECTION_REFUSED."""
        hidden = None
        if offered is not None:
            hidden = HiddenClient(epsilon=offered.promised, delta=offered.delta, tolerated=offered.tolerated)
        require_hidden(hidden, self._config.protection.client_privacy, state.hidden())
        if hidden is not None:
            state.save_hidden(hidden)
            _log.info("client_privacy", **hidden.model_dump())

    async def _specification(self, session: Session) -> FederationSpec:
        """The federation's specification, waited for until its operator has created it."""
        outage = Outage(_log, "waiting_for_federation")
        while True:
            try:
                spec = await session.specification()
            except DomainError as error:
                if error.reason is not Reason.FEDERATION_UNKNOWN and not is_transient(error):
                    raise
                outage.failed(error)
                await asyncio.sleep(self._retry_s)
            else:
                return spec


def until_next_s(asked_s: float) -> float:
    """Seconds to the next heartbeat, from those that the coordinator asked for; 0: it asked for none."""
    return min(max(asked_s, SOONEST_HEARTBEAT_S), LATEST_HEARTBEAT_S) if asked_s else HEARTBEAT_S


class _Follower:
    """Turns the stream of assignments into work."""

    def __init__(self, session: Session, work: Work, learner: LocalLearner, retry_s: float) -> None:
        self._session = session
        self._work = work
        self._learner = learner
        self._retry_s = retry_s
        self._activity: Activity | None = None
        self._task: asyncio.Task[None] | None = None
        self._assignment_id: str | None = None
        self._notice = ""
        self._trouble: DomainError | None = None
        """What keeps this client from its newest work."""
        self._ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def take_part(self) -> Outcome:
        """Joins, and follows the federation to its end, which is also its deletion. Raises: as `join` and `follow`."""
        try:
            async with _telling(self._session):
                await self.join()
            return await self._as_member()
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_UNKNOWN:
                raise
            # It was there when this agent read what it specifies, so waiting for it to be created is of no use.
            _log.error("federation_gone", why=f"{error.message} any more: its operator deleted it")
            return Outcome.HALTED

    async def _as_member(self) -> Outcome:
        beating = asyncio.create_task(self.beat())
        try:
            outcome = await self.follow()
            if outcome is Outcome.FINISHED:
                await self.take_leave()
            return outcome
        finally:
            await _cancelled(beating)
            await self.drop()

    async def join(self) -> DomainError | None:
        """Makes this client a member; goes on trying while the coordinator does not answer, or memory is short.

        Returns: FEDERATION_CLOSED of a federation that has ended: no new member is taken, but those it has can follow.
        """
        wait, outage = Backoff(), Outage(_log, "join_failed")
        while True:
            try:
                self._work.require_memory()
                await self._session.join(self._learner.model, self._work.counted)
            except DomainError as error:
                if error.reason is Reason.FEDERATION_CLOSED:
                    _log.info("federation_closed", why=error.message)
                    return error
                if not is_transient(error):
                    raise
                outage.failed(error)
                await wait()
            else:
                return None

    async def follow(self) -> Outcome:
        """Does what is assigned until the federation has ended. Raises: FEDERATION_UNKNOWN once it is deleted."""
        watching = asyncio.create_task(self._watch())
        watching.add_done_callback(self._end_with)
        try:
            return await self._ended
        finally:
            await _cancelled(watching)

    async def beat(self) -> None:
        """Says what this client is doing, as often as the coordinator asks for."""
        while True:
            progress = self._activity.progress if self._activity else Progress()
            asked_s = 0.0
            try:
                asked_s = await self._session.heartbeat(progress, self._trouble)
            except DomainError as error:
                _log.debug("heartbeat_failed", reason=error.reason, why=error.message)
                if error.reason is Reason.CLIENT_REPLACED and not self._ended.done():
                    self._ended.set_exception(error)
            await asyncio.sleep(until_next_s(asked_s))

    async def take_leave(self) -> None:
        """Says that this client has what it came for."""
        with contextlib.suppress(DomainError):
            await self._session.heartbeat(Progress(Stage.FINISHED, 1.0))

    async def drop(self) -> None:
        """Stops the work in progress, if any: within a training step or a shard, and then without regard.

        A commit that is being answered, which is what makes the next assignment come, has time to end well.
        """
        if self._activity is not None:
            self._activity.stop()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=STOP_GRACE_S)
            await _cancelled(self._task)
        self._activity = self._task = None

    async def _watch(self) -> None:
        wait = Backoff()
        while True:
            try:
                async for assignment in self._session.assignments():
                    wait.reset()
                    await self._take(assignment)
            except DomainError as error:
                if error.reason is not Reason.CLIENT_UNKNOWN:
                    raise
                _log.info("joining_again", why=error.message)
                await wait()
                if closed := await self.join():  # it came too late
                    raise closed from error

    async def _take(self, assignment: pb.Assignment) -> None:
        """Starts an assignment; whatever was in progress is no longer wanted."""
        if assignment.assignment_id == self._assignment_id:
            return
        await self.drop()
        self._assignment_id = assignment.assignment_id
        mismatch = assignment.notice_reason == Reason.MODEL_MISMATCH
        if (
            mismatch and assignment.notice_round_id in self._work.committed
        ):  # not before a restart, of another model
            raise DomainError(Reason.MODEL_MISMATCH, assignment.notice)
        if assignment.notice and assignment.notice != self._notice:
            _log.warning("update_left_out", why=assignment.notice)
        self._notice = assignment.notice
        if not assignment.HasField("wait"):
            self._trouble = None
        kind = assignment.WhichOneof("work")
        if kind == "wait":
            _log.info("waiting", why=assignment.wait.why)
        else:
            _log.info("assigned", work=kind, assignment_id=assignment.assignment_id)
        if kind == "halt":
            _log.error("federation_failed", why=assignment.halt.why)
            self._activity = Activity()
            self._task = asyncio.create_task(self._halt(assignment.halt, self._activity))
            self._task.add_done_callback(self._end_with)
        elif kind is not None and kind != "wait":
            self._activity = Activity()
            self._task = asyncio.create_task(self._perform(assignment, self._activity))
            self._task.add_done_callback(self._end_with)

    async def _perform(self, assignment: pb.Assignment, activity: Activity) -> None:
        """Does one assignment, again and again while it fails for reasons that may pass."""
        wait_s, outage = self._retry_s, Outage(_log, "assignment_failed")
        while True:
            try:
                with self._work.writing():
                    await self._do(assignment, activity)
            except Stopped:
                pass
            except DomainError as error:
                self._trouble = error
                if is_fatal(error) or (error.reason in _OVER and assignment.HasField("finish")):
                    await self._told_why(assignment, error)
                    raise
                outage.failed(error)
                if error.reason not in _OVER:
                    activity.await_retry()
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_RETRY_S)
                    continue
                if not assignment.HasField("serve"):
                    await self._session.give_up(assignment.assignment_id, error)
                    await self._work.drop_update()
            except Exception as error:
                await self._session.give_up(assignment.assignment_id, _unexpected(error))
                raise
            else:
                self._trouble = None
            break
        if self._activity is activity:
            self._activity = None

    async def _told_why(self, assignment: pb.Assignment, error: DomainError) -> None:
        """Before an agent ends over its work it says so; and hears, if its final result is gone, that all of it is."""
        await self._session.give_up(assignment.assignment_id, error)
        with contextlib.suppress(DomainError):
            await self._session.heartbeat(
                Progress(), error
            )  # the operator sees it, whenever the next were due
        if assignment.HasField("finish"):
            await asyncio.sleep(self._retry_s)

    async def _halt(self, halt: pb.Halt, activity: Activity) -> None:
        """Keeps what there is of a federation that failed."""
        try:
            with self._work.writing():
                await self._work.keep_newest(halt, activity)
        except (DomainError, Stopped) as error:
            _log.warning("newest_result_not_kept", why=str(error))
        self._end(Outcome.HALTED)

    async def _do(self, assignment: pb.Assignment, activity: Activity) -> None:
        if assignment.HasField("vote"):
            await self._work.vote(assignment.vote, activity)
        elif assignment.HasField("make_plan"):
            await self._work.make_plan(assignment.make_plan, activity)
        elif assignment.HasField("train"):
            await self._work.train(assignment.train, activity)
        elif assignment.HasField("serve"):
            await self._work.serve(assignment.serve)
        elif assignment.HasField("finish"):
            await self._work.finish(assignment.finish, activity)
            self._end(Outcome.FINISHED)

    def _end(self, outcome: Outcome) -> None:
        if not self._ended.done():
            self._ended.set_result(outcome)

    def _end_with(self, task: asyncio.Task[None]) -> None:
        """Ends the agent with the error of a task that failed."""
        if not task.cancelled() and (error := task.exception()) and not self._ended.done():
            self._ended.set_exception(error)


@contextlib.asynccontextmanager
async def _telling(session: Session) -> AsyncIterator[None]:
    """What ends an agent before it is a member is said to the operator as well as to its owner."""
    try:
        yield
    except Exception as error:
        await session.could_not_join(error if isinstance(error, DomainError) else _unexpected(error))
        raise


def _unexpected(error: Exception) -> DomainError:
    """What is said of an error that may hold data."""
    return DomainError(Reason.INTERNAL, f"unexpected {type(error).__name__}: the agent's log says more")


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end, whatever it was."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def step_back(nice: int, set_nice: Callable[[int], int] = os.nice) -> None:
    """Lowers this process's priority by `nice`, 0 to 19."""
    if nice:
        set_nice(nice)
