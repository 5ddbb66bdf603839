"""Drives federations: holds their leases, takes the steps that `coordinator.decisions` names.

One driver at a time drives a federation, by a lease. The lease only saves work: what keeps a late holder from doing
harm is that every write names the revision its decision was made on. A step that fails is taken again; a step that
was overtaken is forgotten. All RPCs a step makes are idempotent.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import structlog

from coordinator import transitions
from coordinator.aggregation import AggregationPool, contributions, lacks
from coordinator.changes import Changes
from coordinator.committees import Proceedings
from coordinator.convening import opening_of
from coordinator.decisions import (
    Aggregate,
    CreateRound,
    Decision,
    Delete,
    Done,
    FixModel,
    OpenKeys,
    OpenRound,
    PublishOpened,
    Rest,
    RetireEpochs,
    Sweep,
    View,
    WriteFederation,
    WriteRound,
    abandon,
    contributors,
    decide,
    median_overlap,
    median_train_loss,
    revoked_since,
)
from coordinator.hearing import Hearing
from coordinator.liveness import USUAL, Liveness
from coordinator.metrics import KEY_EPOCH, MEMBERS, REFUSALS_TOTAL, ROUNDS_TOTAL, STAGE_SECONDS, TRAIN_LOSS
from coordinator.records import (
    Commit,
    Dropped,
    FederationRecord,
    Garbage,
    LayoutRecord,
    Member,
    Phase,
    RoundRecord,
    ShardResult,
    StoredDigest,
)
from coordinator.screening import misfits, outliers
from coordinator.store import Store, Versioned
from coordinator.votes import takes_ballots, votes_of
from shelora.errors import DomainError, Reason
from shelora.rounds import Event, RoundKind, RoundState
from shelora.telemetry.outages import Outage
from shelora.transport.channel import is_transient

ENDED_S: Final = 30.0
"""Seconds after which a federation that has ended is looked at again: its operator may extend or delete it."""
_TOO_FEW: Final = Reason.TOO_FEW_UPDATES
CENSUS_S: Final = 10.0
"""Seconds after which members are counted again while a round is in progress, whose course does not depend on them."""
RELEASE_S: Final = 2.0
"""Seconds to give a lease back in: a process that stops while Redis is silent has little time left."""
MAX_TTL_S: Final = 30 * 86_400
"""Most that aggregation accepts."""

_log = structlog.get_logger(__name__)


class KeyAuthority(Protocol):
    """What the coordinator asks of the key authority."""

    async def open_epoch(self, federation_id: str, epoch: int, parameters: str) -> bytes:
        """The identifier of the epoch's CKKS key, 16 bytes. Raises EPOCH_RETIRED."""

    async def retire_epochs(self, federation_id: str, before: int) -> None:
        """Destroys the keys of the epochs before one."""


@dataclass(frozen=True)
class DriverPolicy:
    """How a driver behaves; times in seconds."""

    liveness: Liveness = USUAL
    """When a silent member counts as gone."""
    tick_s: float = 2.0
    """Longest time between two looks at a federation, for what no notification announces: silence."""
    lease_s: float = 15.0
    """Time after which another driver takes over from one that died."""
    concurrency: int = 4
    """Shards of a round aggregated at once."""
    result_ttl_s: int = 7 * 86_400
    """Time that aggregation keeps a round, its result included, beyond the deadlines of all attempts at the next two.
    A safety net: what is not needed any more is deleted by name."""


class Left:
    """A federation is left to another replica, or gone."""


