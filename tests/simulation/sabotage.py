"""Product code with one rule taken away. The simulation must notice every time, or it could not notice a bug.

Each takes away what one sentence of the documents promises.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

import numpy as np

import client_agent.making
import coordinator.driver.rounds
import coordinator.store.database
import coordinator.store.updates
import services.aggregation.scripts
from client_agent.attempts import Attempt
from coordinator import transitions
from coordinator.authority import KeyAuthorityClient
from coordinator.changes import Signal
from coordinator.driver.federations import FederationSteps
from coordinator.records import FederationRecord, Garbage
from coordinator.store import CommitOutcome
from coordinator.store.database import Database
from coordinator.store.leases import LeaseStore
from coordinator.store.rounds import RoundStore
from coordinator.store.updates import UpdateStore
from services.aggregation.uploads import Uploads
from shelora.additive.adder import Adder
from shelora.additive.wire import summand_planes
from shelora.committee.certificate import ContributorSet
from shelora.committee.context import RoundContext
from shelora.committee.field import PRIME
from shelora.committee.member import Member
from shelora.errors import DomainError, Reason
from tests.simulation.liars import draws_unspent, too_few


def _script(module: Any, name: str, rule: str, instead: str = "") -> AbstractContextManager[Any]:
    text = getattr(module, name)
    assert rule in text
    return mock.patch.object(module, name, text.replace(rule, instead))


def any_revision() -> AbstractContextManager[Any]:
    """A record is written whatever was written since it was read."""
    rule = "if revision ~= tonumber(ARGV[1]) then\n  return 0\nend"
    return _script(coordinator.store.database, "COMPARE_AND_SET", rule)


def commits_after_the_close() -> AbstractContextManager[Any]:
    """A commit is counted without a look at the round's state in the same step."""
    rule = "if redis.call('HGET', KEYS[1], 'state') ~= 'COLLECTING' then\n  return {4, 0}\nend"
    return _script(coordinator.store.updates, "COMMIT", rule)


def commit_acknowledged_unheard() -> AbstractContextManager[Any]:
    """A commit whose fate is unknown is acknowledged."""
    commit = UpdateStore.commit

    async def trusting(self: UpdateStore, *update: Any) -> Any:
        try:
            return await commit(self, *update)
        except DomainError as error:
            if error.reason is not Reason.STORE_UNAVAILABLE:
                raise
            return CommitOutcome.COMMITTED, 1

    return mock.patch.object(UpdateStore, "commit", trusting)


def one_generation_of_shards() -> AbstractContextManager[Any]:
    """Shards aggregated before a contributor was dropped are taken for those after."""

    def key(self: RoundStore, federation: Any, record: Any) -> str:
        return self.db.keys.shards(federation.federation_id, federation.instance, record.sequence, 0)

    return mock.patch.object(RoundStore, "_shards_key", key)


def unfenced_results() -> AbstractContextManager[Any]:
    """A worker that is late replaces the result of a newer request."""
    return _script(services.aggregation.scripts, "PUBLISH", "or stored[5] ~= ARGV[1]")


def deaf_when_a_wake_up_is_lost() -> AbstractContextManager[Any]:
    """Nobody looks again after a while."""

    async def wait(self: Signal, timeout_s: float) -> None:
        await self._event.wait()
        self._event.clear()

    return mock.patch.object(Signal, "wait", wait)


def kept_garbage() -> AbstractContextManager[Any]:
    """Rounds are forgotten without being deleted."""

    async def nothing(*_: Any) -> None:
        pass

    return mock.patch.object(FederationSteps, "_close_round", nothing)


def results_deleted_early() -> AbstractContextManager[Any]:
    """A published result is deleted with the updates of its round."""
    return mock.patch.object(
        transitions, "_remains", lambda ended, _: Garbage(round_id=ended.round.round_id, results=True)
    )


def keys_destroyed_early() -> AbstractContextManager[Any]:
    """The keys of the newest result are destroyed as soon as there are new ones."""
    return mock.patch.object(FederationRecord, "oldest_epoch", property(lambda self: self.epoch))


def kept_keys() -> AbstractContextManager[Any]:
    """Old keys are said to be destroyed."""

    async def nothing(*_: Any) -> None:
        pass

    return mock.patch.object(KeyAuthorityClient, "retire_epochs", nothing)


def immortal_fields() -> AbstractContextManager[Any]:
    """Members and evaluations are written without an expiry."""

    async def put(
        self: Database, federation_id: str, key: str, field: str, data: Any, *_: Any, **__: Any
    ) -> None:
        await self.redis.hset(key, field, data)

    return mock.patch.object(Database, "put_field", put)


def unchecked_uploads() -> AbstractContextManager[Any]:
    """A shard is promoted without a look at how much of it arrived."""

    async def unchecked(*_: Any) -> bool:
        return True

    return mock.patch.object(Uploads, "_check", unchecked)


