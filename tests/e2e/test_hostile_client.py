"""A member that sends rubbish, lies and exaggerates: refused or left out by name, and the federation finishes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.model import AdaptedModel, choose_device
from shelora.ckks.secret import Encryptor, SecretKey
from shelora.ckks.wire import HEADER_BYTES, encode_block
from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError, Reason
from shelora.lora.codec import decode_update, encode_update
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout
from shelora.lora.protect import protect
from shelora.lora.screening import squared_norm, update_norm
from shelora.lora.shards import LoraFactors, UpdateShardContent
from shelora.messages import layout_from_proto, matrix_to_proto, tensor_to_proto
from shelora.transport.channel import call, call_with_stream, open_channel
from shelora.transport.pieces import Digest, cut
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import aggregation_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.aggregation_pb2_grpc import AggregationStub
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.e2e import federations
from tests.e2e.agents import AGENTS, LABELS, specification, start_agent

NAME = "hostile"
SCALE_BITS, KEY_ID = slice(12, 16), slice(56, 72)
"""Fields of a ciphertext block's header."""
EXAMPLES = 64
"""As many as each of the others has."""
HEARTBEAT_S = 5
ROUND_S = 20
"""What a round waits for the member that never sends an update."""


async def test_what_is_not_believed_is_refused_or_left_out_and_the_federation_finishes(
    cluster: LocalCluster, model: Path, tmp_path: Path
):
    spec = specification("selective", rounds=1, clients=4, min_updates=2, deadline_s=ROUND_S)
    await federations.start(cluster, spec)
    hostile = asyncio.create_task(_take_part(cluster, model, tmp_path / NAME))
    agents = [await start_agent(cluster, agent, cluster.addresses, model, tmp_path) for agent in AGENTS]
    federation = await federations.wait_until_over(cluster, spec, agents)
    refused, notice = await hostile

    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    assert [agent.popen.returncode for agent in agents] == [0, 0, 0]
    assert [r.state for r in federation.history] == [pb.ROUND_STATE_PUBLISHED] * 2
    for summary in federation.history:
        assert summary.cohort_count == 4
    assert refused == [_RUBBISH, [*_RUBBISH, Reason.EXAMPLES_MISMATCH, Reason.NORM_TOO_LARGE]]
    vote, training = federation.history
    assert (vote.update_count, training.update_count) == (3, 4)
    assert [(drop.client_id, drop.reason) for drop in training.dropped] == [(NAME, Reason.NORM_OUTLIER)]
    assert notice == training.dropped[0].why


_RUBBISH = [
    Reason.SHARD_MALFORMED,
    Reason.CIPHERTEXT_TRUNCATED,
    Reason.CIPHERTEXT_FOREIGN_KEY,
    Reason.CIPHERTEXT_WRONG_SCALE,
    Reason.CIPHERTEXT_COEFFICIENT_RANGE,
    Reason.TRANSFER_TOO_LARGE,
    Reason.SHARD_MISSING,
]


async def _take_part(cluster: LocalCluster, model: Path, folder: Path) -> tuple[list[list[Reason]], str]:
    """Joins, and answers the vote and the round with rubbish, the round also with lies and an update that is far larger
    than the others. Returns the reasons it was given, by round, and what it was told of that update."""
    addresses = cluster.addresses
    await cluster.enrol_client("weather", NAME, folder)
    mine = TlsCredentials(IdentityFolder(folder / "identity"))
    async with (
        open_channel(addresses.coordinator, mine) as channel,
        open_channel(addresses.aggregation[0], mine) as far,
    ):
        coordinator, aggregation = CoordinatorStub(channel), AggregationStub(far)
        await call(coordinator.Join, _join(model))
        alive = asyncio.create_task(_stay_alive(coordinator))
        try:
            return await _answers(coordinator, aggregation)
        finally:
            alive.cancel()


async def _stay_alive(coordinator: CoordinatorStub) -> None:
    """Heartbeats, so that the next cohort counts on it too."""
    while True:
        await call(
            coordinator.Heartbeat, pb.HeartbeatRequest(federation_id="weather", client_id=NAME, stage="idle")
        )
        await asyncio.sleep(HEARTBEAT_S)


async def _answers(
    coordinator: CoordinatorStub, aggregation: AggregationStub
) -> tuple[list[list[Reason]], str]:
    reasons = []
    async for assignment in coordinator.Watch(pb.WatchRequest(federation_id="weather", client_id=NAME)):
        work = assignment.WhichOneof("work")
        if work in {"vote", "train"}:
            reasons.append(await _answer(coordinator, aggregation, getattr(assignment, work).round))
        if work == "train":
            reasons[-1] += await _exaggerate(coordinator, aggregation, assignment.train.round)
        if work == "finish":
            return reasons, assignment.notice
    raise AssertionError("the federation ended before it trained")


async def _answer(
    coordinator: CoordinatorStub, aggregation: AggregationStub, round_: pb.RoundRef
) -> list[Reason]:
    layout = layout_from_proto(round_.layout)
    index = next(i for i, shard in enumerate(layout.shards) if shard.tensors)
    reasons = [
        await _refusal(_put(aggregation, round_.round_id, layout, index, content))
        for content in _rubbish(layout, index)
    ]
    reasons.append(await _refusal(_put(aggregation, round_.round_id, layout, index, b"x", announced=2**40)))
    never_stored = [common_pb2.ShardDigest(sha256=bytes(32), total_bytes=1) for _ in layout.shards]
    reasons.append(await _refusal(_commit(coordinator, round_.round_id, layout, never_stored)))
    return reasons


