"""Clients that could not become members: their reasons reach the operator, and take little room."""

import pytest

from coordinator.records import Sighting
from coordinator.store.members import MAX_APPLICANTS
from shelora.errors import DomainError, Reason
from tests.contract.coordinator.world import World, spec


async def say(fed: World, client: str, reason: Reason | None = Reason.DATA_INVALID, federation: str = "fed"):
    """What such a client's call is answered with."""
    said = Sighting(stage="idle", progress=0.0, at_ms=fed.now_ms, reason=reason, why="row 3: no label")
    with pytest.raises(DomainError) as refused:
        await fed.handlers.members.heartbeat(federation, client, said)
    return refused.value.reason


async def shown(fed: World) -> list[tuple[str, str, str, int]]:
    return [(a.client_id, a.reason, a.why, a.said_unix_ms) for a in (await fed.shown()).applicants]


async def test_why_a_client_could_not_join_is_shown_until_it_does(fed):
    await fed.handlers.federations.create(spec())
    assert await say(fed, "a", reason=None) is Reason.CLIENT_UNKNOWN
    assert await shown(fed) == [], "the control: it said nothing"
    assert await say(fed, "a", Reason.MODEL_INVALID) is Reason.CLIENT_UNKNOWN
    assert await say(fed, "a") is Reason.CLIENT_UNKNOWN
    assert await shown(fed) == [("a", "DATA_INVALID", "row 3: no label", fed.now_ms)]
    await fed.join("a")
    assert await shown(fed) == []


async def test_who_could_not_join_and_was_revoked_is_not_shown(fed):
    await fed.begin(spec(), "abc")
    await say(fed, "d")
    fed.revoked["d"] = fed.now_ms
    await fed.settle()
    assert await shown(fed) == []
    fed.now_ms += 1
    await say(fed, "d")  # enrolled anew
    assert [client for client, *_ in await shown(fed)] == ["d"]


async def test_those_who_could_not_join_take_bounded_room_and_go_with_the_federation(fed):
    await fed.handlers.federations.create(spec())
    for number in range(MAX_APPLICANTS + 2):
        await say(fed, f"c{number:03}")
    assert len(await shown(fed)) == MAX_APPLICANTS
    await say(fed, "c000", Reason.MODEL_INVALID)
    assert (await shown(fed))[0][1] == "MODEL_INVALID", "who is known may say something new"
    await fed.handlers.federations.delete("fed")
    await fed.driver._hold("fed")
    assert await say(fed, "a") is Reason.FEDERATION_UNKNOWN
    assert [key async for key in fed.store.members.db.redis.scan_iter("*applicants*")] == []
