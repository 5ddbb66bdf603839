"""Drives federations: holds their leases, looks, takes the steps that `coordinator.decisions` names.

One driver at a time drives a federation, by a lease. The lease only saves work: what keeps a late holder from doing
harm is that every write names the revision its decision was made on. A step that fails is taken again; a step that
was overtaken is forgotten. All RPCs a step makes are idempotent.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import structlog

from coordinator.aggregation import AggregationPool
from coordinator.changes import Changes
from coordinator.decisions import Decision, Done, Rest, contributors, decide, known_means, median_train_loss
from coordinator.driver.federations import FederationSteps, KeyAuthority
from coordinator.driver.lease import Lease
from coordinator.driver.observing import Observer
from coordinator.driver.policy import DriverPolicy
from coordinator.driver.rounds import RoundSteps
from coordinator.driver.steps import Steps
from coordinator.driver.tolerance import tolerant
from coordinator.driver.writing import Writer
from coordinator.metrics import forget_means, tell_means
from coordinator.records import Phase
from coordinator.store import Store
from shelora.errors import DomainError, Reason
from shelora.telemetry.outages import Outage

__all__ = ["Driver", "DriverPolicy", "driver_on"]

ENDED_S: Final = 30.0
"""Seconds after which a federation that has ended is looked at again: its operator may extend or delete it."""

_log = structlog.get_logger(__name__)


class Left:
    """A federation is left to another replica, or gone."""


class Driver:
    """Advances every federation that no other driver holds.

    Args:
        store: State.
        changes: Wake-ups.
        observer: Looks at a federation.
        steps: Does what was decided.
        clock_ms: Unix milliseconds.
        new_token: Unguessable names for leases.
        policy: Times and bounds.
    """

    def __init__(
        self,
        *,
        store: Store,
        changes: Changes,
        observer: Observer,
        steps: Steps,
        clock_ms: Callable[[], int],
        new_token: Callable[[], str],
        policy: DriverPolicy,
    ) -> None:
        self.steps = steps
        self._store = store
        self._changes = changes
        self._observer = observer
        self._clock_ms = clock_ms
        self._new_token = new_token
        self._policy = policy
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._finished: dict[str, tuple[int, tuple[int, int]]] = {}
        """Federations that have ended: Unix milliseconds and version of the state at the last look at them."""

    async def run(self) -> None:
        """Looks for federations to drive until cancelled; gives every lease back then."""
        try:
            outage = Outage(_log, "scan_failed", over="scan_succeeded")
            with self._changes.subscribed() as signal:
                while True:
                    await tolerant(self._told_once(outage), "scan_failed")
                    await signal.wait(self._policy.tick_s)
        finally:
            tasks = list(self._driving.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _told_once(self, outage: Outage) -> None:
        """Looks for federations. Only the first of its failures is logged: Redis may refuse for hours."""
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
            forget_means(expired)
        seen_ms = self._clock_ms() - int(1000 * ENDED_S)
        resting = {
            name
            for name, (at_ms, version) in self._finished.items()
            if at_ms > seen_ms and version == self._changes.version(name)
        }
        for federation_id in sorted(listed - resting - self._driving.keys()):
            if await tolerant(self._is_started(federation_id), "scan_failed", federation_id=federation_id):
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
        lease = Lease(self._store.leases, federation_id, self._new_token(), self._policy.lease_s)
        if not await lease.acquire():
            return
        try:
            await _first(self._drive(federation_id), lease.keep())
        finally:
            self._observer.forget(federation_id)
            if federation_id not in self._finished:  # another replica goes on
                forget_means(federation_id)
            await lease.release()

    async def _drive(self, federation_id: str) -> None:
        await tolerant(self._tell_loss(federation_id), "loss_not_told", federation_id=federation_id)
        with self._changes.subscribed(federation_id) as signal:
            while True:
                decision = await tolerant(
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
        """Sets the gauge to the loss behind the newest result: the coordinator that published it may be gone."""
        federation = (await self._store.federations.read(federation_id)).record
        sequence = federation.result_sequence
        result = await self._store.rounds.read(federation, sequence) if sequence else None
        if result is None:
            return
        if not federation.strategy.shows_factors:
            tell_means(
                federation_id, **known_means(await self._store.rounds.evaluations(federation, sequence))
            )
            return
        commits = contributors(result.record, await self._store.updates.commits(federation, sequence))
        if commits:
            tell_means(federation_id, train_loss=median_train_loss(commits), accuracy=None)

    async def _tried(self, federation_id: str) -> Decision | Left:
        """Takes a step; Left if the federation is gone, or its records are for a newer replica to read."""
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
        view = await self._observer.view(federation.record, round_.record if round_ else None)
        decision = decide(view, self._clock_ms())
        await self.steps.take(decision, federation, round_)
        return decision


def driver_on(
    store: Store,
    changes: Changes,
    *,
    aggregation: AggregationPool,
    authority: KeyAuthority,
    revoked: Callable[[str], Mapping[str, int]],
    clock_ms: Callable[[], int],
    new_token: Callable[[], str],
    policy: DriverPolicy | None = None,
) -> Driver:
    """A driver on a store.

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
    policy, writer = policy or DriverPolicy(), Writer(store)
    rounds = RoundSteps(
        store=store,
        writer=writer,
        aggregation=aggregation,
        revoked=revoked,
        clock_ms=clock_ms,
        policy=policy,
    )
    federations = FederationSteps(store, writer, aggregation, authority)
    return Driver(
        store=store,
        changes=changes,
        observer=Observer(store, revoked, clock_ms, policy.liveness),
        steps=Steps(store, writer, federations, rounds),
        clock_ms=clock_ms,
        new_token=new_token,
        policy=policy,
    )


async def _first(*works: Coroutine[Any, Any, None]) -> None:
    """Runs several things until the first ends; cancels the others and waits for them."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
