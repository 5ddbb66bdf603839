"""The service as it is run: a process of its own with worker processes."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest

from services.common.server import Ready, running_server
from shelora.ckks.parameters import INSECURE_TOY
from shelora.errors import Reason
from shelora.lora.layout import Layout, Matrix, Shard
from shelora.transport.channel import call, open_channel
from shelora.transport.pieces import cut
from shelora.v1 import aggregation_pb2 as pb
from shelora.v1 import aggregation_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc
from tests.identities import AGGREGATION, COORDINATOR, KEY_AUTHORITY, TestAuthority, client
from tests.integration.aggregation.cohort import Cohort, large_layout
from tests.integration.aggregation.service import ROUND, Caller, announcement, refusal

CLIENTS = [f"client-{number}" for number in range(4)]

LONG_COLUMNS = 6_000
"""Encrypted columns of a shard that takes a worker a second or more, so that it can be met in the middle."""


@dataclass
class Service:
    process: subprocess.Popen
    caller: Caller

    @property
    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, 60)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - the condition lies in another process
        await asyncio.sleep(0.01)


class Secured(Caller):
    """Calls as the coordinator and as the clients, each with its own certificate."""

    def __init__(self, stubs: dict[str, Any], address: str) -> None:
        coordinator, first = stubs["coordinator"], stubs["client-0"]
        names = ("OpenRound", "AggregateShard", "CloseRound", "ListReplicas")
        served = {name: getattr(coordinator, name) for name in names}
        super().__init__(
            SimpleNamespace(**served, PutShard=first.PutShard, GetResult=first.GetResult), address
        )
        self._stubs = stubs

    async def put_all(self, cohort: Cohort) -> None:
        for name in cohort.clients:
            sending = Caller(self._stubs[name], self.address)
            for shard in range(len(cohort.layout.shards)):
                await sending.put(cohort.layout, name, shard, cohort.shard_bytes(name, shard))


@asynccontextmanager
async def secured(authority: TestAuthority, address: str) -> AsyncIterator[Secured]:
    identities = {"coordinator": COORDINATOR, **{n: client(n, ROUND) for n in CLIENTS}}
    async with AsyncExitStack() as stack:
        stubs = {}
        for name, identity in identities.items():
            channel = await stack.enter_async_context(open_channel(address, authority.credentials(identity)))
            stubs[name] = aggregation_pb2_grpc.AggregationStub(channel)
        yield Secured(stubs, address)


class NobodyIsRevoked(enrolment_pb2_grpc.EnrolmentServicer):
    """What an aggregation server asks of the key authority."""

    async def ListRevocations(self, request: Any, context: Any) -> enrolment_pb2.ListRevocationsResponse:
        return enrolment_pb2.ListRevocationsResponse()


@asynccontextmanager
async def key_authority(authority: TestAuthority) -> AsyncIterator[str]:
    def register(server: grpc.aio.Server) -> None:
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(NobodyIsRevoked(), server)

    credentials = authority.credentials(KEY_AUTHORITY)
    async with running_server(["shelora.v1.Enrolment"], register, credentials=credentials) as address:
        yield address


@asynccontextmanager
async def service(redis_url: str, folder: Path, workers: int = 1) -> AsyncIterator[Service]:
    authority = TestAuthority(folder / "authority")
    async with (
        key_authority(authority) as address,
        started(redis_url, folder, authority, address, workers) as running,
    ):
        yield running


@asynccontextmanager
async def started(
    redis_url: str, folder: Path, authority: TestAuthority, key_authority_address: str, workers: int
) -> AsyncIterator[Service]:
    ready_file = folder / "ready.json"
    command = [sys.executable, "-m", "services.aggregation.main", "--redis-url", redis_url]
    command += ["--workers", str(workers), "--ready-file", str(ready_file)]
    command += [
        "--identity",
        str(authority.enrolled(AGGREGATION)),
        "--key-authority-address",
        key_authority_address,
    ]
    with subprocess.Popen(command) as process:  # noqa: ASYNC220 - it only starts one
        try:
            await until(lambda: Ready.read(ready_file) or process.poll() is not None)
            ready = Ready.read(ready_file)
            assert ready is not None
            async with secured(authority, ready.address) as caller:
                await call(caller.stub.ListReplicas, pb.ListReplicasRequest())  # it knows who is revoked
                yield Service(process, caller)
        finally:
            process.kill()


def long_layout(key_id: bytes) -> Layout:
    return Layout(
        parameters=INSECURE_TOY.name,
        key_id=key_id,
        matrices=(Matrix("long", 16, LONG_COLUMNS, tier_columns=(LONG_COLUMNS,)),),
        tensors=(),
        tiers=(1.0,),
        encrypt_tensors=False,
        max_rank=4,
        max_directions=16,
        shards=(Shard(matrices=(0,)),),
    )


@pytest.fixture(scope="session")
def long_cohort() -> Cohort:
    return Cohort(size=4, layout=long_layout)


def working(worker: psutil.Process) -> Callable[[], bool]:
    """Whether a worker has used a noticeable time since now."""
    before = worker.cpu_times().user
    return lambda: worker.cpu_times().user > before + 0.15


async def test_a_killed_worker_fails_its_shard_and_the_next_try_succeeds(redis_url, tmp_path, long_cohort):
    async with service(redis_url, tmp_path) as running:
        await running.caller.open(long_cohort.layout)
        await running.caller.put_all(long_cohort)
        [worker] = running.workers
        in_the_middle = working(worker)
        call = asyncio.ensure_future(refusal(running.caller.aggregate(long_cohort, 0)))
        await until(in_the_middle)
        worker.kill()
        assert await call is Reason.WORKER_FAILED
        answer = await running.caller.aggregate(long_cohort, 0)
        assert len(await running.caller.result(0)) == answer.digest.total_bytes
        [replacement] = running.workers
        assert replacement.pid != worker.pid


async def test_a_killed_service_leaves_no_workers_not_even_busy_ones(redis_url, tmp_path, long_cohort):
    async with service(redis_url, tmp_path, workers=2) as running:
        await running.caller.open(long_cohort.layout)
        await running.caller.put_all(long_cohort)
        workers = running.workers
        assert len(workers) == 2
        busy = [working(worker) for worker in workers]
        call = asyncio.ensure_future(refusal(running.caller.aggregate(long_cohort, 0)))
        await until(lambda: any(check() for check in busy))
        running.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 30)
        assert alive == []
        await call


async def test_a_terminated_service_finishes_the_upload_in_progress_and_leaves_no_workers(
    redis_url, tmp_path
):
    cohort = Cohort(size=2, layout=large_layout)
    data = cohort.shard_bytes("client-0", 0)
    pieces = list(cut(data))
    async with service(redis_url, tmp_path, workers=2) as running:
        workers = running.workers
        await running.caller.open(cohort.layout)
        call = running.caller.stub.PutShard()
        await call.write(announcement(cohort.layout, "client-0", 0, data))
        await call.write(pb.PutShardRequest(piece=pieces[0]))
        await asyncio.sleep(0.1)
        running.process.send_signal(signal.SIGTERM)
        for piece in pieces[1:]:
            await call.write(pb.PutShardRequest(piece=piece))
        await call.done_writing()
        assert (await call).digest.total_bytes == len(data)
        assert await running.ended() == 0
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 10)
        assert alive == []


def test_the_help_names_the_settings():
    command = [sys.executable, "-m", "services.aggregation.main", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--redis-url" in shown


def test_a_refused_setting_ends_the_process_with_its_name():
    command = [sys.executable, "-m", "services.aggregation.main", "--workers", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "workers" in ended.stderr
