"""What an agent does for each kind of assignment. Every method can be repeated: finished parts are on disk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final, TypeAlias

import structlog

from client_agent.committees import Attempt, Committees
from client_agent.downloads import Result, download
from client_agent.keys import EpochSecrets
from client_agent.learning import LocalLearner, Origin, Weights, weight_bytes
from client_agent.memory import require_memory, result_bytes, round_bytes
from client_agent.metrics import ROUNDS, Stopwatch, timed
from client_agent.negotiators import Desk, negotiator_of
from client_agent.progress import Activity
from client_agent.protection import (
    check_vote_layout,
    expected_layout,
    round_context,
    spool_update,
    summed,
    summing,
)
from client_agent.session import Session, digest_from_proto
from client_agent.standing import assess, stake_of
from client_agent.state import AgentState, Inbox, Spool, UpdateNote
from client_agent.uploads import upload
from client_agent.worker import Worker
from shelora.committee.context import COMMON_START, result_digest
from shelora.committee.dealer import Dealer
from shelora.committee.reader import OpenedRound
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec
from shelora.lora.kinds import largest_update_bytes
from shelora.lora.layout import Layout
from shelora.lora.restore import Restored, restore
from shelora.lora.shards import Float64, ResultShardContent
from shelora.messages import layout_from_proto, matrix_from_proto
from shelora.negotiation.plan import Plan, plan_context, seal_plan
from shelora.negotiation.sealed import Sealed
from shelora.negotiation.votes import summed_scores
from shelora.protocol import Stage
from shelora.strategies.agents.registry import agent_strategy_of
from shelora.transport.replicas import Replicas
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

_PlanKey: TypeAlias = tuple[bytes, str]
"""SHA-256 of a plan as it was published, and its vote: under another vote the same labels are other columns."""

COPIES: Final = 4
"""Times that weights are written in a round: as applied, as trained, as the adapter, perhaps as the best one."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this client is and what it committed to."""

    federation_id: str
    client_id: str
    budget: float
    """Share of columns it encrypts, 0 to 1."""
    protection: ProtectionSpec
    reports_drift: bool = False
    """Whether the federation asks how far top columns have moved from the plan."""
    largest_move: float = 0.0
    """How far local training can move one value at most: learning rate times local steps."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying a result took; zero if it had been applied before."""

    download_s: float = 0.0
    decrypt_s: float = 0.0
    download_bytes: int = 0


