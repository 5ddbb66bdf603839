"""What attacks are made of: federations on a running cluster, honest members without a model, hostile ones."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from client_agent.agent import Agent, Learn
from client_agent.config import AgentConfig
from client_agent.worker import Worker
from load.learner import MATRICES, TENSORS, SyntheticLearner
from shelora.ckks.secret import Encryptor, SecretKey
from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.levels import Level
from shelora.lora.codec import encode_update
from shelora.lora.layout import Layout
from shelora.lora.protect import protect
from shelora.lora.shards import LoraFactors
from shelora.messages import layout_from_proto, matrix_to_proto, tensor_to_proto
from shelora.operator import Operator, operator
from shelora.protocol import PROTOCOL_VERSION
from shelora.transport.channel import call, call_with_stream, open_channel
from shelora.transport.pieces import Digest, cut
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import aggregation_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.aggregation_pb2_grpc import AggregationStub
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub
from shelora.v1.key_authority_pb2_grpc import KeyAuthorityStub

EXAMPLES = 64
"""As many as each honest member has."""
BEAT_S = 2.0
RUN_S = 120.0
"""Longest that a federation in these tests may take."""
_KEY_ID = slice(56, 72)
"""Field of a ciphertext block's header."""


@dataclass
class Lab:
    """A running cluster and a folder for its members."""

    cluster: LocalCluster
    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def operator(self) -> AbstractAsyncContextManager[Operator]:
        """A connected operator."""
        return operator(self.cluster.addresses.coordinator, self.cluster.credentials)

    async def create(self, name: str, *, start: bool = True, **rules: Any) -> FederationSpec:
        """A new federation, its name made unique: `round`, `training`, `protection`, `screening` as in YAML.

        `selective` unless `protection` says otherwise: hostile members there write shards of their own.
        """
        training = {"base_model": "synthetic", "labels": ["cold", "warm"], "target_modules": ["query"]}
        rounds = {"rounds": 1, "clients": 3, "min_updates": 2, "deadline_s": 60}
        spec = FederationSpec.model_validate(
            {
                **rules,
                "name": f"{name}-{next(self._numbers)}",
                "training": {**training, **rules.get("training", {})},
                "round": {**rounds, **rules.get("round", {})},
                "protection": {"mode": "selective", **rules.get("protection", {})},
            }
        )
        async with self.operator() as connection:
            await connection.create(spec.to_proto())
            if start:
                await connection.start(spec.name)
        return spec

    async def view(self, spec: FederationSpec) -> pb.Federation:
        """The federation as its operator sees it."""
        async with self.operator() as connection:
            return await connection.get(spec.name)

    async def enrolled(self, spec: FederationSpec, name: str, promise: Level | None = None) -> Path:
        """State folder of a client with a certificate, which says what it was promised."""
        folder = self.folder / "clients" / spec.name / name
        folder.mkdir(parents=True, exist_ok=True)
        await self.cluster.enrol_client(spec.name, name, folder, promise)
        return folder

    async def honest(
        self,
        spec: FederationSpec,
        name: str,
        rank: int = 4,
        promise: Level | None = None,
        learn: Learn = SyntheticLearner,
        **config: Any,
    ) -> str:
        """Runs the real agent, its updates random, to its end. Returns its outcome, or the reason it raised."""
        addresses, folder = self.cluster.addresses, await self.enrolled(spec, name, promise)
        values = {
            "federation": spec.name,
            "client_id": name,
            "coordinator": addresses.coordinator,
            "aggregation": tuple(addresses.aggregation),
            "key_authority": addresses.key_authority,
            "state_dir": folder,
            "model": {"path": "synthetic"},
            "data": {"train": folder / "synthetic.jsonl"},
            "lora": {"rank": rank},
            **config,
        }
        worker = Worker()
        try:
            agent = Agent(AgentConfig.model_validate(values), learn, worker=worker, retry_s=1.0)
            return (await agent.run()).value
        except DomainError as error:
            return error.reason.value
        finally:
            await worker.close()

    @asynccontextmanager
    async def running(self, spec: FederationSpec, *names: str) -> AsyncIterator["asyncio.Task[list[str]]"]:
        """Honest members beside what is done inside; the task has their outcomes."""
        members = asyncio.create_task(_all(self.honest(spec, name) for name in names))
        try:
            yield members
        finally:
            members.cancel()
            await asyncio.gather(members, return_exceptions=True)

    @asynccontextmanager
    async def hostile(self, spec: FederationSpec, name: str = "hostile") -> AsyncIterator["Hostile"]:
        """A client with a certificate and connections of its own, that has not joined."""
        folder, addresses = await self.enrolled(spec, name), self.cluster.addresses
        credentials = TlsCredentials(IdentityFolder(folder / "identity"))
        async with (
            open_channel(addresses.coordinator, credentials) as coordinator,
            open_channel(addresses.aggregation[0], credentials) as aggregation,
            open_channel(addresses.key_authority, credentials) as keys,
        ):
            yield Hostile(
                federation=spec.name,
                name=name,
                credentials=credentials,
                coordinator=CoordinatorStub(coordinator),
                aggregation=AggregationStub(aggregation),
                keys=KeyAuthorityStub(keys),
            )


