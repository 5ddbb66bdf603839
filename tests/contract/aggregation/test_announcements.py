"""Replicas announce themselves in Redis, by whose clock an announcement expires."""

import asyncio

import pytest

from services.aggregation.announcement import announced
from services.aggregation.keys import REPLICAS
from shelora.errors import DomainError, Reason


async def test_replicas_are_named_in_order(store):
    for address in ("b:2", "a:1"):
        await store.announce(address, 60_000)
    assert await store.replicas() == ["a:1", "b:2"]


async def test_an_announcement_that_is_not_repeated_expires(store, client):
    await store.announce("dead:1", 1)
    await store.announce("alive:1", 60_000)
    while (client.zscore(REPLICAS, "dead:1") or 0) >= _now_ms(client):
        await store.replicas()
    assert await store.replicas() == ["alive:1"]
    await store.announce("alive:1", 60_000)
    assert client.zcard(REPLICAS) == 1, "what has expired is deleted"


async def test_a_replica_is_named_while_it_serves(store):
    async with announced(store, "host.example:0", "0.0.0.0:7103"):
        while not await store.replicas():
            continue
        assert await store.replicas() == ["host.example:7103"]
    assert await store.replicas() == []


async def test_an_announcement_is_repeated(store, client):
    async with announced(store, "host:1", "127.0.0.1:7103", period_s=0.01):
        while (first := client.zscore(REPLICAS, "host:1")) is None:
            await store.replicas()
        while not (client.zscore(REPLICAS, "host:1") or 0) > first:
            await store.replicas()


async def test_a_store_that_does_not_answer_does_not_stop_a_replica(store, monkeypatch):
    async def silent(*_args):
        raise DomainError(Reason.STORE_UNAVAILABLE, "silent")

    monkeypatch.setattr(store, "announce", silent)
    monkeypatch.setattr(store, "withdraw", silent)
    async with announced(store, "host:1", "127.0.0.1:7103"):
        assert await store.replicas() == []


async def test_a_replica_stops_though_the_store_falls_silent(store, monkeypatch):
    silent = asyncio.Event()
    for call in ("announce", "withdraw"):
        monkeypatch.setattr(store, call, lambda *_: silent.wait())
    monkeypatch.setattr("services.common.parting.PARTING_S", 0.01)
    async with asyncio.timeout(30), announced(store, "host:1", "127.0.0.1:7103"):
        await asyncio.sleep(0)


async def test_a_malformed_address_is_refused(store):
    with pytest.raises(DomainError) as caught:
        async with announced(store, "host", "127.0.0.1:7103"):
            pass
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


def _now_ms(client):
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds // 1000
