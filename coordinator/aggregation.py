"""The coordinator's view of aggregation: any replica serves any call, so a failed call goes on at the next."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from coordinator.records import Commit, ShardResult, StoredDigest, StoredShard, UpdateRecord
from shelora.errors import DomainError, Reason
from shelora.federation import ScreeningSpec
from shelora.lora.layout import Layout
from shelora.lora.parts import LEAST_RUN
from shelora.lora.screening import counted_norm, largest_believed, shares
from shelora.messages import layout_to_proto
from shelora.rounds import RoundKind
from shelora.transport.channel import RETRY_S, TIMEOUT_S
from shelora.transport.replicas import AggregationStub, Replicas
from shelora.transport.status import for_callers
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import common_pb2

_T = TypeVar("_T")

AGGREGATE_TIMEOUT_S: Final = 600.0
"""Deadline of one attempt at a shard: hundreds of times what a large shard takes on one core."""
HELP_TIMEOUT_S: Final = 15.0
"""Deadline of HelpAggregate, which only asks for work."""


class AggregationPool:
    """Calls aggregation replicas in turn.

    Args:
        replicas: Those known now.
        retry_s: Seconds during which a transient failure is tried again, elsewhere first.
        aggregate_timeout_s: Deadline of one attempt at AggregateShard.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        retry_s: float = RETRY_S,
        aggregate_timeout_s: float = AGGREGATE_TIMEOUT_S,
    ) -> None:
        self._replicas = replicas
        self._retry_s = retry_s
        self._aggregate_timeout_s = aggregate_timeout_s

    async def open_round(self, round_id: str, layout: Layout, ttl_s: int, ranks: Mapping[str, int]) -> None:
        """Makes a round known to the clients in `ranks`. Raises LAYOUT_MISMATCH if it has another layout."""
        request = pb.OpenRoundRequest(
            round_id=round_id,
            layout=layout_to_proto(layout),
            ttl_s=ttl_s,
            members=[pb.RoundMember(client_id=name, rank=rank) for name, rank in ranks.items()],
        )
        await self._anywhere(lambda stub: stub.OpenRound(request, timeout=TIMEOUT_S))

    async def stored(self, round_id: str, client_id: str) -> dict[int, StoredShard]:
        """The shards of an update that have arrived completely, by index. Raises ROUND_UNKNOWN."""
        request = pb.QueryShardsRequest(round_id=round_id, client_id=client_id)
        response = await self._anywhere(lambda stub: stub.QueryShards(request, timeout=TIMEOUT_S))
        return {
            shard.shard: StoredShard(
                digest=digest_from_proto(shard.digest), squared_norm=float(shard.squared_norm)
            )
            for shard in response.shards
            if shard.complete
        }

    async def seal(self, round_id: str, update: UpdateRecord) -> None:
        """Fixes an update for the rest of its round. Raises SHARD_MISSING unless it is stored, ROUND_UNKNOWN."""
        request = pb.SealUpdateRequest(
            round_id=round_id,
            client_id=update.client_id,
            shards=[digest_to_proto(digest) for digest in update.shards],
        )
        await self._anywhere(lambda stub: stub.SealUpdate(request, timeout=TIMEOUT_S))

    async def aggregate(
        self, round_id: str, shard: int, contributions: Sequence[pb.Contribution]
    ) -> ShardResult:
        """Aggregates a shard at one replica, with the help of all where the cohort is large enough for parts.

        Raises SHARD_MISSING, TOO_FEW_CONTRIBUTORS, ROUND_UNKNOWN, WORKER_FAILED.
        """
        request = pb.AggregateShardRequest(round_id=round_id, shard=shard, contributions=contributions)
        helping = asyncio.create_task(self._help(request))
        try:
            response = await self._anywhere(
                lambda stub: stub.AggregateShard(request, timeout=self._aggregate_timeout_s)
            )
        finally:
            helping.cancel()
        return ShardResult(digest=digest_from_proto(response.digest), cpu_s=response.cpu_s)

    async def close_round(self, round_id: str, *, results: bool) -> None:
        """Deletes a round's updates, and its results too if asked. A round that is gone is closed."""
        request = pb.CloseRoundRequest(round_id=round_id, results=results)
        try:
            await self._anywhere(lambda stub: stub.CloseRound(request, timeout=TIMEOUT_S))
        except DomainError as error:
            if error.reason is not Reason.ROUND_UNKNOWN:
                raise

    async def _help(self, request: pb.AggregateShardRequest) -> None:
        """Asks all replicas to make parts of a shard."""
        if len(request.contributions) >= 2 * LEAST_RUN:
            asked = pb.HelpAggregateRequest(shard=request)
            await self._replicas.each(lambda stub: stub.HelpAggregate(asked, timeout=HELP_TIMEOUT_S))

    async def _anywhere(self, operation: Callable[[AggregationStub], Awaitable[_T]]) -> _T:
        with for_callers():
            return await self._replicas.call(operation, retry_s=self._retry_s)


def contributions(
    kind: RoundKind, shard: int, commits: Sequence[Commit], rules: ScreeningSpec
) -> list[pb.Contribution]:
    """What goes into a shard, in the order given: every voter counts the same, an update counts its examples.

    Claims of examples and norms count as far as `shelora.lora.screening` believes them.
    """
    if kind is RoundKind.VOTE:
        weights, factors = [1 / len(commits)] * len(commits), [1.0] * len(commits)
    else:
        weights = shares([commit.update.report.example_count for commit in commits], rules.max_example_ratio)
        norms = {commit.update.client_id: commit.update.norm for commit in commits}
        most = largest_believed(norms, rules.max_norm_ratio)
        factors = [counted_norm(norm, most) for norm in norms.values()]
    return [
        pb.Contribution(
            client_id=commit.update.client_id,
            sha256=bytes.fromhex(commit.update.shards[shard].sha256),
            weight=weight,
            scaling=commit.update.scaling * factor,
        )
        for weight, factor, commit in zip(weights, factors, commits, strict=True)
    ]


def lacks(stored: Mapping[int, StoredShard], committed: Sequence[StoredDigest]) -> bool:
    """Whether any committed shard is not stored with its digest."""
    return any(
        index not in stored or stored[index].digest != digest for index, digest in enumerate(committed)
    )


def digest_from_proto(message: common_pb2.ShardDigest) -> StoredDigest:
    return StoredDigest(sha256=message.sha256.hex(), total_bytes=message.total_bytes)


def digest_to_proto(digest: StoredDigest) -> common_pb2.ShardDigest:
    return common_pb2.ShardDigest(sha256=bytes.fromhex(digest.sha256), total_bytes=digest.total_bytes)
