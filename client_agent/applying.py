"""Applies results: downloads, opens and decrypts them; saves the adapter; evaluates and reports it."""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Final

import structlog

from client_agent.adapters import Newest, Ranked
from client_agent.committees import Committees
from client_agent.downloads import Result, contents, download
from client_agent.keyring import Keyring
from client_agent.keys import EpochSecrets
from client_agent.learning import Evaluation, Origin
from client_agent.metrics import Stopwatch, timed
from client_agent.participation import Participation, Tools
from client_agent.plans import Plans
from client_agent.progress import Activity
from client_agent.protection import round_context, summed
from client_agent.resources import COPIES, Resources
from client_agent.state import Inbox
from shelora.committee.context import result_digest
from shelora.committee.reader import OpenedRound
from shelora.errors import DomainError
from shelora.lora.figures import Figures
from shelora.negotiation.plan import Plan
from shelora.protocol import Stage
from shelora.strategies.agents.registry import agent_strategy_of
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

FINGERPRINT: Final = 16
"""Hexadecimal digits of a result's fingerprint."""
DIGITS: Final = MappingProxyType({"accuracy": 4, "loss": 3, "train_loss": 2})
"""Decimal digits of the means that the coordinator is told. Exact losses would say more than anybody reads."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying a result took; zero if it had been applied before."""

    download_s: float = 0.0
    decrypt_s: float = 0.0
    download_bytes: int = 0


