"""Servers, both kinds together, that give some agents another result of a round than the others.

Aggregation adds one unit to one value of the sum, which opens all the same (docs/committee.md, "Sums are not
authenticated"), and the coordinator announces these bytes to the agents that get them.
"""

import hashlib
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from coordinator.servicer import CoordinatorServicer
from coordinator.statements import Statements
from services.aggregation.keys import RoundKeys
from services.aggregation.servicer import AggregationServicer
from shelora.additive.wire import HEADER_BYTES, MAGIC
from shelora.committee.context import result_digest
from shelora.transport.certificates import holder
from shelora.v1 import aggregation_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb

_FORGED: Final = 0
"""The shard that differs."""


def shifted(result: bytes) -> bytes:
    """A result shard whose first value is one unit off."""
    found = bytearray(result)
    found[found.index(MAGIC) + HEADER_BYTES] ^= 1
    return bytes(found)


class _BelievesAnyone:
    """A coordinator that looks at no signature of the agents."""

    def verify(self, *_: Any) -> None:
        pass

    def author(self, statement: Any, *_: Any) -> str:
        client_id: str = holder(statement.certificate).identity.client_id
        return client_id


async def _announce(redis: Any, own: pb.Assignment, number: int, *, hidden: bool) -> None:
    """Changes an assignment that names the result of that training round."""
    work = getattr(own, own.WhichOneof("work") or "wait")
    name = next((name for name in ("base", "result") if hasattr(work, name) and work.HasField(name)), "")
    reference: common_pb2.ResultRef | None = getattr(work, name) if name else None
    if reference is None or reference.round_number != number:
        return
    digest = reference.shards[_FORGED]
    stored = RoundKeys(reference.round_id).result_bytes(_FORGED, digest.sha256)
    digest.sha256 = hashlib.sha256(shifted(await redis.get(stored))).digest()
    if hidden and name == "base":
        start = result_digest(reference.round_id, (shard.sha256 for shard in reference.shards))
        own.train.round.context.start = start


@contextmanager
def two_results(victims: Collection[str], number: int, *, hidden: bool) -> Iterator[None]:
    """Servers that give these clients another result of a training round.

    Args: number: the round's. hidden: whether the coordinator also tells them of rounds that start from it, and takes
    what they sign over these.
    """
    watch, serve = CoordinatorServicer.Watch, AggregationServicer.GetResult

    async def told(self: CoordinatorServicer, request: pb.WatchRequest, context: Any) -> AsyncIterator[Any]:
        async for assignment in watch(self, request, context):
            own = pb.Assignment.FromString(assignment.SerializeToString())
            if request.client_id in victims:
                await _announce(self._handlers.lookup.store.rounds.db.redis, own, number, hidden=hidden)
            yield own

    async def given(
        self: AggregationServicer, request: aggregation_pb2.GetResultRequest, context: Any
    ) -> AsyncIterator[aggregation_pb2.GetResultResponse]:
        wanted = request.shard == _FORGED and int(request.round_id.rpartition(".")[2]) == number
        if context.caller not in victims or not wanted:
            async for response in serve(self, request, context):
                yield response
            return
        offset, request.offset = request.offset, 0
        whole = b"".join([response.piece async for response in serve(self, request, context)])
        yield aggregation_pb2.GetResultResponse(piece=shifted(whole)[offset:])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CoordinatorServicer, "Watch", told))
        stack.enter_context(mock.patch.object(AggregationServicer, "GetResult", given))
        if hidden:
            stack.enter_context(mock.patch.object(Statements, "trust", return_value=_BelievesAnyone()))
        yield
