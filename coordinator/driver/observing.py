"""Looks at a federation: gathers from the store what the next decision needs, and no more."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from coordinator.committees import Proceedings
from coordinator.decisions import View, median_overlap
from coordinator.driver.gauges import Gauges
from coordinator.hearing import Hearing
from coordinator.liveness import Liveness
from coordinator.records import Dropped, EvaluationRecord, FederationRecord, MemberRecord, RoundRecord
from coordinator.store import Store
from shelora.errors import Reason
from shelora.rounds import RoundKind, RoundState

CENSUS_S: Final = 10.0
"""Seconds after which members are counted again while a round is in progress, whose course does not depend on them."""
ASLEEP_MS: Final = 600_000
"""Milliseconds of silence after which a device that was sending its update does not keep a late round open."""
_TOO_FEW: Final = Reason.TOO_FEW_UPDATES


class Observer:
    """Makes views of federations.

    Args:
        store: State.
        revoked: Revoked clients of a federation, with the time up to which their certificates are, Unix milliseconds.
        clock_ms: Unix milliseconds.
        liveness: When a silent member counts as gone.
    """

    def __init__(
        self,
        store: Store,
        revoked: Callable[[str], Mapping[str, int]],
        clock_ms: Callable[[], int],
        liveness: Liveness,
    ) -> None:
        self._store = store
        self._revoked = revoked
        self._clock_ms = clock_ms
        self._liveness = liveness
        self._gauges = Gauges()
        self._censuses: dict[str, int] = {}
        """Unix milliseconds of the last look at all members, by federation."""
        self._hearings: dict[str, Hearing] = {}
        """Of the round in progress, by federation."""

    async def view(self, federation: FederationRecord, round_: RoundRecord | None) -> View:
        """The state a decision is made on."""
        members, alive, working = await self._members(federation, round_)
        self._gauges.epoch(federation.federation_id, federation.epoch if federation.key_id else 0)
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
            refusals = await self._store.updates.refusals(federation, round_.sequence)
            return replace(
                view,
                update_count=len(counted),
                voters=voters,
                overlap=median_overlap(counted),
                given_up=[drop for drop in refusals if drop.client_id not in voters],
                against=await self._against(federation, round_),
                evaluations=await self._evaluations(federation, round_),
            )
        view = replace(view, proceedings=await self._proceedings(federation, round_))
        return await self._progress(view, round_) if round_.round.state is RoundState.COLLECTING else view

    async def _evaluations(self, federation: FederationRecord, ended: RoundRecord) -> list[EvaluationRecord]:
        """Of the result that a training round began from, if a rule looks at them."""
        if federation.spec.round.stop is None or not federation.result_sequence:
            return []
        if ended.round.kind is not RoundKind.TRAIN or ended.round.state is not RoundState.PUBLISHED:
            return []
        return await self._store.rounds.evaluations(federation, federation.result_sequence)

    def forget(self, federation_id: str) -> None:
        """A federation is not driven here any more."""
        self._hearings.pop(federation_id, None)
        self._censuses.pop(federation_id, None)
        self._gauges.forget(federation_id)

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
            against=await self._against(federation, record),
            unawaited=len(missing - view.objectors),
            sending=len(await self._sending(federation, record, count)),
        )

    async def _sending(
        self, federation: FederationRecord, record: RoundRecord, count: int
    ) -> AbstractSet[str]:
        """Who is seen sending the update that a late round still needs; nobody is looked for before."""
        now_ms = self._clock_ms()
        if now_ms < record.round.deadline_ms or count >= record.round.min_updates:
            return set()
        committed = await self._store.updates.committers(federation, record.sequence)
        awaited = sorted(set(record.round.cohort) - committed - record.dropped_ids)
        seen = await self._store.presence.sightings(federation.federation_id, awaited)
        heard_ms = max(record.round.opened_ms, now_ms - ASLEEP_MS)
        return {name for name, sighting in seen.items() if sighting.sending and sighting.at_ms >= heard_ms}

    async def _working_again(
        self, federation: FederationRecord, record: RoundRecord, laggards: AbstractSet[str]
    ) -> AbstractSet[str]:
        """Those that missed the round before and are waited for all the same.

        Within two heartbeats of the round's opening all of them: they may not have said yet that they work.
        """
        if not laggards:
            return set()
        interval_s = self._liveness.interval_s(await self._store.members.count(federation.federation_id))
        if self._clock_ms() < record.round.opened_ms + 2000 * interval_s:
            return laggards
        seen = await self._store.presence.sightings(federation.federation_id, sorted(laggards))
        return {
            name
            for name, sighting in seen.items()
            if sighting.working and sighting.at_ms >= record.round.opened_ms
        }

    async def _against(self, federation: FederationRecord, record: RoundRecord) -> list[Dropped]:
        """Objections to the result that a round with a committee began from."""
        if not (record.round.convenes and federation.result_sequence):
            return []
        return await self._store.rounds.objections(federation, federation.result_sequence)

    async def _objectors(self, federation: FederationRecord) -> AbstractSet[str]:
        """Members that reject the plan in force."""
        if federation.plan is None:
            return set()
        return (await self._store.plans.objections(federation, federation.plan.number)).keys()

    async def _laggards(self, federation: FederationRecord) -> AbstractSet[str]:
        """Who missed the newest round, if that one waited for its clients, and who was left out for another base model.

        The latter get notice to end and to come back with the right one: the others do not wait until they do.
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
    ) -> tuple[Mapping[str, MemberRecord], AbstractSet[str], AbstractSet[str]]:
        """The members, those alive and those at work where a decision needs them; else none, but for the gauge.

        A look at all members costs in proportion to them: it must not follow every commit of every one of them.
        """
        federation_id = federation.federation_id
        if not (await self._decides_on_members(federation, round_) or self._is_census_due(federation_id)):
            return {}, set(), set()
        members = federation.admitted(await self._store.members.all(federation_id))
        sightings = await self._store.presence.sightings(federation_id, list(members))
        now_ms = self._clock_ms()
        heard_ms = now_ms - 1000 * self._liveness.patience_s(len(members))
        alive = {name for name, seen in sightings.items() if seen.at_ms >= heard_ms}
        self._gauges.members(federation_id, len(alive), len(members) - len(alive))
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
