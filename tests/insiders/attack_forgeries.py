"""A member that names others, sizes that are none, numbers that are none: refused by name, and the others finish."""

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

import numpy as np

from load.learner import MATRICES
from shelora.errors import Reason
from shelora.lora.fields import clear_format
from shelora.transport.channel import call
from shelora.v1 import aggregation_pb2, common_pb2, key_authority_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.insiders.lab import Hostile, Lab, Target, refusal

DENIED = Reason.PERMISSION_DENIED
INVALID = Reason.INVALID_ARGUMENT


async def test_a_member_speaks_for_itself_alone(lab: Lab):
    spec, other = await lab.create("scope", start=False), await lab.create("other", start=False)
    async with lab.hostile(spec) as hostile, lab.hostile(other, "victim") as victim:
        await victim.join()
        await hostile.join()  # the control: what names itself is accepted
        await hostile.beat()
        attempts: dict[str, Awaitable[Any]] = {
            "joins as another": hostile.join(client_id="victim"),
            "beats as another": hostile.beat(client_id="victim"),
            "beats in another federation": hostile.beat(federation_id=other.name),
            "reads another federation": _call(
                hostile.coordinator.GetFederation, pb.GetFederationRequest(federation_id=other.name)
            ),
            "creates a federation": _call(
                hostile.coordinator.CreateFederation,
                pb.CreateFederationRequest(spec=other.model_copy(update={"name": "mine"}).to_proto()),
            ),
            "asks for another's secrets": _call(
                hostile.keys.GetEpochSecrets,
                key_authority_pb2.GetEpochSecretsRequest(
                    federation_id=spec.name, epoch=1, client_id="victim"
                ),
            ),
            "opens an epoch": _call(
                hostile.keys.OpenEpoch,
                key_authority_pb2.OpenEpochRequest(federation_id=spec.name, epoch=7, parameters="standard"),
            ),
            "retires epochs": _call(
                hostile.keys.RetireEpochs,
                key_authority_pb2.RetireEpochsRequest(federation_id=spec.name, before_epoch=9),
            ),
            "aggregates": _call(
                hostile.aggregation.AggregateShard,
                aggregation_pb2.AggregateShardRequest(round_id=f"{spec.name}.x.1", shard=0),
            ),
            "opens a round": _call(
                hostile.aggregation.OpenRound, aggregation_pb2.OpenRoundRequest(round_id=f"{spec.name}.x.1")
            ),
            "closes a round": _call(
                hostile.aggregation.CloseRound,
                aggregation_pb2.CloseRoundRequest(round_id=f"{spec.name}.x.1"),
            ),
            "asks what another has sent": _call(
                hostile.aggregation.QueryShards,
                aggregation_pb2.QueryShardsRequest(round_id=f"{spec.name}.x.1", client_id="victim"),
            ),
            "reports for another": _call(
                hostile.coordinator.ReportEvaluation,
                pb.ReportEvaluationRequest(
                    federation_id=spec.name,
                    round_id=f"{spec.name}.x.1",
                    report=pb.EvaluationReport(client_id="victim", example_count=1),
                ),
            ),
        }
        assert {what: await refusal(attempt) for what, attempt in attempts.items()} == dict.fromkeys(
            attempts, DENIED
        )


async def test_numbers_that_are_none_are_refused_at_the_door(lab: Lab):
    spec = await lab.create("numbers", start=False)
    async with lab.hostile(spec) as hostile:
        await hostile.join()
        attempts = {
            "budget NaN": hostile.join(budget=math.nan),
            "rank 2^31": hostile.join(rank=2**31),
            "no examples": hostile.join(example_count=0),
            "2^63 examples": hostile.join(example_count=2**63),
            "columns of its own": hostile.join(
                matrices=[
                    common_pb2.Matrix(name=m.name, out_features=384, in_features=384, tier_columns=[3])
                    for m in MATRICES
                ]
            ),
            "stage with control characters": hostile.beat(stage="\x1b[31m"),
            "progress NaN": hostile.beat(progress=math.nan),
        }
        assert {what: await refusal(attempt) for what, attempt in attempts.items()} == dict.fromkeys(
            attempts, INVALID
        )


