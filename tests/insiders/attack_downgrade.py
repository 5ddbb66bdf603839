"""Whoever controls Redis or the coordinator asks agents for less than they were promised: they leave, by name.

The control of each attack is a member that asks for no more, and sends what the attacker wants.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio as redis

from client_agent.state import AgentState
from shelora.cli.cluster import LocalCluster
from shelora.federation import FederationSpec
from shelora.levels import Level
from shelora.v1 import common_pb2
from tests.insiders.lab import Lab

TRAITOR = Path(__file__).parent / "traitor"
REFUSED = "PROTECTION_REFUSED"


async def test_a_federation_that_is_made_unprotected_in_redis_gets_no_update(lab: Lab):
    spec = await lab.create("downgraded", start=False)
    assert await _rewritten(lab, spec, b'"selective"', b'"none"'), "the attack changes something"
    await _start(lab, spec)
    assert (await lab.view(spec)).spec.protection.mode == "none", "and the coordinator says so"
    outcomes = await asyncio.gather(lab.honest(spec, "h0"), lab.honest(spec, "h1"))
    assert outcomes == [REFUSED] * 2
    # the control: who writes that it accepts this sends all of A in the clear
    written = {"protection": {"accept": ["none"]}}
    members = [asyncio.create_task(lab.honest(spec, f"w{i}", **written)) for i in range(3)]
    clear = await _clear_columns(lab, spec, members)
    assert await asyncio.gather(*members) == ["finished"] * 3
    assert clear


async def test_a_promise_outlives_the_federation_that_kept_it(lab: Lab):
    spec = await lab.create("kept", round={"clients": 2}, protection={"negotiation": "sealed"})
    assert await asyncio.gather(lab.honest(spec, "h0"), lab.honest(spec, "h1")) == ["finished"] * 2
    state = AgentState(lab.folder / "clients" / spec.name / "h0")
    assert state.promise() is Level.SELECTIVE
    state.close()
    assert await _rewritten(lab, spec, b'"sealed"', b'"ope"')
    assert await lab.honest(spec, "h0") == REFUSED, "weaker than it took part in"
    written = {"protection": {"accept": ["selective-ope"]}}
    assert await lab.honest(spec, "h0", **written) != REFUSED, "its owner says that it is meant"


async def test_a_promise_is_certified_at_enrolment_and_holds_from_the_first_contact(lab: Lab):
    spec = await lab.create("certified", start=False, protection={"negotiation": "ope"})
    assert await lab.honest(spec, "h0", promise=Level.SELECTIVE) == REFUSED
    (applicant,) = (await lab.view(spec)).applicants
    assert (applicant.client_id, applicant.reason) == ("h0", REFUSED), "and the operator reads it"
    await _start(lab, spec)  # the control: who was promised nothing takes part
    assert await asyncio.gather(*(lab.honest(spec, f"w{i}") for i in range(3))) == ["finished"] * 3


@pytest.fixture(scope="module")
def traitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("traitor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TRAITOR))
        with LocalCluster(folder / "cluster", fixed_ports=False, workers=1) as cluster:
            yield Lab(cluster, folder)


async def test_a_coordinator_that_asks_for_a_thousandth_of_the_columns_gets_no_update(traitor: Lab):
    spec = await traitor.create("tiers", round={"clients": 3, "min_updates": 2, "deadline_s": 30})
    # the control: who asks for no more is obeyed
    frugal = [traitor.honest(spec, name, budget=0.001) for name in ("f0", "f1")]
    outcomes = await asyncio.gather(traitor.honest(spec, "h0"), *frugal)
    assert outcomes == [REFUSED, "finished", "finished"]


async def _start(lab: Lab, spec: FederationSpec) -> None:
    async with lab.operator() as connection:
        await connection.start(spec.name)


async def _rewritten(lab: Lab, spec: FederationSpec, old: bytes, new: bytes) -> int:
    """Replaces text in everything that Redis keeps of a federation; how many fields changed."""
    changed = 0
    async with redis.from_url(lab.cluster.addresses.redis_url) as store:
        async for key in store.scan_iter("*"):
            if spec.name.encode() not in key or await store.type(key) != b"hash":
                continue
            for field, value in (await store.hgetall(key)).items():
                if old in value:
                    await store.hset(key, field, value.replace(old, new))
                    changed += 1
    return changed


async def _clear_columns(lab: Lab, spec: FederationSpec, running: list["asyncio.Task[str]"]) -> bool:
    """Whether some update lay in Redis with all of its A in the clear while the members ran."""
    async with redis.from_url(lab.cluster.addresses.redis_url) as store:
        while not all(task.done() for task in running):
            async for key in store.scan_iter("*:update:*"):
                if spec.name.encode() in key and await _is_clear(await store.get(key)):
                    return True
            await asyncio.sleep(0.02)
    return False


async def _is_clear(data: bytes | None) -> bool:
    try:
        shard = common_pb2.UpdateShard.FromString(data or b"")
    except Exception:  # noqa: BLE001 - half of an upload
        return False
    return bool(shard.matrices) and not shard.ciphertexts and all(part.clear_a for part in shard.matrices)
