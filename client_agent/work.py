"""What an agent does for each kind of assignment. Every method can be repeated: finished parts are on disk."""

from contextlib import AbstractContextManager

import structlog

from client_agent.applying import Applier, digest_of
from client_agent.attempts import Attempt
from client_agent.committees import Committees
from client_agent.keyring import Keyring
from client_agent.making import Maker
from client_agent.metrics import ROUNDS
from client_agent.negotiators import Desk, Negotiator, negotiator_of
from client_agent.participation import Participation, Tools
from client_agent.plans import Plans
from client_agent.progress import Activity
from client_agent.protection import check_vote_layout
from client_agent.resources import COPIES, Resources
from client_agent.sending import Sender
from client_agent.state import Spool
from client_agent.vote_sums import VoteSums
from shelora.committee.context import COMMON_START
from shelora.committee.dealer import Dealer
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.messages import layout_from_proto, matrix_from_proto
from shelora.negotiation.plan import plan_context, seal_plan
from shelora.negotiation.sealed import Sealed
from shelora.strategies.agents.registry import agent_strategy_of
from shelora.v1 import coordinator_pb2 as pb

_log = structlog.get_logger(__name__)


class Work:
    """The assignments of one client.

    Args:
        me: Who this client is.
        tools: What it works with.
        keyring: Secrets of epochs.
        resources: Room on disk and in memory.
        negotiator: How it votes.
        vote_sums: What votes came to.
        plans: Opened plans.
        maker: Makes votes and updates.
        applier: Applies results.
        sender: Sends updates.
        committees: This client's part in them.
    """

    def __init__(
        self,
        me: Participation,
        tools: Tools,
        *,
        keyring: Keyring,
        resources: Resources,
        negotiator: Negotiator,
        vote_sums: VoteSums,
        plans: Plans,
        maker: Maker,
        applier: Applier,
        sender: Sender,
        committees: Committees,
    ) -> None:
        self._me = me
        self._session = tools.session
        self._state = tools.state
        self._model = tools.learner.model
        self._run = tools.worker.run
        self._strategy = agent_strategy_of(me.protection.mode)
        self._keyring = keyring
        self._resources = resources
        self._negotiator = negotiator
        self._vote_sums = vote_sums
        self._plans = plans
        self._maker = maker
        self._applier = applier
        self._sender = sender
        self._committees = committees
        self.committed: set[str] = set()
        """Rounds that this process has committed to, or was about to."""

    async def vote(self, vote: pb.Vote, activity: Activity) -> None:
        """Scores the columns and commits the encrypted votes, or casts a ballot."""
        layout, round_ = layout_from_proto(vote.round.layout), vote.round
        spool = await self._run(self._state.spool, round_.round_id, layout.digest)
        if spool is None or not self._maker.is_current(spool.note, vote=True):
            check_vote_layout(layout, self._model, self._me.protection)
            await self._resources.require(layout)
            secrets = await self._keyring.enter(round_.epoch)
            spool = await self._run(self._maker.vote, round_.round_id, layout, secrets, activity)
        self.committed.add(spool.note.round_id)
        await self._negotiator.send(spool, activity)

    async def make_plan(self, task: pb.MakePlan, activity: Activity) -> None:
        """Ranks the summed votes and publishes the sealed plan."""
        matrices = tuple(matrix_from_proto(m) for m in task.matrices)
        if matrices != self._model.matrices:
            raise DomainError(Reason.LAYOUT_MISMATCH, "the plan is asked for matrices of another model")
        secrets = await self._keyring.enter(task.votes.epoch)
        scores = await self._vote_sums.read(task.votes, secrets, activity)
        plan = Sealed(matrices).plan(scores, tuple(task.tiers))
        context = plan_context(self._me.federation_id, task.plan_number)
        sealed = seal_plan(plan, secrets.obfuscation.plan_key(), context)
        await self._session.publish_plan(task.plan_number, sealed, plan.matrices_with_counts(matrices))
        _log.info("plan_published", plan_number=task.plan_number, columns=len(plan.columns))

    async def train(self, train: pb.Train, activity: Activity) -> None:
        """Applies the base result, evaluates it, trains, commits the update."""
        layout = layout_from_proto(train.round.layout)
        attempt = await self._joined(train, layout)
        spool = await self._run(self._state.spool, train.round.round_id, layout.digest)
        if spool is None or not self._maker.is_current(spool.note):
            spool = await self._made(train, layout, attempt, activity)
        self.committed.add(spool.note.round_id)
        await self._sender.send(spool, activity)

    async def _made(
        self, train: pb.Train, layout: Layout, attempt: Attempt | None, activity: Activity
    ) -> Spool:
        """The update of a round, trained and protected."""
        base = train.base if train.HasField("base") else None
        await self._resources.require(layout, base, copies=COPIES)
        secrets = await self._keyring.enter(train.round.epoch)
        plan = await self._plans.checked(train, layout, secrets, activity)
        self._strategy.check(layout, self._model, self._me.protection, plan, self._me.budget)
        measured = await self._applier.begin_from(train, secrets, activity)
        self._maker.require_sum(attempt)
        self._keyring.forget_others(train.round.epoch)
        made = await self._run(self._maker.train, train, plan, attempt, measured, activity)
        dealer = await self._dealer(attempt)
        return await self._run(
            self._maker.protect, train.round.number, made, layout, plan, secrets, dealer, activity
        )

    async def _dealer(self, attempt: Attempt | None) -> Dealer | None:
        """What encrypts this client's update, once the committee's keys are there."""
        if attempt is None:
            return None
        return self._committees.dealer(attempt, await self._committees.keys(attempt))

    @property
    def counted(self) -> int:
        """Examples that this client says it has."""
        return self._maker.counted

    async def serve(self, serve: pb.Serve) -> None:
        """Does the next step of a member of the round's committee. Raises: COMMITTEE_REFUSED."""
        if not self._me.protection.strategy.needs_committee:
            raise DomainError(Reason.COMMITTEE_REFUSED, "this federation's sums are opened by no committee")
        await self._committees.serve(serve)

    async def _joined(self, train: pb.Train, layout: Layout) -> Attempt | None:
        """The round of a committee, which this client has told its view and, as a member, its key.

        Said before anything else is done: the others wait for it. Raises: COMMITTEE_REFUSED.
        """
        if not self._me.protection.strategy.needs_committee:
            return None
        round_, start = train.round, COMMON_START
        if train.HasField("base"):
            start = digest_of(train.base)
            await self._run(self._state.require_result, train.base.round_id, start)
        attempt = self._committees.attempt(round_, layout, await self._keyring.enter(round_.epoch), start)
        await self._committees.join(attempt)
        return attempt

    async def finish(self, finish: pb.Finish, activity: Activity) -> None:
        """Applies the final result, evaluates on every test example, saves the adapter."""
        plan = finish.plan if finish.HasField("plan") else None
        applied = await self._applier.keep(finish.result, plan, activity)
        try:
            await self._applier.report(finish.result, applied, activity, everything=True)
        except (
            DomainError
        ) as error:  # the adapter is what counts: that its evaluation is not told does not fail it
            _log.warning("final_evaluation_not_reported", reason=error.reason, why=error.message)

    async def keep_newest(self, halt: pb.Halt, activity: Activity) -> None:
        """Applies the newest result of a federation that failed, if there is any, and saves the adapter."""
        if not halt.HasField("result"):
            _log.warning("no_adapter", why="no round was published")
            return
        await self._applier.keep(halt.result, halt.plan if halt.HasField("plan") else None, activity)

    async def drop_update(self) -> None:
        """Deletes the spooled update: its round does not want it any more."""
        ROUNDS.labels(outcome="dropped").inc()
        await self._run(self._state.drop_spool)

    def writing(self) -> AbstractContextManager[None]:
        """Around an assignment. Raises: DISK_UNAVAILABLE if the disk refuses what is written inside."""
        return self._state.writing()

    def require_memory(self) -> None:
        """Raises: MEMORY_UNAVAILABLE if this client's rounds need more, as far as that is known before the first."""
        self._resources.require_memory()


def work_of(me: Participation, tools: Tools, committees: Committees) -> Work:
    """Puts the work of one client together."""
    keyring, resources, sender = Keyring(me, tools.session), Resources(me, tools), Sender(me, tools)
    vote_sums = VoteSums(me, tools, resources)
    desk = Desk(
        federation_id=me.federation_id,
        matrices=tools.learner.model.matrices,
        session=tools.session,
        send=sender.send,
        summed_votes=vote_sums.read,
    )
    negotiator = negotiator_of(me.protection.negotiation, desk)
    plans, hidden = Plans(tools.session, negotiator), me.protection.client_privacy
    return Work(
        me,
        tools,
        keyring=keyring,
        resources=resources,
        negotiator=negotiator,
        vote_sums=vote_sums,
        plans=plans,
        maker=Maker(me, tools, negotiator, tools.state.sum_budget(hidden) if hidden else None),
        applier=Applier(me, tools, keyring=keyring, plans=plans, resources=resources, committees=committees),
        sender=sender,
        committees=committees,
    )