class Work:
    """The assignments of one client."""

    def __init__(
        self,
        identity: Identity,
        *,
        session: Session,
        replicas: Replicas,
        state: AgentState,
        learner: LocalLearner,
        worker: Worker,
        committees: Committees | None = None,
    ) -> None:
        """Takes what assignments need. `committees`: for strategies that need them."""
        self._me = identity
        self._committees = committees
        self._session = session
        self._replicas = replicas
        self._state = state
        self._learner = learner
        self._worker = worker
        self._strategy = agent_strategy_of(identity.protection.mode)
        self._negotiator = negotiator_of(
            identity.protection.negotiation,
            Desk(
                federation_id=identity.federation_id,
                matrices=learner.model.matrices,
                session=session,
                send=self._send,
                summed_votes=self._summed_votes,
            ),
        )
        hidden = identity.protection.client_privacy
        self._sums = state.sum_budget(hidden) if hidden else None
        """Under client privacy: sums that this client may be in. Then nothing of its examples is told beside them."""
        self._secrets: dict[int, EpochSecrets] = {}
        """Of the epochs that the newest assignment needs, at most two; others are forgotten."""
        self._newest_epoch = 0
        self._plans: dict[_PlanKey, Plan] = {}
        """Opened plans."""
        self._checked: set[_PlanKey] = set()
        """Plans that agree with the summed votes."""
        self._reported: set[str] = set()
        """Rounds whose result was evaluated."""
        self.committed: set[str] = set()
        """Rounds that this process has committed to, or was about to."""

    async def vote(self, vote: pb.Vote, activity: Activity) -> None:
        """Scores the columns and commits the encrypted votes, or casts a ballot."""
        layout = layout_from_proto(vote.round.layout)
        spool = await self._worker.run(self._state.spool, vote.round.round_id, layout.digest)
        if spool is None or (spool.note.base, spool.note.privacy) != (self._base, self._learner.privacy):
            check_vote_layout(layout, self._learner.model, self._me.protection)
            await self._require_resources(layout)
            secrets = await self._enter(vote.round.epoch)
            spool = await self._worker.run(self._spool_vote, vote.round.round_id, layout, secrets, activity)
        self.committed.add(spool.note.round_id)
        await self._negotiator.send(spool, activity)

    async def make_plan(self, task: pb.MakePlan, activity: Activity) -> None:
        """Ranks the summed votes and publishes the sealed plan."""
        matrices = tuple(matrix_from_proto(m) for m in task.matrices)
        if matrices != self._learner.model.matrices:
            raise DomainError(Reason.LAYOUT_MISMATCH, "the plan is asked for matrices of another model")
        secrets = await self._enter(task.votes.epoch)
        scores = await self._summed_votes(task.votes, secrets, activity)
        plan = Sealed(matrices).plan(scores, tuple(task.tiers))
        context = plan_context(self._me.federation_id, task.plan_number)
        sealed = seal_plan(plan, secrets.obfuscation.plan_key(), context)
        await self._session.publish_plan(task.plan_number, sealed, plan.matrices_with_counts(matrices))
        _log.info("plan_published", plan_number=task.plan_number, columns=len(plan.columns))

    async def train(self, train: pb.Train, activity: Activity) -> None:
        """Applies the base result, evaluates it, trains, commits the update."""
        layout = layout_from_proto(train.round.layout)
        attempt = await self._joined(train, layout)
        spool = await self._worker.run(self._state.spool, train.round.round_id, layout.digest)
        now = (self.counted, self._base, self._learner.privacy)
        if spool is None or _made_with(spool.note) != now:  # as before a restart
            base = train.base if train.HasField("base") else None
            await self._require_resources(layout, base, copies=COPIES)
            secrets = await self._enter(train.round.epoch)
            plan = await self._checked_plan(train, layout, secrets, activity)
            self._strategy.check(layout, self._learner.model, self._me.protection, plan, self._me.budget)
            await self._begin_from(train, secrets, activity)
            self._require_sum(attempt)
            self._forget_others(train.round.epoch)
            trained = await self._worker.run(self._trained, train, plan, attempt, activity)
            dealer = await self._dealer(attempt)
            spool = await self._worker.run(
                self._spool_update, train.round.number, trained, layout, plan, secrets, dealer, activity
            )
        self.committed.add(spool.note.round_id)
        await self._send(spool, activity)

    @property
    def counted(self) -> int:
        """Examples that this client says it has: 1 under client privacy, for all alike."""
        return 1 if self._sums else len(self._learner.examples)

    async def serve(self, serve: pb.Serve) -> None:
        """Does the next step of a member of the round's committee."""
        await self._convening.serve(serve)

    @property
    def _convening(self) -> Committees:
        if self._committees is None:
            raise DomainError(Reason.COMMITTEE_REFUSED, "this federation's sums are opened by no committee")
        return self._committees

    async def _joined(self, train: pb.Train, layout: Layout) -> Attempt | None:
        """The round of a committee, which this client has told its view and, as a member, its key.

        Said before anything else is done: the others wait for it. Raises: COMMITTEE_REFUSED.
        """
        if not self._me.protection.strategy.needs_committee:
            return None
        round_, start = train.round, COMMON_START
        if train.HasField("base"):
            start = _digest_of(train.base)
            await self._worker.run(self._state.require_result, train.base.round_id, start)
        attempt = self._convening.attempt(round_, layout, await self._enter(round_.epoch), start)
        await self._convening.join(attempt)
        return attempt

    async def _dealer(self, attempt: Attempt | None) -> Dealer | None:
        """What encrypts this client's update, once the committee's keys are there."""
        if attempt is None:
            return None
        return self._convening.dealer(attempt, await self._convening.keys(attempt))

    async def finish(self, finish: pb.Finish, activity: Activity) -> None:
        """Applies the final result, evaluates on every test example, saves the adapter."""
        plan = finish.plan if finish.HasField("plan") else None
        applied = await self._applied_and_kept(finish.result, plan, activity)
        _log.info("adapter_saved", folder=str(self._state.adapter_folder))
        try:
            await self._report(finish.result, applied, activity, everything=True)
        except (
            DomainError
        ) as error:  # the adapter is what counts: an evaluation that cannot be told does not fail it
            _log.warning("final_evaluation_not_reported", reason=error.reason, why=error.message)

    async def keep_newest(self, halt: pb.Halt, activity: Activity) -> None:
        """Applies the newest result of a federation that failed, if there is any, and saves the adapter."""
        if not halt.HasField("result"):
            _log.warning("no_adapter", why="no round was published")
            return
        plan = halt.plan if halt.HasField("plan") else None
        await self._applied_and_kept(halt.result, plan, activity)
        _log.info("adapter_saved", folder=str(self._state.adapter_folder), round=halt.result.round_number)

    async def drop_update(self) -> None:
        """Deletes the spooled update: its round does not want it any more."""
        ROUNDS.labels(outcome="dropped").inc()
        await self._worker.run(self._state.drop_spool)

    def writing(self) -> AbstractContextManager[None]:
        """Around an assignment. Raises: DISK_UNAVAILABLE if the disk refuses what is written inside."""
        return self._state.writing()

    async def secrets(self, epoch: int) -> EpochSecrets:
        """The secrets of an epoch, fetched once. A strategy without keys has none."""
        if epoch not in self._secrets:
            self._secrets[epoch] = (
                EpochSecrets.unprotected(self._me.federation_id, epoch)
                if not self._me.protection.strategy.needs_keys
                else await self._session.secrets(epoch)
            )
        return self._secrets[epoch]

    def require_memory(self) -> None:
        """Raises: MEMORY_UNAVAILABLE if this client's rounds need more, as far as that is known before the first."""
        model = self._learner.model
        require_memory(round_bytes(model, expected_layout(model, self._me.budget, self._me.protection)))

    async def _require_resources(
        self, update: Layout | None, result: common_pb2.ResultRef | None = None, copies: int = 0
    ) -> None:
        """Deletes earlier updates if another one follows, and sees that the work at hand has room on disk and memory.

        Args: copies: Times that weights will be written beside those that are there.
        Raises: DISK_UNAVAILABLE, MEMORY_UNAVAILABLE.
        """
        needed, restoring = copies * weight_bytes(self._learner.model), 0
        if result is not None and not await self._worker.run(self._learner.holds, result.round_id):
            arrived = await self._worker.run(self._state.arrived_bytes, result.round_id)
            announced = Result.from_proto(result)
            needed += max(announced.total_bytes - arrived, 0)
            restoring = result_bytes(announced.layout, [shard.total_bytes for shard in announced.shards])
        if update is not None:
            await self._worker.run(self._state.drop_spool)
            own = replace(update, max_rank=min(update.max_rank, self._learner.model.rank))
            needed += sum(largest_update_bytes(own))
        self._state.require_room(needed)
        require_memory(round_bytes(self._learner.model, update, restoring))

    async def _enter(self, epoch: int) -> EpochSecrets:
        """The secrets of the epoch that a round is in.

        Raises: EPOCH_RETIRED if a later one has begun: who was revoked since knows the secrets of this one.
        """
        if epoch < self._newest_epoch:
            raise DomainError(
                Reason.EPOCH_RETIRED,
                f"a round in epoch {epoch} is refused: this agent took part in epoch {self._newest_epoch}",
            )
        secrets = await self.secrets(epoch)
        self._newest_epoch = epoch
        return secrets

    def _forget_others(self, epoch: int) -> None:
        """Forgets the secrets of other epochs; what they are needed for again would be fetched again."""
        self._secrets = {known: secrets for known, secrets in self._secrets.items() if known == epoch}

    async def _begin_from(self, train: pb.Train, secrets: EpochSecrets, activity: Activity) -> None:
        """Makes the state that the round starts from current, and reports how good it is."""
        if not train.HasField("base"):
            await self._worker.run(self._learner.start, secrets)
            return
        plan = train.base_plan if train.HasField("base_plan") else None
        applied = await self._apply(train.base, plan, activity)
        if train.base.round_id not in self._reported:
            await self._save_adapter(train.base)
            await self._report(train.base, applied, activity, everything=False)

    async def _applied_and_kept(
        self, result: common_pb2.ResultRef, plan: pb.PlanRef | None, activity: Activity
    ) -> Applied:
        """Applies a result that no training follows, and saves the adapter."""
        await self._require_resources(None, result, copies=COPIES)
        applied = await self._apply(result, plan, activity)
        await self._save_adapter(result)
        return applied

    async def _save_adapter(self, result: common_pb2.ResultRef) -> None:
        write = partial(self._learner.save_adapter, made=_origin(result))
        await self._worker.run(self._state.save_adapter, write)

    async def _apply(
        self,
        reference: common_pb2.ResultRef,
        plan_ref: pb.PlanRef | None,
        activity: Activity,
    ) -> Applied:
        """Applies a result with the secrets of its own epoch, whatever the next round's is."""
        if await self._worker.run(self._learner.holds, reference.round_id):
            return Applied()
        result = Result.from_proto(reference)
        secrets = await self.secrets(reference.epoch)
        self._strategy.check_result(result.layout, self._learner.model)
        plan = await self._opened_plan(plan_ref, secrets) if plan_ref else None
        opened = None
        if self._me.protection.strategy.needs_committee:
            opened = await self._convening.opened(reference, result.layout, secrets)
            await self._worker.run(self._state.note_result, reference.round_id, _digest_of(reference))
        watch = Stopwatch()
        inbox = await download(self._replicas, self._state, result, activity)
        download_s = watch.seconds
        watch = Stopwatch()
        await self._worker.run(self._restore_and_apply, result, inbox, plan, secrets, opened, activity)
        return Applied(download_s, watch.seconds, result.total_bytes)

    async def _report(
        self, result: common_pb2.ResultRef, applied: Applied, activity: Activity, *, everything: bool
    ) -> None:
        round_id = result.round_id
        measured = await self._worker.run(self._learner.evaluate, activity, everything=everything)
        self._reported.add(round_id)
        if measured is None:
            return
        _log.info(
            "evaluated", round=round_id, loss=measured.loss, correct=measured.correct, count=measured.count
        )
        card = self._learner.card(_origin(result), measured)
        await self._worker.run(self._state.replace_card, card)
        if await self._worker.run(self._state.keep_if_best, self._me.federation_id, round_id, measured.loss):
            _log.info("best_adapter_so_far", round=round_id, folder=str(self._state.best_folder))
        report = pb.EvaluationReport(
            download_s=applied.download_s,
            decrypt_s=applied.decrypt_s,
            download_bytes=applied.download_bytes,
        )
        if self._sums is None:
            report.example_count, report.correct_count = measured.count, measured.correct
            report.loss, report.evaluate_s = measured.loss, measured.seconds
        await self._session.report_evaluation(round_id, report)

    async def _checked_plan(
        self, train: pb.Train, layout: Layout, secrets: EpochSecrets, activity: Activity
    ) -> Plan | None:
        """The plan of a round, checked against the summed votes; a wrong one is rejected."""
        if not train.HasField("plan"):
            return None
        reference = train.plan
        digest = digest_from_proto(reference.digest)
        try:
            plan = await self._opened_plan(reference, secrets)
            if _key(reference) not in self._checked:
                await self._negotiator.check(plan, reference, layout, secrets, activity)
                self._checked.add(_key(reference))
        except DomainError as error:
            if error.reason is Reason.PLAN_REFUSED:
                await self._session.reject_plan(reference.plan_number, digest, error.message)
            raise
        return plan

    async def _opened_plan(self, reference: pb.PlanRef, secrets: EpochSecrets) -> Plan:
        key = _key(reference)
        if key not in self._plans:
            content = await self._session.fetch_plan(
                reference.plan_number, digest_from_proto(reference.digest)
            )
            self._plans[key] = self._negotiator.open(content, reference, secrets)
        return self._plans[key]

    async def _summed_votes(
        self, reference: common_pb2.ResultRef, secrets: EpochSecrets, activity: Activity
    ) -> dict[str, Float64]:
        result = Result.from_proto(reference)
        await self._require_resources(None, reference)
        check_vote_layout(result.layout, self._learner.model, self._me.protection)
        inbox = await download(self._replicas, self._state, result, activity)
        restored = await self._worker.run(_summed, result, inbox, secrets, activity)
        inbox.clear()
        return summed_scores(self._learner.model.matrices, restored.tensors)

    async def _send(self, spool: Spool, activity: Activity) -> None:
        seconds = await upload(self._replicas, self._me.client_id, spool, activity)
        count = await self._session.commit(spool, seconds)
        ROUNDS.labels(outcome="committed").inc()
        _log.info(
            "update_committed", round=spool.note.round_id, bytes_sent=spool.total_bytes, update_count=count
        )

    @property
    def _base(self) -> str:
        return self._learner.base.hex() if self._learner.base else ""

    def _with_base(self, note: UpdateNote, secrets: EpochSecrets) -> UpdateNote:
        """The note with how it was made, and what others compare their base model by."""
        note = replace(note, privacy=self._learner.privacy)
        base = self._learner.base
        if base is None:
            return note
        tags = {part: secrets.obfuscation.tag(part, digest).hex() for part, digest in asdict(base).items()}
        return replace(note, base=base.hex(), base_tags=tags)

    def _spool_vote(self, round_id: str, layout: Layout, secrets: EpochSecrets, activity: Activity) -> Spool:
        self._learner.resume(secrets)
        watch = Stopwatch()
        scores = self._learner.score(activity)
        stake = stake_of(self._state.standing(), self._me.protection, self._me.budget)
        # Aggregation weight 1: votes count alike, however many examples their clients hold.
        note = UpdateNote(round_id, layout.digest, 1, 1.0, 1, 0.0, watch.seconds, 0.0)
        writer = self._state.begin_spool(round_id)
        for vote in self._negotiator.cast(layout, scores, stake, round_id, secrets):
            writer.add(vote)
        note = replace(note, encrypt_s=watch.seconds - note.train_s)
        return writer.finish(self._with_base(note, secrets))

    def _trained(
        self, train: pb.Train, plan: Plan | None, attempt: Attempt | None, activity: Activity
    ) -> tuple[UpdateNote, Weights]:
        """What this client trained, and what is committed with it."""
        overlap = self._assessed(plan, train.plan.vote_round_id, activity) if plan else None
        variant = attempt.variant if attempt else ""
        trained = self._learner.train(train.round.number, activity, variant)
        model = self._learner.model
        note = UpdateNote(
            round_id=train.round.round_id,
            layout_digest=b"",
            rank=model.rank,
            scaling=model.scaling,
            example_count=self.counted,
            train_loss=0.0 if self._sums else trained.loss,
            train_s=trained.seconds,
            encrypt_s=0.0,
            overlap=overlap,
        )
        return note, trained.weights

    def _spool_update(
        self,
        number: int,
        trained: tuple[UpdateNote, Weights],
        layout: Layout,
        plan: Plan | None,
        secrets: EpochSecrets,
        dealer: Dealer | None,
        activity: Activity,
    ) -> Spool:
        note, weights = trained
        known = round_context(self._learner.model, layout, plan, self._me.budget, secrets)
        deal: Callable[[Sequence[bytes]], bytes] | None = None
        if dealer is not None:
            round_ = dealer.context
            weight = min(note.example_count, round_.most_weight)
            known = summing(known, dealer, weight, self._me.largest_move)
            deal = partial(_dealt, dealer, weight)
            if self._sums:
                known = replace(known, reference=self._learner.start_of(number))
                self._sums.take(round_.instance, round_.round_number)
                _log.info("client_privacy_spent", round=note.round_id, epsilon=round(self._sums.spent(), 3))
        return spool_update(
            self._state,
            layout,
            weights,
            self._with_base(replace(note, layout_digest=layout.digest), secrets),
            strategy=self._strategy,
            context=known,
            deal=deal,
            activity=activity,
        )

    def _require_sum(self, attempt: Attempt | None) -> None:
        """Raises: PRIVACY_EXHAUSTED if the round's sum would tell more of this client than was promised."""
        if self._sums and attempt:
            self._sums.require(attempt.context.instance, attempt.context.round_number)

    def _assessed(self, plan: Plan, vote_round_id: str, activity: Activity) -> float | None:
        """Takes a new plan into account for the next vote; what is reported of drift."""
        return assess(
            self._state,
            self._learner,
            plan,
            vote_round_id,
            floor=self._me.protection.coverage_floor,
            largest=self._me.protection.largest_vote,
            budget=self._me.budget,
            reports_drift=self._me.reports_drift,
            activity=activity,
        )

    def _restore_and_apply(
        self,
        result: Result,
        inbox: Inbox,
        plan: Plan | None,
        secrets: EpochSecrets,
        opened: OpenedRound | None,
        activity: Activity,
    ) -> None:
        with timed(Stage.DECRYPTING):
            known = round_context(self._learner.model, result.layout, plan, self._me.budget, secrets)
            if opened is not None:
                known = summed(known, opened, self._me.largest_move)
                known = replace(known, reference=self._learner.start_of(result.number))
            parts = self._strategy.restored(result.layout, _contents(result, inbox, activity), known)
            self._learner.apply(result.round_id, parts, secrets.obfuscation, result.number)
            if known.cut:
                _log.warning("change_cut", parts=sorted(known.cut), why="no honest clients can have sent it")
        inbox.clear()  # last: whoever dies before has the shards still


