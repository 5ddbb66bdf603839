"""A coordinator that dies at any write goes on where it stopped, as the next process or as another replica."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import redis

from coordinator.records import Phase
from coordinator.store import Store
from tests.contract.coordinator.world import World, spec

WRITES = frozenset({"write", "put_layout", "put_shard"})


class DeathError(Exception):
    """The process is gone."""


class Mortal:
    """A process that dies at its n-th write to a store, before it or after it."""

    def __init__(self, dies_at: int, *, after: bool) -> None:
        self._left = dies_at
        self._after = after
        self.dead = False

    def store(self, store: Store) -> Store:
        """The store as this process sees it."""
        return replace(store, federations=Dying(self, store.federations), rounds=Dying(self, store.rounds))

    async def write(self, method, *args, **kwargs):
        self._left -= 1
        self.dead = self.dead or self._left == 0
        if self.dead and not (self._after and self._left == 0):
            raise DeathError
        result = await method(*args, **kwargs)
        if self.dead:
            raise DeathError
        return result


class Dying:
    """A part of the store whose writes count."""

    def __init__(self, process: Mortal, part: Any) -> None:
        self._process = process
        self._part = part

    def __getattr__(self, name: str):
        method = getattr(self._part, name)
        if name not in WRITES or not inspect.iscoroutinefunction(method):
            return method
        return partial(self._process.write, method)


async def play(fed: World, mortal: Mortal) -> None:
    """Plays to the end; once the first driver is dead, with another one."""
    driver = fed.new_driver(mortal.store(fed.store))
    for _ in range(40):
        try:
            await fed.settle(driver)
        except DeathError:
            driver = fed.new_driver(fed.store)
            await fed.settle(driver)
        if (await fed.federation()).ended:
            return
        await fed.act()
    raise AssertionError("the federation does not end")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_federation_survives_the_death_of_its_driver_at_every_write(fed, redis_url, after):
    writes = 0
    for dies_at in range(1, 100):
        await reset(fed, redis_url)
        await fed.begin(spec(rounds=1))
        mortal = Mortal(dies_at, after=after)
        await play(fed, mortal)
        await assert_as_undisturbed(fed)
        writes += 1
        if not mortal.dead:
            break
    assert writes > 15


async def reset(fed: World, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    fed.aggregation.__init__()
    fed.authority.__init__()


async def assert_as_undisturbed(fed: World) -> None:
    record = await fed.federation()
    assert record.phase is Phase.FINISHED
    history = (await fed.shown()).history
    assert [(r.number, r.attempt, r.update_count) for r in history] == [(0, 1, 3), (1, 1, 3)]
    assert set(fed.aggregation.computed.values()) == {1}
    assert fed.aggregation.result_rounds() == {r.round_id for r in history}
    assert not fed.aggregation.updates