async def _all(outcomes: Iterator[Awaitable[str]]) -> list[str]:
    return list(await asyncio.wait_for(asyncio.gather(*outcomes), RUN_S))


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A member that calls what it likes, as often as it likes. Calls are made once."""

    federation: str
    name: str
    credentials: TlsCredentials
    coordinator: Any
    aggregation: Any
    keys: Any

    def join_request(self, **changes: Any) -> pb.JoinRequest:
        """What an honest member would say, but for the changes."""
        fields = {
            "federation_id": self.federation,
            "client_id": self.name,
            "rank": 4,
            "budget": 1.0,
            "example_count": EXAMPLES,
            "matrices": [matrix_to_proto(matrix) for matrix in MATRICES],
            "tensors": [tensor_to_proto(tensor) for tensor in TENSORS],
            "protocol_version": PROTOCOL_VERSION,
        }
        return pb.JoinRequest(**{**fields, **changes})

    async def join(self, **changes: Any) -> None:
        await call(self.coordinator.Join, self.join_request(**changes), retry_s=0)

    def heartbeat(self, **changes: Any) -> pb.HeartbeatRequest:
        fields = {"federation_id": self.federation, "client_id": self.name, "stage": "idle"}
        return pb.HeartbeatRequest(**{**fields, **changes})

    async def beat(self, **changes: Any) -> None:
        await call(self.coordinator.Heartbeat, self.heartbeat(**changes), retry_s=0)

    @asynccontextmanager
    async def member(self, **changes: Any) -> AsyncIterator[None]:
        """Joins and stays alive inside."""
        await self.join(**changes)
        beating = asyncio.create_task(self._beating())
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.beat()

    async def assignment(self, *kinds: str) -> pb.Assignment:
        """Waits for an assignment of one of these kinds; fails if the federation ends before."""
        async with asyncio.timeout(RUN_S):
            watch = self.coordinator.Watch(
                pb.WatchRequest(federation_id=self.federation, client_id=self.name)
            )
            async for assignment in watch:
                kind = assignment.WhichOneof("work")
                if kind in kinds:
                    watch.cancel()
                    return assignment
                assert kind not in {"halt", "finish"}, f"the federation ended before {kinds}"
        raise AssertionError("the stream ended")

    async def put(
        self,
        target: "Target",
        index: int,
        data: bytes,
        *,
        announced: int | None = None,
        sha256: bytes | None = None,
        **changes: Any,
    ) -> None:
        """Uploads a shard; `changes` replace fields of its header."""
        digest = Digest.of(data)
        fields = {
            "round_id": target.round_id,
            "client_id": self.name,
            "shard": index,
            "digest": common_pb2.ShardDigest(
                sha256=digest.sha256 if sha256 is None else sha256,
                total_bytes=digest.total_bytes if announced is None else announced,
            ),
            "layout_digest": target.layout.digest,
        }
        header = aggregation_pb2.PutShardHeader(**{**fields, **changes})

        async def parts() -> AsyncIterator[aggregation_pb2.PutShardRequest]:
            yield aggregation_pb2.PutShardRequest(header=header)
            for piece in cut(data):
                yield aggregation_pb2.PutShardRequest(piece=piece)

        # Again, as a refusal may get lost while the stream is still written (`shelora.transport.status.lost_status`).
        await call_with_stream(self.aggregation.PutShard, parts, timeout_s=30, retry_s=10)

    async def commit(
        self,
        target: "Target",
        shards: Sequence[bytes],
        *,
        report: pb.UpdateReport | None = None,
        **changes: Any,
    ) -> None:
        """Commits shards; `changes` replace fields of the request."""
        digests = [Digest.of(shard) for shard in shards]
        usual = pb.UpdateReport(client_id=self.name, example_count=1 if target.vote else EXAMPLES)
        fields = {
            "federation_id": self.federation,
            "round_id": target.round_id,
            "client_id": self.name,
            "layout_digest": target.layout.digest,
            "shards": [common_pb2.ShardDigest(sha256=d.sha256, total_bytes=d.total_bytes) for d in digests],
            "rank": 1 if target.vote else 4,
            "scaling": 1.0,
            "report": report or usual,
        }
        request = pb.CommitUpdateRequest(**{**fields, **changes})
        await call(self.coordinator.CommitUpdate, request, timeout_s=30, retry_s=0)

    async def answer(self, target: "Target", shards: Sequence[bytes]) -> None:
        """Uploads and commits shards as an honest member does."""
        for index, shard in enumerate(shards):
            await self.put(target, index, shard)
        await self.commit(target, shards)


@dataclass(frozen=True)
class Target:
    """A round to answer."""

    round_id: str
    layout: Layout
    vote: bool

    @classmethod
    def of(cls, assignment: pb.Assignment) -> "Target":
        kind = assignment.WhichOneof("work")
        round_ = getattr(assignment, kind).round
        return cls(round_.round_id, layout_from_proto(round_.layout), kind == "vote")

    def shards(self, rank: int = 4, *, value: float = 0.02) -> list[bytes]:
        """An update of good form; its ciphertexts decrypt to noise, under whatever key. Never the same twice."""
        layout = self.layout
        factors = {
            m.name: LoraFactors(
                np.full((m.out_features, rank), value, np.float32),
                np.full((rank, m.in_features), 0.5, np.float32),
            )
            for m in layout.matrices
        }
        tensors = {t.name: np.zeros(t.shape, np.float32) for t in layout.tensors}
        orders = {m.name: np.arange(m.in_features) for m in layout.matrices}
        foreign = Encryptor(SecretKey.generate(layout.ckks))
        serialized = []
        for content in protect(layout, factors, tensors, len(layout.tiers), orders, foreign):
            block = bytes(content.ciphertexts)
            own = block[: _KEY_ID.start] + layout.key_id + block[_KEY_ID.stop :]
            serialized.append(bytes(encode_update(layout, replace(content, ciphertexts=own))))
        return serialized


async def refusal(attempt: Awaitable[Any]) -> Reason:
    """Why an attempt was refused; fails if it was accepted."""
    try:
        await attempt
    except DomainError as error:
        return error.reason
    raise AssertionError("it was accepted")


async def status(attempt: Awaitable[Any]) -> grpc.StatusCode:
    """How a bare call ended."""
    try:
        await attempt
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
