"""What a call or a step costs must not depend on how many others there are."""

import asyncio
from collections import Counter

import pytest

from coordinator.handlers.watching import OwnCommit
from coordinator.render import Renderer
from coordinator.store.committees import CommitteeStore
from coordinator.store.federations import FederationStore
from coordinator.store.members import MemberStore
from coordinator.store.presence import PresenceStore
from coordinator.store.rounds import RoundStore
from coordinator.store.updates import UpdateStore
from tests.contract.coordinator.members import Convened, Convening, root
from tests.contract.coordinator.world import World, spec

READS = {
    "federation": (FederationStore, "read"),
    "round": (RoundStore, "read"),
    "commit_of": (UpdateStore, "commit_of"),
    "commits": (UpdateStore, "commits"),
    "evaluations": (RoundStore, "evaluations"),
    "members": (MemberStore, "all"),
    "sightings": (PresenceStore, "sightings"),
}
WATCHERS = [f"client-{index}" for index in range(20)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what is read of the store."""
    counts: Counter = Counter()

    def counted(name, method):

        async def call(self, *args):
            counts[name] += 1
            return await method(self, *args)

        return call

    for name, (part, method) in READS.items():
        monkeypatch.setattr(part, method, counted(name, getattr(part, method)))
    return counts


async def test_a_change_is_read_once_for_all_who_watch(fed: World, reads: Counter):
    await fed.begin(spec(), WATCHERS)
    await fed.settle()
    reads.clear()
    fed.changes.wake_all()
    looks = await asyncio.gather(
        *(fed.handlers.watching.assignment("fed", client, OwnCommit()) for client in WATCHERS)
    )
    assert {look[1].assignment_id for look in looks} == {f"vote/{looks[0][0].round_id(1)}"}
    assert (reads["federation"], reads["round"]) == (1, 1)
    fed.changes.wake_all()
    await fed.handlers.watching.assignment("fed", WATCHERS[0], OwnCommit())
    assert (reads["federation"], reads["round"]) == (2, 2)


async def test_looking_again_without_a_change_asks_for_no_commit(fed: World, reads: Counter):
    await fed.begin(spec(), WATCHERS)
    await fed.settle()
    reads.clear()
    commit = OwnCommit()
    for _ in range(3):
        await fed.handlers.watching.assignment("fed", WATCHERS[0], commit)
    assert reads["commit_of"] == 1


async def test_a_commit_makes_the_driver_look_at_no_other_member(fed: World, reads: Counter):
    await fed.begin(spec(), WATCHERS)
    await fed.settle()
    reads.clear()
    for client in WATCHERS[:-1]:
        await fed.do(client, await fed.assignment(client))
        await fed.driver.step("fed")
    assert reads["members"] == 0


async def test_listing_a_federation_reads_no_report_of_a_member(fed: World, reads: Counter):
    await fed.begin(spec(), WATCHERS)
    await fed.settle()
    for client in WATCHERS[:-1]:
        await fed.do(client, await fed.assignment(client))
    record = await fed.federation()
    reads.clear()
    listed = await Renderer(fed.store).listed(record)
    assert (listed.current.update_count, listed.current.cohort_count) == (len(WATCHERS) - 1, len(WATCHERS))
    assert [name for name in ("commits", "evaluations", "members", "sightings") if reads[name]] == []


async def test_joining_makes_the_driver_look_at_no_member_until_there_are_enough(fed: World, reads: Counter):
    await fed.handlers.federations.create(spec(clients=len(WATCHERS)))
    await fed.handlers.federations.start("fed")
    await fed.driver.step("fed")
    reads.clear()
    for client in WATCHERS[:-1]:
        await fed.join(client)
        await fed.driver.step("fed")
    assert reads["members"] == 0
    await fed.join(WATCHERS[-1])
    await fed.driver.step("fed")
    assert reads["members"] == 1


async def test_what_a_committee_is_told_is_read_once_however_often_the_driver_looks(
    fed: World, monkeypatch: pytest.MonkeyPatch
):
    """A thousand clients each wake the driver: looks that read all again would be a thousand times a thousand."""
    values, looks = Counter(), 0

    def counted(name):
        method = getattr(CommitteeStore, name)

        async def call(self, *args):
            found = await method(self, *args)
            kind = args[0] if name == "statements" else name
            values[str(kind)] += len(found)
            return found

        return call

    for name in ("statements", "dealings"):
        monkeypatch.setattr(CommitteeStore, name, counted(name))
    names = [f"ward-{number:02}" for number in range(12)]
    party = Convened(fed, names)
    await fed.begin(spec(Convening.name, clients=12, rounds=1), names)
    step = fed.driver.step

    async def often(federation_id):
        nonlocal looks
        looks += 3
        for _ in range(2):
            await step(federation_id)
        return await step(federation_id)

    monkeypatch.setattr(fed.driver, "step", often)
    values.clear()
    federation = await party.play()
    assert federation.trained == 1, federation.failure
    assert looks > 24
    assert values["views"] == 12 + 7 + 7, (
        "the keys of the seven members once for all who ask, once for the opening"
    )
    assert values["checks"] == 7
    assert values["dealings"] == 2 * 12, "once to count them, and once to show them to all members"


async def test_the_keys_of_a_committee_are_read_once_for_all_who_ask(
    fed: World, monkeypatch: pytest.MonkeyPatch
):
    reads, read = 0, CommitteeStore.statements

    async def counted(self, *args):
        nonlocal reads
        reads += 1
        return await read(self, *args)

    names = [f"ward-{number:02}" for number in range(12)]
    party = Convened(fed, names)
    await fed.begin(spec(Convening.name, clients=12, rounds=1), names)
    current = await party.until("COLLECTING")
    fed.handlers = fed.new_handlers(root=root().der)
    monkeypatch.setattr(CommitteeStore, "statements", counted)
    found = [await fed.handlers.committees.keys("fed", current.round_id, name) for name in names]
    assert reads == 1
    assert [len(keys) for keys in found] == [7] * 12