async def _exaggerate(
    coordinator: CoordinatorStub, aggregation: AggregationStub, round_: pb.RoundRef
) -> list[Reason]:
    """Stores an update of good form, and commits it with a lie, with too large a scaling, and as it may pass.

    Returns: why it was refused twice; the third commit is accepted.
    """
    layout = layout_from_proto(round_.layout)
    shards = list(_update(layout))
    for index, data in enumerate(shards):
        await _put(aggregation, round_.round_id, layout, index, data)
    norm = update_norm(1.0, [squared_norm(layout, decode_update(layout, i, s)) for i, s in enumerate(shards)])
    digests = [_digest(data) for data in shards]
    refusals = [
        await _refusal(_commit(coordinator, round_.round_id, layout, digests, examples=10**6)),
        await _refusal(_commit(coordinator, round_.round_id, layout, digests, scaling=10_001 / norm)),
    ]
    await _commit(coordinator, round_.round_id, layout, digests, scaling=9_999 / norm)
    return refusals


def _update(layout: Layout) -> Iterator[bytes]:
    """The shards of an update with a large B and ciphertexts that decrypt to noise."""
    factors = {
        m.name: LoraFactors(np.ones((m.out_features, 1), np.float32), np.ones((1, m.in_features), np.float32))
        for m in layout.matrices
    }
    tensors = {t.name: np.zeros(t.shape, np.float32) for t in layout.tensors}
    orders = {m.name: np.arange(m.in_features) for m in layout.matrices}
    foreign = Encryptor(SecretKey.generate(layout.ckks))
    for content in protect(layout, factors, tensors, len(layout.tiers), orders, foreign):
        block = _replaced(bytes(content.ciphertexts), KEY_ID, layout.key_id)
        yield encode_update(layout, replace(content, ciphertexts=block))


def _rubbish(layout: Layout, index: int) -> Iterator[bytes]:
    """Serialized shards, each wrong in one way."""
    rows = np.zeros((1, kind_of(layout.shards[index]).slot_count(layout, layout.shards[index])))
    foreign = encode_block(Encryptor(SecretKey.generate(layout.ckks)).encrypt(rows))
    own = _replaced(foreign, KEY_ID, layout.key_id)
    yield b"\xff" * 1000
    yield _shard(layout, index, own[:-1])
    yield _shard(layout, index, foreign)
    yield _shard(layout, index, _replaced(own, SCALE_BITS, (99).to_bytes(4, "little")))
    yield _shard(layout, index, own[:HEADER_BYTES] + b"\xff" * (len(own) - HEADER_BYTES))


def _replaced(block: bytes, field: slice, value: bytes) -> bytes:
    return block[: field.start] + value + block[field.stop :]


def _shard(layout: Layout, index: int, ciphertexts: bytes) -> bytes:
    content = UpdateShardContent(
        shard=index,
        rank=1,
        encrypted_tiers=len(layout.tiers),
        matrices=(),
        clear_tensors=(),
        ciphertexts=ciphertexts,
    )
    return encode_update(layout, content)


async def _put(
    aggregation: AggregationStub,
    round_id: str,
    layout: Layout,
    index: int,
    data: bytes,
    announced: int | None = None,
) -> None:
    header = aggregation_pb2.PutShardHeader(
        round_id=round_id,
        client_id=NAME,
        shard=index,
        digest=_digest(data, announced),
        layout_digest=layout.digest,
    )

    async def parts() -> AsyncIterator[aggregation_pb2.PutShardRequest]:
        yield aggregation_pb2.PutShardRequest(header=header)
        for piece in cut(data):
            yield aggregation_pb2.PutShardRequest(piece=piece)

    await call_with_stream(aggregation.PutShard, parts, timeout_s=30)


def _digest(data: bytes, announced: int | None = None) -> common_pb2.ShardDigest:
    digest = Digest.of(data)
    return common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=announced or digest.total_bytes)


async def _commit(
    coordinator: CoordinatorStub,
    round_id: str,
    layout: Layout,
    shards: Sequence[common_pb2.ShardDigest],
    *,
    examples: int = EXAMPLES,
    scaling: float = 1.0,
) -> None:
    request = pb.CommitUpdateRequest(
        federation_id="weather",
        round_id=round_id,
        client_id=NAME,
        layout_digest=layout.digest,
        shards=shards,
        rank=1,
        scaling=scaling,
        report=pb.UpdateReport(client_id=NAME, example_count=examples),
    )
    await call(coordinator.CommitUpdate, request, timeout_s=30)


async def _refusal(attempt: Awaitable[None]) -> Reason:
    try:
        await attempt
    except DomainError as error:
        return error.reason
    raise AssertionError("it was accepted")


def _join(folder: Path) -> pb.JoinRequest:
    """What an honest agent with this model says."""
    model = AdaptedModel(
        load_checkpoint(str(folder), "sequence-classification", LABELS),
        task="sequence-classification",
        target_modules=("query", "value"),
        lora=LoraSettings(rank=2),
        device=choose_device("cpu"),
    )
    return pb.JoinRequest(
        federation_id="weather",
        client_id=NAME,
        rank=2,
        budget=1.0,
        example_count=EXAMPLES,
        matrices=[matrix_to_proto(m) for m in model.matrices],
        tensors=[tensor_to_proto(t) for t in model.tensors],
        protocol_version=1,
    )