class Applier:
    """Makes the state that a round starts from, or a federation ends with, current.

    Args:
        me: Who this client is.
        tools: What it works with.
        keyring: Secrets of epochs.
        plans: Opened plans.
        resources: Room on disk and in memory.
        committees: Open sums.
    """

    def __init__(
        self,
        me: Participation,
        tools: Tools,
        *,
        keyring: Keyring,
        plans: Plans,
        resources: Resources,
        committees: Committees,
    ) -> None:
        self._me = me
        self._tools = tools
        self._learner = tools.learner
        self._run = tools.worker.run
        self._strategy = agent_strategy_of(me.protection.mode)
        self._keyring = keyring
        self._plans = plans
        self._resources = resources
        self._committees = committees
        self._reported: dict[str, Evaluation | None] = {}
        """What was measured of results, by round."""
        self._saved = ""
        """Round whose result the adapter on disk is; "" if that is not known."""

    async def begin_from(
        self, train: pb.Train, secrets: EpochSecrets, activity: Activity
    ) -> Evaluation | None:
        """Makes the state that the round starts from current, saves its adapter, and reports on it.

        If this client objects to it, the adapter stays that of the result before.

        Returns: How good it is on this client's test examples; None if that is not evaluated.
        Raises: what passes if the objection cannot be told: nothing is trained before it is.
        """
        if not train.HasField("base"):
            await self._run(self._learner.start, secrets)
            await self._follow(Newest(round_id=train.round.round_id, number=0))
            await self._run(self._learner.write_samples, 0, activity)
            return None
        plan = train.base_plan if train.HasField("base_plan") else None
        applied = await self._apply(train.base, plan, activity)
        await self._object_to(train.base)
        if not self._learner.objection:
            await self._save_adapter(train.base)
        if train.base.round_id not in self._reported:
            due = train.base.round_number % self._me.evaluation_every == 0
            measured = await self._evaluate(train.base, activity, everything=False) if due else None
            self._reported[train.base.round_id] = measured
            await self._tell(train.base, applied, measured)
        return self._reported[train.base.round_id]

    async def keep(
        self, result: common_pb2.ResultRef, plan: pb.PlanRef | None, activity: Activity
    ) -> Applied:
        """Applies a result that no training follows, and saves the adapter.

        If this client objects to it, the adapter stays that of the result before, if this federation had one.
        """
        await self._resources.require(None, result, copies=COPIES)
        applied = await self._apply(result, plan, activity)
        with suppress(DomainError):  # it is reported when another round begins from there, if one does
            await self._object_to(result)
        adapters, folder = self._tools.state.adapters, self._tools.state.adapters.newest
        if self._learner.objection and adapters.is_beside(result.round_id):
            kept = f"the adapter of the result before, in {folder}"
            _log.error("last_result_not_kept", why=self._learner.objection, kept=kept)
            return applied
        await self._save_adapter(result)
        _log.info(
            "adapter_saved", folder=str(folder), round=result.round_number, fingerprint=fingerprint(result)
        )
        return applied

    async def _object_to(self, result: common_pb2.ResultRef) -> None:
        """Says so if the current state, which is that result, serves this client badly."""
        if why := self._learner.objection:
            await self._tools.session.object_to_result(result.round_id, why)

    async def report(
        self, result: common_pb2.ResultRef, applied: Applied, activity: Activity, *, everything: bool
    ) -> None:
        """Evaluates, keeps the best adapter, reports. Args: everything: on every test example."""
        measured = await self._evaluate(result, activity, everything=everything)
        self._reported[result.round_id] = measured
        await self._tell(result, applied, measured)

    async def _evaluate(
        self, result: common_pb2.ResultRef, activity: Activity, *, everything: bool
    ) -> Evaluation | None:
        """Evaluates the current state, which is that result, and keeps the best adapter."""
        round_id = result.round_id
        await self._run(self._learner.write_samples, result.round_number, activity)
        measured = await self._run(self._learner.evaluate, activity, everything=everything)
        if measured is None:
            return None
        await self._run(self._tools.state.measured.note_own, round_id, result.round_number, measured)
        _log.info(
            "evaluated",
            round=round_id,
            loss=measured.loss,
            correct=measured.correct,
            count=measured.count,
            figures=dict(measured.figures),
        )
        if not self._learner.objection:
            await self._rank_adapter(result, measured)
        return measured

    async def _tell(
        self, result: common_pb2.ResultRef, applied: Applied, measured: Evaluation | None
    ) -> None:
        """Reports what there is to say of a result."""
        means = await self._run(self._tools.state.measured.means, result.round_id)
        if measured is None and means is None:
            return
        report = pb.EvaluationReport(
            download_s=applied.download_s,
            decrypt_s=applied.decrypt_s,
            download_bytes=applied.download_bytes,
        )
        if means is not None:
            report.means.CopyFrom(means_told(means))
        if measured is not None and self._me.protection.client_privacy is None:
            report.evaluate_s = measured.seconds
        if measured is not None and self._me.protection.strategy.shows_factors:
            report.example_count, report.correct_count = measured.count, measured.correct
            report.loss = measured.loss
        await self._tools.session.report_evaluation(result.round_id, report)

    async def _rank_adapter(self, result: common_pb2.ResultRef, measured: Evaluation) -> None:
        """Writes on the adapter's card how good it is, and keeps it as the best one if it is."""
        adapters = self._tools.state.adapters
        await self._run(adapters.replace_card, self._learner.card(_origin(result), measured))
        ranked = Ranked(
            round_id=result.round_id,
            number=result.round_number,
            digest=digest_of(result).hex(),
            loss=measured.loss,
            settled=not self._me.protection.strategy.needs_committee,
        )
        if await self._run(adapters.keep_if_best, ranked):
            _log.info("best_adapter_so_far", round=result.round_id, folder=str(adapters.best))

    async def _follow(self, newest: Newest) -> None:
        """Gives the best adapter up if the federation goes on without the result that it is of."""
        if await self._run(self._tools.state.adapters.follow, newest):
            why = "its result was taken back, or may have been while this client was away"
            _log.warning("best_adapter_given_up", newest=newest.round_id, why=why)

    async def _save_adapter(self, result: common_pb2.ResultRef) -> None:
        """Makes the adapter on disk the current state's, which is that result; also when it was gone back to."""
        if self._saved == result.round_id:
            return
        adapters, made = self._tools.state.adapters, _origin(result)
        await self._run(adapters.save, result.round_id, partial(self._learner.save_adapter, made=made))
        if (measured := self._reported.get(result.round_id)) is not None:
            await self._run(adapters.replace_card, self._learner.card(made, measured))
        self._saved = result.round_id

    async def _apply(
        self, reference: common_pb2.ResultRef, plan_ref: pb.PlanRef | None, activity: Activity
    ) -> Applied:
        """Applies a result with the secrets of its own epoch, whatever the next round's is."""
        if await self._run(self._learner.holds, reference.round_id):
            await self._follow(Newest(round_id=reference.round_id, number=reference.round_number))
            return Applied()
        result = Result.from_proto(reference)
        secrets = await self._keyring.secrets(reference.epoch)
        self._strategy.check_result(result.layout, self._learner.model)
        plan = await self._plans.opened(plan_ref, secrets) if plan_ref else None
        opened = None
        if self._me.protection.strategy.needs_committee:
            opened = await self._committees.opened(reference, result.layout, secrets)
            await self._run(self._tools.state.note_result, reference.round_id, digest_of(reference))
        start = opened.context.start.hex() if opened else ""
        await self._follow(Newest(round_id=reference.round_id, number=reference.round_number, start=start))
        watch = Stopwatch()
        inbox = await download(self._tools.replicas, self._tools.state, result, activity)
        download_s = watch.seconds
        watch = Stopwatch()
        await self._run(self._restore_and_apply, result, inbox, plan, secrets, opened, activity)
        return Applied(download_s, watch.seconds, result.total_bytes)

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
            # After a restart: what this client trained from is what the result is held against.
            self._learner.resume(result.round_id, secrets)
            known = round_context(self._learner.model, result.layout, plan, self._me.budget, secrets)
            if opened is not None:
                summand = self._me.client_id in opened.contributors
                own_weight = len(self._learner.examples) if summand else 0
                known = summed(known, opened, self._me.largest_move, own_weight)
                # Whose update is in the sum knows of which round it is; of others only servers say it.
                start = self._learner.start_of(0 if summand else result.number)
                known = replace(known, reference=start)
            parts = self._strategy.restored(result.layout, contents(result, inbox, activity), known)
            self._learner.apply(result.round_id, parts, secrets.obfuscation, result.number)
            for means in known.means:
                self._tools.state.measured.note_means(result.round_id, result.number, means)
                _log.info("means_told", round=result.round_id, **asdict(means))
            if known.cut:
                _log.warning("change_cut", parts=sorted(known.cut), why="no honest clients can have sent it")
        inbox.clear()  # last: a process that dies before still has the shards


def digest_of(reference: common_pb2.ResultRef) -> bytes:
    """What a committee's context names a result by."""
    return result_digest(reference.round_id, (shard.sha256 for shard in reference.shards))


def fingerprint(result: common_pb2.ResultRef) -> str:
    """By which people compare results: the first digits of `digest_of`."""
    return digest_of(result).hex()[:FINGERPRINT]


def means_told(means: Figures) -> pb.MeanFigures:
    """What the coordinator is told of means: no more digits than say something to people."""
    told = {name: value for name, value in asdict(means).items() if value is not None}
    return pb.MeanFigures(**{name: round(value, DIGITS[name]) for name, value in told.items()})


def _origin(result: common_pb2.ResultRef) -> Origin:
    return Origin(result.round_number, result.contributor_count, fingerprint(result))
