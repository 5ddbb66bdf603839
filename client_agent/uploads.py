"""Uploads a spooled update: only the bytes that have not arrived yet."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import structlog

from client_agent.metrics import BYTES, timed
from client_agent.progress import Activity
from client_agent.replicas import transfer_timeout_s
from client_agent.session import digest_to_proto
from client_agent.state import Spool
from shelora.protocol import Stage
from shelora.transport.pieces import Digest, cut
from shelora.transport.replicas import AggregationStub, Replicas
from shelora.v1 import aggregation_pb2 as pb

_log = structlog.get_logger(__name__)


async def upload(replicas: Replicas, client_id: str, spool: Spool, activity: Activity) -> float:
    """Stores every shard. Returns the seconds it took.

    A shard that arrived in part, with the same digest, goes on from the byte where it broke off; a failing replica
    is left for the next one, which knows the same bytes.

    Raises: Stopped; DomainError as PutShard does.
    """
    with timed(Stage.UPLOADING) as watch:
        for index in range(len(spool.shards)):
            await replicas.call(
                partial(_put, client_id=client_id, spool=spool, index=index, activity=activity)
            )
        activity.report(Stage.UPLOADING, 1.0)
    return watch.seconds


async def _put(
    stub: AggregationStub, *, client_id: str, spool: Spool, index: int, activity: Activity
) -> None:
    digest = spool.shards[index]
    offset = await _received_bytes(stub, client_id, spool.note.round_id, index, digest)
    if offset is None:
        return
    header = pb.PutShardHeader(
        round_id=spool.note.round_id,
        client_id=client_id,
        shard=index,
        digest=digest_to_proto(digest),
        offset=offset,
        layout_digest=spool.note.layout_digest,
    )
    data = await asyncio.to_thread(spool.read, index)
    before = sum(d.total_bytes for d in spool.shards[:index])

    async def parts() -> AsyncIterator[pb.PutShardRequest]:
        yield pb.PutShardRequest(header=header)
        sent = offset
        for piece in cut(data, offset):
            activity.report(Stage.UPLOADING, (before + sent) / max(spool.total_bytes, 1))
            yield pb.PutShardRequest(piece=piece)
            sent += len(piece)
            BYTES.labels(direction="up").inc(len(piece))

    activity.report(Stage.UPLOADING, (before + offset) / max(spool.total_bytes, 1))
    _log.debug("shard_upload", round=spool.note.round_id, shard=index, offset=offset, of=digest.total_bytes)
    await stub.PutShard(parts(), timeout=transfer_timeout_s(digest.total_bytes - offset))


async def _received_bytes(
    stub: AggregationStub, client_id: str, round_id: str, index: int, digest: Digest
) -> int | None:
    """Bytes of that shard that are stored; None if all are."""
    request = pb.QueryShardsRequest(round_id=round_id, client_id=client_id)
    response = await stub.QueryShards(request, timeout=20)
    for progress in response.shards:
        if progress.shard == index and progress.digest == digest_to_proto(digest):
            return None if progress.complete else min(progress.received_bytes, digest.total_bytes)
    return 0
