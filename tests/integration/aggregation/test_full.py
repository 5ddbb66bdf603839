"""Redis without room, for real: uploads are refused and told when to come again; what was stored stays."""

from collections.abc import Callable, Iterator

import grpc
import pytest

from services.aggregation.keys import RoundKeys
from services.aggregation.records import ShardSlot
from services.aggregation.slots import SlotLimits
from services.aggregation.store import connect
from services.aggregation.uploads import Announcement, UploadLimits, Uploads
from services.aggregation.watermark import UPLOAD_SHARE, Watermark
from shelora.errors import Reason
from shelora.transport.pieces import Digest, cut
from shelora.transport.status import error_from_rpc, lost_status, retry_after_s
from tests.integration.aggregation.service import ROUND, announcement, stream


@pytest.fixture
def room(keys) -> Iterator[Callable[[int], None]]:
    """Leaves Redis this many bytes beyond those it uses."""

    def leave(size: int) -> None:
        used = keys.client.info("memory")["used_memory"]
        keys.client.config_set("maxmemory", used + size)

    yield leave
    keys.client.config_set("maxmemory", 0)


async def refusal(caller, cohort, client: str, data: bytes) -> grpc.aio.AioRpcError:
    """How one attempt at an upload is refused."""
    while True:
        try:
            await caller.stub.PutShard(stream(announcement(cohort.layout, client, 0, data), cut(data)))
        except grpc.aio.AioRpcError as error:
            if not lost_status(error):
                return error
        else:
            raise AssertionError("it was accepted")


async def test_uploads_that_find_no_room_are_refused_for_a_while_and_nothing_stored_is_lost(
    caller, wide, keys, room
):
    first, second = (wide.shard_bytes(client, 0) for client in ("client-0", "client-1"))
    await caller.open(wide.layout)
    await caller.put(wide.layout, "client-0", 0, first)
    room(len(second) // 2)
    error = await refusal(caller, wide, "client-1", second)
    assert error_from_rpc(error).reason is Reason.STORE_FULL
    assert retry_after_s(error) > 0
    assert (await caller.progress("client-0"))[0].complete
    assert not keys.client.keys("*partial*")  # room for those who have begun
    keys.client.config_set("maxmemory", 0)
    await caller.put(wide.layout, "client-1", 0, second)
    await caller.aggregate(wide, 0)
    assert await caller.result(0)


async def test_a_round_is_closed_and_makes_room_while_redis_is_full(caller, wide, keys, room):
    await caller.open(wide.layout)
    await caller.put(wide.layout, "client-0", 0, wide.shard_bytes("client-0", 0))
    room(-1)
    await caller.close(results=True)
    assert keys.client.keys() == [RoundKeys(ROUND).closed.encode()]


async def test_a_resumed_upload_needs_room_for_the_rest_alone(caller, wide, redis_url):
    data, slot = wide.shard_bytes("client-0", 0), ShardSlot(ROUND, "client-0", 0)
    await caller.open(wide.layout)
    store, watermark, half = connect(redis_url, connections=2, timeout_s=10), Watermark(), len(data) // 2
    begun = await store.begin(slot, Digest.of(data), "0" * 32)
    await store.append(begun, 0, data[:half])
    watermark.tell(0, int((len(data) - half) / UPLOAD_SHARE) + 1)

    async def rest():
        for piece in cut(data, half):
            yield piece

    uploads = Uploads(
        store,
        UploadLimits(slots=SlotLimits(1, 1, 1), checks=1, idle_s=30, least_bytes_s=0.0),
        lambda: "1" * 32,
        watermark,
    )
    assert not await uploads.receive(
        Announcement(slot=slot, digest=Digest.of(data), offset=half, layout_digest=wide.layout.digest), rest()
    )
    assert (await caller.progress("client-0"))[0].complete
    await store.close()
