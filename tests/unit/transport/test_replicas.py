from contextlib import asynccontextmanager

import grpc
import pytest

from shelora.errors import DomainError, Reason
from shelora.transport.channel import open_channel
from shelora.transport.replicas import SHUNNED_S, Replicas
from shelora.transport.status import translated
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Listing(aggregation_pb2_grpc.AggregationServicer):
    """Names what it is told to, or dies."""

    def __init__(self, addresses=()):
        self.addresses = addresses
        self.asked = 0

    async def ListReplicas(self, request, context):
        self.asked += 1
        return pb.ListReplicasResponse(addresses=self.addresses)


class Refusing(aggregation_pb2_grpc.AggregationServicer):
    async def ListReplicas(self, request, context):
        async with translated(context):
            raise DomainError(Reason.ROUND_UNKNOWN, "no such round")


@asynccontextmanager
async def serving(servicer):
    server = grpc.aio.server()
    aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def in_order(_addresses):
    """Shuffles nothing."""


@pytest.fixture
async def make():
    made = []

    def make(*seeds, refresh_s=1e9, shuffle=in_order, stays=False):
        clock = Clock()
        replicas = Replicas(
            seeds, open_channel, refresh_s=refresh_s, stays=stays, clock_s=clock, shuffle=shuffle
        )
        replicas._refresh_due_s = clock.now_s + refresh_s
        made.append(replicas)
        return replicas, clock

    yield make
    for replicas in made:
        await replicas.close()


def chosen(replicas, count):
    return [replicas.choose().address for _ in range(count)]


A, B, C = (f"127.0.0.1:{port}" for port in (1, 2, 3))


async def test_calls_go_to_the_replicas_in_turn(make):
    replicas, _ = make(A, B, C)
    assert chosen(replicas, 6) == [A, B, C, A, B, C]


async def test_a_replica_that_failed_is_left_alone_for_a_while(make):
    replicas, clock = make(A, B, C)
    replicas.failed(replicas.choose())
    assert chosen(replicas, 4) == [B, C, B, C]
    clock.now_s += SHUNNED_S + 1
    assert sorted(chosen(replicas, 3)) == [A, B, C]


async def test_when_all_failed_the_one_that_failed_first_is_tried_first(make):
    replicas, clock = make(A, B)
    for _ in range(2):
        replicas.failed(replicas.choose())
        clock.now_s += 1
    assert chosen(replicas, 1) == [A]
    replicas.failed(replicas.choose())
    assert chosen(replicas, 1) == [B]


async def test_the_current_one_stays_until_it_fails_or_others_come(make):
    replicas, clock = make(A, B, stays=True)
    first = replicas.choose()
    assert replicas.choose() is first
    replicas.failed(first)
    assert replicas.choose().address == B
    clock.now_s += SHUNNED_S + 1
    assert replicas.choose().address == B
    replicas.learn([A, B, C])
    assert replicas.choose().address == A


async def test_a_new_replica_is_learned_of_and_one_that_is_gone_forgotten(make):
    replicas, _ = make(A)
    replicas.learn([B, C])
    assert set(chosen(replicas, 3)) == {A, B, C}, "the configured address stays"
    gone = replicas._known[B].channel
    replicas.learn([C])
    assert replicas.addresses == (A, C)
    [closing] = replicas._closing
    await closing
    assert gone.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_no_announcements_leave_the_configured_addresses(make):
    replicas, _ = make(A, B)
    replicas.learn([])
    assert replicas.addresses == (A, B)


async def test_the_first_replica_that_answers_names_the_others(make):
    listing = Listing([B, C])
    async with serving(listing) as alive:
        replicas, _ = make(A, alive)
        await replicas.refresh()
        assert replicas.addresses == tuple(sorted((A, alive, B, C)))
        assert listing.asked == 1


async def test_what_is_known_stays_if_no_replica_answers(make):
    replicas, _ = make(A, B)
    await replicas.refresh()
    assert replicas.addresses == (A, B)


async def test_calls_look_for_others_when_it_is_time_and_do_not_wait_for_them(make):
    listing = Listing([B])
    async with serving(listing) as alive:
        replicas, clock = make(alive, refresh_s=5)
        replicas.choose()
        assert replicas._refreshing is None
        clock.now_s += 5
        assert replicas.choose().address == alive
        replicas.choose()
        await replicas._refreshing
        assert listing.asked == 1
        assert replicas.addresses == tuple(sorted((alive, B)))


async def listed(stub):
    return list((await stub.ListReplicas(pb.ListReplicasRequest(), timeout=20)).addresses)


@pytest.mark.parametrize("stays", [False, True])
async def test_a_call_that_may_pass_elsewhere_is_tried_with_the_next_replica(make, stays):
    async with serving(Listing([C])) as alive:
        replicas, _ = make(A, alive, stays=stays)
        assert await replicas.call(listed) == [C]
        assert [replica.address for replica in (replicas.choose(), replicas.choose())] == [alive, alive], (
            "the one that failed is left alone"
        )


async def test_a_call_that_fails_everywhere_ends_with_the_reason(make):
    replicas, _ = make(A, B)
    with pytest.raises(DomainError) as failed:
        await replicas.call(listed, retry_s=0)
    assert failed.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_refusal_is_not_carried_to_another_replica(make):
    refusing, other = Refusing(), Listing()
    async with serving(refusing) as first, serving(other) as second:
        replicas, _ = make(first, second)
        with pytest.raises(DomainError) as refused:
            await replicas.call(listed)
    assert (refused.value.reason, other.asked) == (Reason.ROUND_UNKNOWN, 0)