class Driver:
    """Advances every federation that no other driver holds.

    Args:
        store: State.
        changes: Wake-ups.
        aggregation: Aggregation replicas.
        authority: The key authority.
        revoked: Revoked clients of a federation, with the time up to which their certificates are, Unix milliseconds.
        clock_ms: Unix milliseconds.
        new_token: Unguessable names for leases.
        policy: Times and bounds.
    """

    def __init__(
        self,
        *,
        store: Store,
        changes: Changes,
        aggregation: AggregationPool,
        authority: KeyAuthority,
        revoked: Callable[[str], Mapping[str, int]],
        clock_ms: Callable[[], int],
        new_token: Callable[[], str],
        policy: DriverPolicy | None = None,
    ) -> None:
        self._store = store
        self._changes = changes
        self._aggregation = aggregation
        self._authority = authority
        self._revoked = revoked
        self._clock_ms = clock_ms
        self._new_token = new_token
        self._policy = policy or DriverPolicy()
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._finished: dict[str, tuple[int, tuple[int, int]]] = {}
        """Federations that have ended: Unix milliseconds and version of the state at the last look at them."""
        self._member_counts: dict[str, tuple[int, int]] = {}
        self._censuses: dict[str, int] = {}
        """Unix milliseconds of the last look at all members, by federation."""
        self._epochs: dict[str, int] = {}
        self._hearings: dict[str, Hearing] = {}
        """Of the round in progress, by federation."""

    async def run(self) -> None:
        """Looks for federations to drive until cancelled; gives every lease back then."""
        try:
            outage = Outage(_log, "scan_failed", over="scan_succeeded")
            with self._changes.subscribed() as signal:
                while True:
                    await _tolerant(self._told_once(outage), "scan_failed")
                    await signal.wait(self._policy.tick_s)
        finally:
            tasks = list(self._driving.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _told_once(self, outage: Outage) -> None:
        """A look, of whose failures the first is told: Redis may refuse for hours."""
        try:
            await self._scan()
        except DomainError as error:
            outage.failed(error)
        else:
            outage.ended()

    async def _scan(self) -> None:
        listed = set(await self._store.federations.ids())
        for expired in self._finished.keys() - listed:  # the name may be given again
            del self._finished[expired]
            TRAIN_LOSS.remove(expired)
        seen_ms = self._clock_ms() - int(1000 * ENDED_S)
        resting = {
            name
            for name, (at_ms, version) in self._finished.items()
            if at_ms > seen_ms and version == self._changes.version(name)
        }
        for federation_id in sorted(listed - resting - self._driving.keys()):
            if await _tolerant(self._is_started(federation_id), "scan_failed", federation_id=federation_id):
                self._spawn(federation_id)

    async def _is_started(self, federation_id: str) -> bool:
        """Whether there is something to drive; not in a federation that is listed but was never written."""
        try:
            record = (await self._store.federations.read(federation_id)).record
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_UNKNOWN:
                raise
            return False
        if record.ended and federation_id in self._finished and not record.deleting:
            self._note_ended(federation_id)
            return False
        return record.phase is not Phase.CREATED or record.deleting

    def _note_ended(self, federation_id: str) -> None:
        self._finished[federation_id] = self._clock_ms(), self._changes.version(federation_id)

    def _spawn(self, federation_id: str) -> None:
        task = asyncio.create_task(self._hold(federation_id), name=f"drive-{federation_id}")
        self._driving[federation_id] = task
        task.add_done_callback(lambda _: self._driving.pop(federation_id, None))

    async def _hold(self, federation_id: str) -> None:
        """Drives a federation while the lease lasts. Does nothing if another driver holds it."""
        token = self._new_token()
        if not await _tolerant(
            self._store.leases.acquire(federation_id, token, self._policy.lease_s), "lease_failed"
        ):
            return
        try:
            await _first(self._drive(federation_id), self._keep(federation_id, token))
        finally:
            self._hearings.pop(federation_id, None)
            self._count_members(federation_id, None)
            self._count_epoch(federation_id, 0)
            if federation_id not in self._finished:  # another replica goes on
                TRAIN_LOSS.remove(federation_id)
            await self._release(federation_id, token)

    async def _release(self, federation_id: str, token: str) -> None:
        """Gives the lease back, so that another goes on at once; one that is not given back expires."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_S):
                await _tolerant(self._store.leases.release(federation_id, token), "release_failed")

    async def _keep(self, federation_id: str, token: str) -> None:
        """Renews the lease; returns when it is lost or cannot be renewed."""
        renewed = True
        while renewed:
            await asyncio.sleep(self._policy.lease_s / 3)
            renewal = self._store.leases.renew(federation_id, token, self._policy.lease_s)
            renewed = await _tolerant(renewal, "lease_failed") or False
        _log.warning("lease_lost", federation_id=federation_id)

    async def _drive(self, federation_id: str) -> None:
        await _tolerant(self._tell_loss(federation_id), "loss_not_told", federation_id=federation_id)
        with self._changes.subscribed(federation_id) as signal:
            while True:
                decision = await _tolerant(
                    self._tried(federation_id), "step_failed", federation_id=federation_id
                )
                if isinstance(decision, Left):
                    return
                if isinstance(decision, Done):
                    self._note_ended(federation_id)
                    return
                if decision is None or isinstance(decision, Rest):
                    await signal.wait(self._pause_s(decision))

    async def _tell_loss(self, federation_id: str) -> None:
        """Sets the gauge to the loss behind the newest result: whoever aggregated it may be gone."""
        federation = (await self._store.federations.read(federation_id)).record
        sequence = federation.result_sequence
        result = await self._store.rounds.read(federation, sequence) if sequence else None
        if result is None:
            return
        commits = contributors(result.record, await self._store.updates.commits(federation, sequence))
        if commits:
            TRAIN_LOSS.labels(federation_id).set(median_train_loss(commits))

    async def _tried(self, federation_id: str) -> Decision | Left:
        """A step; or what tells that it is for another replica, which reads the records that this one does not."""
        try:
            return await self.step(federation_id)
        except DomainError as error:
            if error.reason not in {Reason.RECORD_UNREADABLE, Reason.FEDERATION_UNKNOWN}:
                raise
            _log.info("federation_left", federation_id=federation_id, why=error.message)
            return Left()

    def _pause_s(self, decision: Rest | None) -> float:
        if decision is None or decision.until_ms is None:
            return self._policy.tick_s
        return min(self._policy.tick_s, (decision.until_ms - self._clock_ms()) / 1000)

    async def step(self, federation_id: str) -> Decision:
        """Looks, decides, acts once. Returns what was decided; an overtaken write is not an error.

        Raises: DomainError: an RPC or the store failed in a way that may pass.
        """
        federation = await self._store.federations.read(federation_id)
        ticket = federation.record.ticket
        round_ = await self._store.rounds.read(federation.record, ticket.sequence) if ticket else None
        view = await self._view(federation.record, round_.record if round_ else None)
        decision = decide(view, self._clock_ms())
        await self._take(decision, federation, round_)
        return decision

    async def _view(self, federation: FederationRecord, round_: RoundRecord | None) -> View:
        members, alive, working = await self._members(federation, round_)
        self._count_epoch(federation.federation_id, federation.epoch if federation.key_id else 0)
        objectors = await self._objectors(federation)
        view = View(
            federation=federation,
            round=round_,
            members=members,
            alive=alive,
            update_count=0,
            voters=[],
            objectors=objectors,
            working=working,
            revoked=self._revoked(federation.federation_id),
        )
        if round_ is None:
            return replace(view, laggards=await self._laggards(federation)) if federation.ticket else view
        if round_.round.ended:
            commits = await self._store.updates.commits(federation, round_.sequence)
            counted = [commit for commit in commits if commit.update.client_id not in round_.dropped_ids]
            voters = [commit.update.client_id for commit in counted]
            given_up = await self._store.updates.refusals(federation, round_.sequence)
            return replace(
                view,
                update_count=len(counted),
                voters=voters,
                overlap=median_overlap(counted),
                given_up=given_up,
            )
        view = replace(view, proceedings=await self._proceedings(federation, round_))
        return await self._progress(view, round_) if round_.round.state is RoundState.COLLECTING else view

    async def _progress(self, view: View, record: RoundRecord) -> View:
        """What has become of a collecting round so far, without a look at every client of it."""
        federation, sequence = view.federation, record.sequence
        refusals = await self._store.updates.refusals(federation, sequence)
        quit_ = [drop for drop in refusals if drop.gave_up and drop.client_id in record.round.cohort]
        special = {*record.dropped_ids, *record.laggards, *view.objectors, *(d.client_id for d in quit_)}
        committed = await self._store.updates.committed(federation, sequence, sorted(special))
        missing = set(record.laggards) - committed - record.dropped_ids - {d.client_id for d in quit_}
        missing -= await self._working_again(federation, record, missing - view.objectors)
        count = await self._store.updates.count(federation, sequence)
        return replace(
            view,
            update_count=count - len(committed & record.dropped_ids),
            objectors=view.objectors - committed,
            given_up=[drop for drop in quit_ if drop.client_id not in committed],
            unawaited=len(missing - view.objectors),
        )

    async def _working_again(
        self, federation: FederationRecord, record: RoundRecord, laggards: AbstractSet[str]
    ) -> AbstractSet[str]:
        """Those that missed the round before and are waited for all the same.

        Within two heartbeats of the round's opening all of them: they may not have said yet that they work.
        """
        if not laggards:
            return set()
        interval_s = self._policy.liveness.interval_s(
            await self._store.members.count(federation.federation_id)
        )
        if self._clock_ms() < record.round.opened_ms + 2000 * interval_s:
            return laggards
        seen = await self._store.presence.sightings(federation.federation_id, sorted(laggards))
        return {
            name
            for name, sighting in seen.items()
            if sighting.working and sighting.at_ms >= record.round.opened_ms
        }

    async def _objectors(self, federation: FederationRecord) -> AbstractSet[str]:
        """Members that reject the plan in force."""
        if federation.plan is None:
            return set()
        return (await self._store.plans.objections(federation, federation.plan.number)).keys()

    async def _laggards(self, federation: FederationRecord) -> AbstractSet[str]:
        """Who missed the newest round, if that one waited for its clients, and who was left out for another base model.

        The latter are told to end and to come back with the right one: the others do not wait until they do.
        """
        newest = federation.sequence - 1  # the one before that of the ticket
        found = await self._store.rounds.read(federation, newest) if newest else None
        if found is None or not (found.record.closed_ms or found.record.round.reason is _TOO_FEW):
            return set()
        strangers = {drop.client_id for drop in found.record.dropped if drop.reason is Reason.MODEL_MISMATCH}
        return set(found.record.round.cohort) - (
            await self._store.updates.committers(federation, newest) - strangers
        )

    async def _proceedings(self, federation: FederationRecord, record: RoundRecord) -> Proceedings:
        """What the round's committee has come to, as far as its state asks for it."""
        if not record.round.convenes:
            return Proceedings()
        federation_id = federation.federation_id
        heard = self._hearings.get(federation_id)
        if heard is None or heard.round_id != record.round.round_id:
            heard = self._hearings[federation_id] = Hearing(self._store, record.round.round_id)
        return await heard.proceedings(federation, record)

    async def _members(
        self, federation: FederationRecord, round_: RoundRecord | None
    ) -> tuple[Mapping[str, Member], AbstractSet[str], AbstractSet[str]]:
        """The members, those alive and those at work where a decision needs them; else none, but for the gauge.

        A look at all members costs in proportion to them: it must not follow every commit of every one of them.
        """
        federation_id = federation.federation_id
        if not (await self._decides_on_members(federation, round_) or self._is_census_due(federation_id)):
            return {}, set(), set()
        members = federation.admitted(await self._store.members.all(federation_id))
        sightings = await self._store.presence.sightings(federation_id, list(members))
        now_ms = self._clock_ms()
        heard_ms = now_ms - 1000 * self._policy.liveness.patience_s(len(members))
        alive = {name for name, seen in sightings.items() if seen.at_ms >= heard_ms}
        self._count_members(federation_id, (len(alive), len(members) - len(alive)))
        self._censuses[federation_id] = now_ms
        return members, alive, {name for name in alive if sightings[name].working}

    async def _decides_on_members(self, federation: FederationRecord, round_: RoundRecord | None) -> bool:
        if round_ is not None:
            return round_.round.ended
        enough = federation.spec.round.clients
        return (
            bool(federation.sequence) or await self._store.members.count(federation.federation_id) >= enough
        )

    def _is_census_due(self, federation_id: str) -> bool:
        return self._clock_ms() - self._censuses.get(federation_id, 0) >= 1000 * CENSUS_S

    def _count_members(self, federation_id: str, counts: tuple[int, int] | None) -> None:
        """Sets the gauge to the sums over the driven federations."""
        if counts is None:
            self._member_counts.pop(federation_id, None)
            self._censuses.pop(federation_id, None)
        else:
            self._member_counts[federation_id] = counts
        MEMBERS.labels("alive").set(sum(alive for alive, _ in self._member_counts.values()))
        MEMBERS.labels("silent").set(sum(silent for _, silent in self._member_counts.values()))

    def _count_epoch(self, federation_id: str, epoch: int) -> None:
        """Sets the gauge to the newest epoch of the driven federations."""
        self._epochs[federation_id] = epoch
        KEY_EPOCH.set(max(self._epochs.values()))
        if not epoch:
            del self._epochs[federation_id]

    async def _take(
        self,
        decision: Decision,
        federation: Versioned[FederationRecord],
        round_: Versioned[RoundRecord] | None,
    ) -> None:
        """Does what was decided, on the revisions it was decided on."""
        match decision:
            case Rest() | Done():
                return
            case WriteFederation(name, record):
                await self._write_federation(name, record, federation)
            case CreateRound(record, layout):
                layout_record, digest = LayoutRecord.of(layout), record.layout_digest
                await self._store.rounds.put_layout(federation.record.federation_id, layout_record, digest)
                if record.sequence == 1:
                    await self._store.members.drop_shapes(federation.record.federation_id)
                await self._write_round("create_round", federation.record, record, 0)
            case OpenRound() | WriteRound() | Aggregate() | PublishOpened():
                await self._act_on_round(decision, federation.record, round_)
            case _:
                await self._act_on_federation(decision, federation)

    async def _act_on_federation(
        self,
        decision: OpenKeys | RetireEpochs | FixModel | Sweep | Delete,
        federation: Versioned[FederationRecord],
    ) -> None:
        match decision:
            case OpenKeys(epoch):
                await self._open_keys(federation, epoch)
            case RetireEpochs(before):
                await self._authority.retire_epochs(federation.record.federation_id, before)
                retired = transitions.retired(federation.record, before)
                await self._write_federation("retire_epochs", retired, federation)
            case FixModel(member):
                await self._fix_model(federation, member)
            case Sweep(garbage):
                for item in garbage:
                    await self._close_round(federation.record, item)
                swept = transitions.swept(federation.record, garbage)
                await self._write_federation("sweep_garbage", swept, federation)
                if swept.ended and not swept.garbage:
                    await self._store.disposal.rewrite_log()
            case Delete():
                await self._delete(federation.record)

    async def _act_on_round(
        self,
        decision: OpenRound | WriteRound | Aggregate | PublishOpened,
        federation: FederationRecord,
        round_: Versioned[RoundRecord] | None,
    ) -> None:
        if round_ is None:  # decisions about a round are made on a round
            raise DomainError(Reason.INTERNAL, "a decision about no round")
        if isinstance(decision, OpenRound):
            write = await self._or_abandoned(decision.record, self._open_round(federation, decision.record))
        elif isinstance(decision, Aggregate):
            write = await self._or_abandoned(decision.record, self._aggregate(federation, decision.record))
        elif isinstance(decision, PublishOpened):
            write = await self._publish_opened(federation, decision.record)
        else:
            write = await self._screened(federation, round_.record, decision)
        if write is None:  # overtaken: decide anew
            return
        await self._write_round(write.name, federation, write.record, round_.revision)

    async def _screened(
        self, federation: FederationRecord, before: RoundRecord, write: WriteRound
    ) -> WriteRound:
        """The write; a set is not proposed to a committee with updates of another base model: no other set follows."""
        if before.proposed or not write.record.proposed:
            return write
        strangers = misfits(
            contributors(before, await self._store.updates.commits(federation, before.sequence))
        )
        return _without(before, strangers) if strangers else write

    async def _or_abandoned(
        self, record: RoundRecord, work: Coroutine[Any, Any, WriteRound | None]
    ) -> WriteRound | None:
        """The write that the work leads to; abandons the round if it failed for a reason that does not pass.

        WORKER_FAILED passes by its status, but here it has been tried everywhere for as long as is sensible.
        """
        try:
            return await work
        except DomainError as error:
            if is_transient(error) and error.reason is not Reason.WORKER_FAILED:
                raise
            _log.warning(
                "round_failed", round_id=record.round.round_id, reason=error.reason, why=error.message
            )
            return abandon(record, error.reason, self._clock_ms())

    async def _open_keys(self, federation: Versioned[FederationRecord], epoch: int) -> None:
        record = federation.record
        try:
            epoch, key_id = await self._opened_from(record, epoch)
        except DomainError as error:
            if is_transient(error):
                raise
            why = f"the key authority refused to make keys: {error.message}"
            failed = transitions.failed(record, why)
            await self._write_federation("fail_federation", failed, federation)
            return
        began = transitions.with_key(record, epoch, key_id)
        await self._write_federation("open_keys", began, federation)

    async def _fix_model(self, federation: Versioned[FederationRecord], member: str) -> None:
        """Fixes the model of a federation as that of a member."""
        model = await self._store.members.shapes(federation.record.federation_id, member)
        if model is not None:
            await self._write_federation(
                "fix_model", transitions.with_model(federation.record, model), federation
            )

    async def _delete(self, federation: FederationRecord) -> None:
        """Deletes everything of a federation; its record last, so that it is tried again until all is gone."""
        federation_id = federation.federation_id
        kept = federation.results_in_use | ({federation.ticket.sequence} if federation.ticket else set())
        rounds = {federation.round_id(sequence) for sequence in kept}
        for round_id in sorted(rounds | {item.round_id for item in federation.garbage}):
            await self._aggregation.close_round(round_id, results=True)
        if federation.strategy.needs_keys:
            await self._authority.retire_epochs(federation_id, federation.epoch + 1)
        await self._store.disposal.delete(federation)
        await self._store.disposal.rewrite_log()
        _log.info("federation_deleted", federation_id=federation_id)

    async def _opened_from(self, record: FederationRecord, epoch: int) -> tuple[int, bytes]:
        """The first epoch from this one on that is not retired, as those of an expired namesake may be; and its key."""
        # A committee opens sums: there is no key that decrypts them.
        parameters = "" if record.strategy.needs_committee else record.spec.protection.parameters
        while True:
            try:
                return epoch, await self._authority.open_epoch(record.federation_id, epoch, parameters)
            except DomainError as error:
                if error.reason is not Reason.EPOCH_RETIRED:
                    raise
                epoch += 1

    async def _close_round(self, federation: FederationRecord, garbage: Garbage) -> None:
        """Has everything of an ended round deleted, wherever it lies."""
        sequence = federation.sequence_of(garbage.round_id)
        if sequence is not None:
            await votes_of(federation).drop(self._store, federation, sequence)
        if sequence is not None and federation.strategy.needs_committee:
            await self._store.committees.drop(federation, sequence)
        await self._aggregation.close_round(garbage.round_id, results=garbage.results)

    async def _open_round(self, federation: FederationRecord, record: RoundRecord) -> WriteRound:
        if not takes_ballots(federation, record):
            layout = await self._store.rounds.layout(federation.federation_id, record.layout_digest)
            rules = federation.spec.round
            attempts = 1 + 2 * rules.max_attempts  # its own, and those of two rounds that may begin from it
            ttl_s = rules.deadline_s * attempts + self._policy.result_ttl_s
            members = await self._store.members.all(federation.federation_id)
            ranks = {
                name: min(members[name].rank, layout.max_rank)
                for name in record.round.cohort
                if name in members
            }
            await self._aggregation.open_round(
                record.round.round_id, layout.layout(), min(ttl_s, MAX_TTL_S), ranks
            )
        now_ms = self._clock_ms()
        opened = record.round.advance(Event.OPEN, now_ms)
        return WriteRound("open_round", record.model_copy(update={"round": opened, "step_ms": now_ms}))

    async def _aggregate(self, federation: FederationRecord, record: RoundRecord) -> WriteRound | None:
        """Aggregates what is left to aggregate; leads to publication, or to fewer contributors.

        None if a contributor was revoked meanwhile: nothing is published that holds its update.
        """
        commits = contributors(record, await self._store.updates.commits(federation, record.sequence))
        if not record.round.convenes and (strangers := misfits(commits)):
            return _without(record, strangers)
        settled = {Reason.CERTIFICATE_REVOKED, Reason.MODEL_MISMATCH}
        screened = any(drop.reason not in settled for drop in record.dropped)
        if record.round.kind is RoundKind.TRAIN and not screened and not record.round.convenes:
            found = outliers(federation.spec.screening, commits)
            if found:
                return _without(record, found)
        if len(commits) < record.round.min_updates:
            why = record.dropped[-1].reason if record.dropped else Reason.SHARD_MISSING
            return abandon(record, why, self._clock_ms())
        write = await self._aggregated(federation, record, commits)
        return None if revoked_since(record, self._revoked(federation.federation_id)) else write

    async def _aggregated(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> WriteRound | None:
        """Leads to publication; None if the answers of a committee are waited for."""
        if takes_ballots(federation, record):
            return await self._rank(federation, record, commits)
        try:
            shards = await self._aggregate_shards(federation, record, commits)
        except DomainError as error:
            if error.reason is not Reason.SHARD_MISSING:
                raise
            if record.round.convenes:  # the certified set cannot change
                return abandon(record, error.reason, self._clock_ms())
            return await self._drop(record, commits)
        if record.round.convenes:
            return None
        if record.round.kind is RoundKind.TRAIN:
            TRAIN_LOSS.labels(federation.federation_id).set(median_train_loss(commits))
        return self._published(record, len(commits), [shards[i] for i in range(record.shard_count)])

    async def _rank(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> WriteRound:
        """Ranks the ballots of a vote; leads to its publication."""
        members = await self._store.members.all(federation.federation_id)
        tiers = transitions.budgets(federation.admitted(members))
        counted = await votes_of(federation).count(self._store, federation, record, commits, tiers)
        if counted.missing:
            return _without(record, _lost(counted.missing))
        record = record.model_copy(update={"ranked": counted.ranked})
        return self._published(record, len(commits), [])

    async def _aggregate_shards(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> dict[int, ShardResult]:
        """All shards, those done before included; several at once."""
        shards = await self._store.rounds.shards(federation, record)
        slots = asyncio.Semaphore(self._policy.concurrency)

        async def aggregate(index: int) -> None:
            async with slots:
                parts = contributions(record.round.kind, index, commits, federation.spec.screening)
                shards[index] = await self._aggregation.aggregate(record.round.round_id, index, parts)
                await self._store.rounds.put_shard(federation, record, index, shards[index])

        await _all(*(aggregate(index) for index in range(record.shard_count) if index not in shards))
        return shards

    async def _publish_opened(self, federation: FederationRecord, record: RoundRecord) -> WriteRound | None:
        """Puts down what opens the sum; leads to publication. None if a contributor was revoked meanwhile."""
        commits = contributors(record, await self._store.updates.commits(federation, record.sequence))
        shards = await self._store.rounds.shards(federation, record)
        if len(shards) != record.shard_count:  # they have expired: aggregate again
            return None
        opening = await opening_of(self._store, federation, record)
        digest = StoredDigest(sha256=hashlib.sha256(opening).hexdigest(), total_bytes=len(opening))
        await self._store.committees.put_opening(federation.federation_id, digest.sha256, opening)
        record = record.model_copy(update={"opening": digest})
        if revoked_since(record, self._revoked(federation.federation_id)):
            return None
        TRAIN_LOSS.labels(federation.federation_id).set(median_train_loss(commits))
        return self._published(record, len(commits), [shards[i] for i in range(record.shard_count)])

    async def _drop(self, record: RoundRecord, commits: list[Commit]) -> WriteRound:
        """Leaves out the clients whose committed shards aggregation does not have (any more)."""
        round_id = record.round.round_id
        missing = [
            update.client_id
            for update in (commit.update for commit in commits)
            if lacks(await self._aggregation.stored(round_id, update.client_id), update.shards)
        ]
        if not missing:
            return abandon(record, Reason.SHARD_MISSING, self._clock_ms())
        return _without(record, _lost(missing))

    def _published(
        self, record: RoundRecord, contributor_count: int, shards: list[ShardResult]
    ) -> WriteRound:
        now_ms = self._clock_ms()
        published = record.model_copy(
            update={
                "round": record.round.advance(Event.PUBLISH, now_ms),
                "contributor_count": contributor_count,
                "results": tuple(shard.digest for shard in shards),
                "aggregate_cpu_s": sum(shard.cpu_s for shard in shards),
                "aggregate_wall_s": (now_ms - record.closed_ms) / 1000,
            }
        )
        return WriteRound("publish_round", published)

    async def _write_federation(
        self, name: str, record: FederationRecord, before: Versioned[FederationRecord]
    ) -> None:
        if await self._store.federations.write(name, record, before):
            _log.info(name, federation_id=record.federation_id, phase=record.phase, failure=record.failure)

    async def _write_round(
        self, name: str, federation: FederationRecord, record: RoundRecord, revision: int
    ) -> None:
        if await self._store.rounds.write(name, federation, record, revision):
            _log.info(
                name, round_id=record.round.round_id, state=record.round.state, reason=record.round.reason
            )
            _measure(record)


def _without(record: RoundRecord, left_out: Sequence[Dropped]) -> WriteRound:
    """Leaves updates out of a round's aggregate."""
    reasons = {drop.client_id: drop.reason for drop in left_out}
    _log.warning("updates_dropped", round_id=record.round.round_id, reasons=reasons)
    dropped = (*record.dropped, *left_out)
    return WriteRound("drop_contributor", record.model_copy(update={"dropped": dropped}))


def _lost(client_ids: Iterable[str]) -> list[Dropped]:
    """Updates that are not stored any more."""
    why = "the update was lost from the store after it was committed: nothing to do"
    return [Dropped(client_id=name, reason=Reason.SHARD_MISSING, why=why) for name in client_ids]


def _measure(record: RoundRecord) -> None:
    """Counts what a written round has just gone through."""
    round_ = record.round
    if round_.ended:
        ROUNDS_TOTAL.labels(round_.kind, round_.state, round_.reason or "").inc()
        for drop in record.dropped:
            REFUSALS_TOTAL.labels(drop.reason).inc()
    if round_.state is RoundState.AGGREGATING and not record.dropped:
        STAGE_SECONDS.labels(round_.kind, "collecting").observe((record.closed_ms - round_.opened_ms) / 1000)
    if round_.state is RoundState.PUBLISHED:
        STAGE_SECONDS.labels(round_.kind, "aggregating").observe(record.aggregate_wall_s)


async def _tolerant(work: Coroutine[Any, Any, Any], event: str, **fields: str) -> Any:  # noqa: ANN401 - of any work
    """The result of work, or None if it failed: logged, and tried again by the loop that called."""
    try:
        return await work
    except DomainError as error:
        _log.warning(event, reason=error.reason, why=error.message, **fields)
    except Exception:  # noqa: BLE001 - one federation's fault must not stop the driver of the others
        _log.exception(event, **fields)
    return None


async def _first(*works: Coroutine[Any, Any, None]) -> None:
    """Runs several things until the first ends; cancels the others and waits for them."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all(*works: Coroutine[Any, Any, None]) -> None:
    """Runs several things at once. The first that fails cancels the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