def _dealt(dealer: Dealer, weight: int, shards: Sequence[bytes]) -> bytes:
    """The key of an update with these shards, shared among the committee."""
    return dealer.deal(shards, weight).SerializeToString()


def _digest_of(reference: common_pb2.ResultRef) -> bytes:
    return result_digest(reference.round_id, (shard.sha256 for shard in reference.shards))


def _made_with(note: UpdateNote) -> tuple[int, str, str]:
    """Examples, base model and privacy that an update was made with."""
    return note.example_count, note.base, note.privacy


def _origin(result: common_pb2.ResultRef) -> Origin:
    return Origin(result.round_number, result.contributor_count)


def _key(reference: pb.PlanRef) -> _PlanKey:
    return reference.digest.sha256, reference.vote_round_id


def _summed(result: Result, inbox: Inbox, secrets: EpochSecrets, activity: Activity) -> Restored:
    """Decrypts a downloaded vote."""
    with timed(Stage.DECRYPTING):
        decryptor = secrets.decryptor_for(result.layout)
        return restore(result.layout, _contents(result, inbox, activity), {}, decryptor)


def _contents(result: Result, inbox: Inbox, activity: Activity) -> Iterator[ResultShardContent]:
    """The shards of a downloaded result, one in memory at a time."""
    for done, content in enumerate(result.contents(inbox)):
        activity.report(Stage.DECRYPTING, done / len(result.shards))
        yield content