@contextmanager
def leases_for_ever() -> Iterator[None]:
    """A lease is taken for an hour, so that nobody takes over from a driver that died."""
    acquire, renew = LeaseStore.acquire, LeaseStore.renew

    async def long(self: LeaseStore, federation_id: str, token: str, _lease_s: float) -> bool:
        return await acquire(self, federation_id, token, 3600)

    async def again(self: LeaseStore, federation_id: str, token: str, _lease_s: float) -> bool:
        return await renew(self, federation_id, token, 3600)

    with mock.patch.multiple(LeaseStore, acquire=long, renew=again):
        yield


def one_left_out() -> AbstractContextManager[Any]:
    """Of more updates than are needed, one is left out of the aggregate."""
    original = coordinator.driver.rounds.contributors

    def some(record: Any, commits: Any) -> Any:
        found = original(record, commits)
        return found[: max(record.round.min_updates, len(found) - 1)]

    return mock.patch.object(coordinator.driver.rounds, "contributors", some)


def one_counted_twice() -> AbstractContextManager[Any]:
    """The first client's update weighs what two would."""
    original = coordinator.driver.rounds.contributions

    def heavier(kind: Any, shard: int, commits: Any) -> Any:
        doubled = commits[0].update.report.model_copy(
            update={"example_count": 2 * commits[0].update.report.example_count}
        )
        first = commits[0].model_copy(
            update={"update": commits[0].update.model_copy(update={"report": doubled})}
        )
        return original(kind, shard, [first, *commits[1:]])

    return mock.patch.object(coordinator.driver.rounds, "contributions", heavier)


@contextmanager
def two_sets_a_number() -> Iterator[None]:
    """Members do not look which set they signed before, and coordinators ask for a second one of the same number."""
    with draws_unspent(), mock.patch.object(Member, "_note", return_value=None):
        yield


@contextmanager
def few_are_enough() -> Iterator[None]:
    """Members sign sets of two updates, whatever was promised, when they are shown one."""
    read = ContributorSet.read.__func__  # type: ignore[attr-defined]

    def lenient(cls: type[ContributorSet], context: RoundContext, content: bytes) -> ContributorSet:
        found: ContributorSet = read(cls, replace(context, min_updates=2), content)
        return found

    with too_few(), mock.patch.object(ContributorSet, "read", classmethod(lenient)):
        yield


def same_batches_again() -> AbstractContextManager[Any]:
    """After a set was certified in vain, clients send the same update into the next one."""
    return mock.patch.object(Attempt, "variant", "")


def one_weighs_less_than_it_says() -> AbstractContextManager[Any]:
    """The first client scales its update by half the weight that it states and members sign."""
    original = client_agent.making.summing

    def lighter(known: Any, dealer: Any, weight: int, largest_move: float) -> Any:
        found = original(known, dealer, weight, largest_move)
        factor = 0.5 if dealer._signer.name == "agent-0" else 1.0
        return replace(found, summand=replace(found.summand, share=factor * found.summand.share))

    return mock.patch.object(client_agent.making, "summing", lighter)


@contextmanager
def one_summed_twice() -> Iterator[None]:
    """The first client's summand is added twice, and members add its shares twice, so that the sum opens."""
    add, answered = Adder.add, Member._answered

    def twice(self: Adder, data: bytes | memoryview) -> None:
        if not self.contributors:
            self._sum.add(summand_planes(data, self.shape))
        add(self, data)

    def doubled(self: Member, chosen: ContributorSet) -> Any:
        first = chosen.contributors[0]
        held = self._held[first]
        self._held[first] = replace(held, share=(2 * held.share.astype(np.int64) % PRIME).astype(np.uint16))
        return answered(self, chosen)

    with mock.patch.object(Adder, "add", twice), mock.patch.object(Member, "_answered", doubled):
        yield


@dataclass(frozen=True)
class Sabotage:
    """A rule taken away."""

    work: Callable[[], AbstractContextManager[Any]]
    kinds: tuple[str, ...]
    """The kinds of faults that need the rule."""
    quick: bool
    """Whether it shows within a few schedules, so that `make test` can expect it to."""


SABOTAGES: Final = {
    work.__name__: Sabotage(work, tuple(kinds), quick)
    for quick, work, *kinds in (
        (True, any_revision, "store", "pause"),
        (True, one_left_out, "call"),
        (True, one_counted_twice, "call"),
        (True, kept_garbage, "call"),
        (True, results_deleted_early, "call"),
        (True, immortal_fields, "call"),
        (True, kept_keys, "call"),
        (True, few_are_enough, "call"),
        (False, one_weighs_less_than_it_says, "call"),
        (False, one_summed_twice, "call"),
        (True, same_batches_again, "loss", "worker"),
        (True, two_sets_a_number, "loss", "worker", "crash"),
        (False, keys_destroyed_early, "crash"),
        (False, deaf_when_a_wake_up_is_lost, "call"),
        (False, leases_for_ever, "crash"),
        (False, commits_after_the_close, "store"),
        (False, commit_acknowledged_unheard, "outage", "store"),
        (False, one_generation_of_shards, "loss", "worker"),
        (False, unfenced_results, "loss", "store", "pause"),
        (False, unchecked_uploads, "call"),
    )
}