async def test_forged_uploads_and_commits_are_refused_and_the_others_finish(lab: Lab):
    spec = await lab.create("uploads")
    async with lab.running(spec, "h0", "h1") as others, lab.hostile(spec) as hostile, hostile.member():
        vote = Target.of(await hostile.assignment("vote"))
        other_model = hostile.join(matrices=hostile.join_request().matrices[:3])
        assert await refusal(other_model) is Reason.MODEL_MISMATCH
        shards = vote.shards()
        await _forged_uploads(hostile, vote, shards[0])
        for index, shard in enumerate(shards):
            await hostile.put(vote, index, shard)
        await _forged_commits(hostile, vote, shards)
        await hostile.commit(vote, shards)
        await hostile.commit(vote, shards)  # a repeat is the same commit
        assert await refusal(hostile.commit(vote, vote.shards())) is Reason.UPDATE_REWRITTEN

        training = Target.of(await hostile.assignment("train"))
        for value in (np.nan, np.inf):
            assert await refusal(hostile.put(training, 0, _with_one(training, value))) is (
                Reason.VALUE_NOT_FINITE
            )
        await hostile.answer(training, training.shards(value=1e-3))
        assert await others == ["finished"] * 2
        late = hostile.put(training, 0, training.shards()[0])
        assert await refusal(late) in {Reason.ROUND_UNKNOWN, Reason.UPDATE_REWRITTEN}
    federation = await lab.view(spec)
    assert federation.phase == pb.PHASE_FINISHED, federation.failure


async def test_an_update_is_final_once_it_is_committed(lab: Lab):
    spec = await lab.create("final", round={"clients": 2})
    async with (
        lab.hostile(spec) as hostile,
        lab.hostile(spec, "other") as other,
        hostile.member(),
        other.member(),
    ):
        vote = Target.of(await hostile.assignment("vote"))
        committed = vote.shards()
        for shards in (vote.shards(), committed):  # the control: until then one replaces the other
            for index, shard in enumerate(shards):
                await hostile.put(vote, index, shard)
        await hostile.commit(vote, committed)
        for index, shard in enumerate(vote.shards()):
            assert await refusal(hostile.put(vote, index, shard)) is Reason.UPDATE_REWRITTEN
        await hostile.put(vote, 0, committed[0])  # a repeat is the same upload
        await other.answer(vote, vote.shards())
        while not (history := (await lab.view(spec)).history):  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.1)
    assert [(r.state, r.update_count) for r in history] == [(pb.ROUND_STATE_PUBLISHED, 2)]


async def _forged_uploads(hostile: Hostile, round_: Target, shard: bytes) -> None:
    own = hostile.federation
    forgeries: list[tuple[dict[str, Any], set[Reason]]] = [
        ({"client_id": "h0"}, {DENIED}),
        ({"round_id": "other.deadbeef.1"}, {DENIED}),
        ({"round_id": f"{own}.deadbeef.1"}, {Reason.ROUND_UNKNOWN}),
        ({"round_id": f"{own}.{{evil}}:x\n"}, {Reason.ROUND_UNKNOWN, INVALID}),
        ({"index": 2**31}, {Reason.SHARD_UNKNOWN}),
        ({"announced": 2**62}, {Reason.TRANSFER_TOO_LARGE}),
        ({"offset": 2**63}, {Reason.TRANSFER_OFFSET}),
        ({"sha256": b""}, {INVALID}),
        ({"sha256": bytes(32)}, {Reason.DIGEST_MISMATCH}),
        ({"data": shard[:-100], "announced": len(shard)}, {Reason.TRANSFER_TRUNCATED}),
    ]
    for forged, expected in forgeries:
        attempt = hostile.put(round_, **{"index": 0, "data": shard, **forged})
        assert await refusal(attempt) in expected, forged


async def _forged_commits(hostile: Hostile, round_: Target, shards: list[bytes]) -> None:
    def report(**changes: Any) -> pb.UpdateReport:
        return pb.UpdateReport(**{"client_id": hostile.name, "example_count": 1, **changes})

    forgeries: list[tuple[dict[str, Any], Reason]] = [
        ({"report": report(train_loss=math.nan)}, Reason.VALUE_NOT_FINITE),
        ({"report": report(train_s=math.inf)}, INVALID),
        ({"report": report(client_id="h0")}, DENIED),
        ({"scaling": 1e308}, INVALID),
        ({"client_id": "h0"}, DENIED),
        ({"shards": shards * 3}, INVALID),
    ]
    for forged, expected in forgeries:
        attempt = hostile.commit(round_, **{"shards": shards, **forged})
        assert await refusal(attempt) is expected, forged


def _with_one(round_: Target, value: float) -> bytes:
    """A first shard with one clear value of B replaced."""
    data, clear = bytearray(round_.shards()[0]), clear_format(round_.layout.clear_bits)
    of_b, forged = (bytes(clear.write(np.array([number], np.float32))) for number in (0.02, value))
    at = data.find(8 * of_b)  # in a row: one alone may stand in a ciphertext
    assert at >= 0
    data[at : at + len(forged)] = forged
    return bytes(data)


def _call(method: Any, request: Any) -> Awaitable[Any]:
    return call(method, request, retry_s=0)
