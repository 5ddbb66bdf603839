"""The driver against a real store: whole federations, step by step."""

from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.world import spec


async def test_a_federation_votes_plans_trains_and_finishes(fed):
    await fed.begin(spec())
    record = await fed.play()
    assert record.phase == "FINISHED"
    shown = await fed.shown()
    assert [(r.kind, r.number, r.state) for r in shown.history] == [
        (pb.ROUND_KIND_VOTE, 0, pb.ROUND_STATE_PUBLISHED),
        (pb.ROUND_KIND_TRAIN, 1, pb.ROUND_STATE_PUBLISHED),
        (pb.ROUND_KIND_TRAIN, 2, pb.ROUND_STATE_PUBLISHED),
    ]
    assert fed.authority.opened == [("fed", 1, "standard")]
