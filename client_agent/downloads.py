"""Downloads a published result: only the bytes that are not on disk yet, every shard checked by its digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from client_agent.metrics import BYTES, timed
from client_agent.progress import Activity
from client_agent.replicas import transfer_timeout_s
from client_agent.session import digest_from_proto
from client_agent.state import AgentState, Inbox
from shelora.errors import DomainError, Reason
from shelora.lora.codec import decode_result
from shelora.lora.layout import Layout
from shelora.lora.shards import MIN_CONTRIBUTORS, ResultShardContent
from shelora.messages import layout_from_proto
from shelora.protocol import Stage
from shelora.transport.pieces import Digest
from shelora.transport.replicas import AggregationStub, Replicas
from shelora.v1 import aggregation_pb2, common_pb2

_log = structlog.get_logger(__name__)

MAX_RESULT_SHARD_BYTES: Final = 2**30
"""A result shard larger than this is refused: a layout makes shards of some 30 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A published aggregate, as announced."""

    round_id: str
    layout: Layout
    shards: tuple[Digest, ...]
    number: int = 0
    """Number of its training round; 0 for votes."""

    @classmethod
    def from_proto(cls, message: common_pb2.ResultRef) -> "Result":
        """Raises: DomainError TOO_FEW_CONTRIBUTORS, INVALID_ARGUMENT, LAYOUT_MISMATCH, TRANSFER_TOO_LARGE."""
        if message.contributor_count < MIN_CONTRIBUTORS:
            raise DomainError(
                Reason.TOO_FEW_CONTRIBUTORS,
                f"a result of {message.contributor_count} updates is refused; the least is {MIN_CONTRIBUTORS}",
            )
        layout = layout_from_proto(message.layout)
        shards = tuple(digest_from_proto(digest) for digest in message.shards)
        if len(shards) != len(layout.shards):
            raise DomainError(
                Reason.LAYOUT_MISMATCH, "the result has another number of shards than its layout"
            )
        result = cls(round_id=message.round_id, layout=layout, shards=shards, number=message.round_number)
        if result.largest_shard_bytes > MAX_RESULT_SHARD_BYTES:
            raise DomainError(
                Reason.TRANSFER_TOO_LARGE, f"a result shard exceeds {MAX_RESULT_SHARD_BYTES} bytes"
            )
        return result

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(digest.total_bytes for digest in self.shards)

    @property
    def largest_shard_bytes(self) -> int:
        """Bytes of the largest shard."""
        return max((digest.total_bytes for digest in self.shards), default=0)

    def contents(self, inbox: Inbox) -> Iterator[ResultShardContent]:
        """The downloaded shards, parsed and checked, one in memory at a time."""
        return (decode_result(self.layout, index, inbox.read(index)) for index in range(len(self.shards)))


async def download(replicas: Replicas, state: AgentState, result: Result, activity: Activity) -> Inbox:
    """Brings every shard of a result to disk.

    Raises: Stopped; DomainError RESULT_UNKNOWN, DIGEST_MISMATCH, TRANSFER_*, STORE_UNAVAILABLE.
    """
    inbox = state.open_inbox(result.round_id)
    with timed(Stage.DOWNLOADING):
        for index, digest in enumerate(result.shards):
            activity.report(Stage.DOWNLOADING, index / len(result.shards))
            if not inbox.has(index, digest):
                await replicas.call(partial(_get, inbox=inbox, result=result, index=index, activity=activity))
                inbox.accept(index, digest)
    return inbox


async def _get(
    stub: AggregationStub, *, inbox: Inbox, result: Result, index: int, activity: Activity
) -> None:
    """Appends what is missing to the shard's partial file; stops at the announced size."""
    total = result.shards[index].total_bytes
    with inbox.partial(index).open("ab") as file:
        size = file.tell()
        if size >= total:
            return
        _log.debug("shard_download", round=result.round_id, shard=index, offset=size, of=total)
        request = aggregation_pb2.GetResultRequest(round_id=result.round_id, shard=index, offset=size)
        async for response in stub.GetResult(request, timeout=transfer_timeout_s(total - size)):
            activity.report(Stage.DOWNLOADING, (index + size / total) / len(result.shards))
            size += len(response.piece)
            if size > total:
                raise DomainError(Reason.TRANSFER_TOO_LARGE, f"result shard {index} is longer than announced")
            file.write(response.piece)
            BYTES.labels(direction="down").inc(len(response.piece))


def contents(result: Result, inbox: Inbox, activity: Activity) -> Iterator[ResultShardContent]:
    """The shards of a downloaded result, one in memory at a time."""
    for done, content in enumerate(result.contents(inbox)):
        activity.report(Stage.DECRYPTING, done / len(result.shards))
        yield content
