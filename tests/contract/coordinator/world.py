"""A coordinator on a real store with fakes around it, driven step by step under a clock that tests move."""

import itertools
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coordinator import checks
from coordinator.aggregation import AggregationPool
from coordinator.authority import KeyAuthorityClient
from coordinator.changes import Changes
from coordinator.decisions import Decision, Done, Rest
from coordinator.driver import Driver, DriverPolicy, driver_on
from coordinator.handlers import Handlers, handlers_on
from coordinator.handlers.watching import OwnCommit
from coordinator.liveness import USUAL, Liveness
from coordinator.records import FederationRecord, Sighting
from coordinator.render import Renderer
from coordinator.store import Store, redis_store
from coordinator.votes import votes_of
from services.common.redis_client import connect
from shelora.federation import FederationSpec
from shelora.messages import layout_from_proto
from shelora.negotiation.ballots import Ballot
from shelora.transport.channel import open_channel
from shelora.transport.pieces import Digest, cut
from shelora.transport.replicas import Replicas
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.fakes import FakeAggregation, FakeKeyAuthority, serving

MATRICES = [
    common_pb2.Matrix(name="layer.0.query", out_features=8, in_features=12),
    common_pb2.Matrix(name="layer.0.value", out_features=8, in_features=12),
]
COLUMNS = 24
TENSORS = [common_pb2.Tensor(name="classifier.bias", shape=[3])]


def spec(protection: str = "selective", negotiation: str = "sealed", **rules: float) -> FederationSpec:
    return FederationSpec.model_validate(
        {
            "name": "fed",
            "training": {"base_model": "tiny", "labels": ["a", "b"]},
            "round": {
                "rounds": 2,
                "clients": 3,
                "min_updates": 2,
                "deadline_s": 60,
                "max_attempts": 2,
                **rules,
            },
            "protection": {"mode": protection, "negotiation": negotiation},
        }
    )


@dataclass
class World:
    """Everything of one federation "fed"."""

    store: Store
    changes: Changes
    aggregation: FakeAggregation
    authority: FakeKeyAuthority
    pool: AggregationPool
    authority_client: KeyAuthorityClient
    now_ms: int = 1_000_000
    silent: set[str] = field(default_factory=set)
    """Members that neither beat nor act."""
    idle: set[str] = field(default_factory=set)
    """Members that beat and never do what they are assigned."""
    budgets: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    """What members say they hold, 10 by default."""
    liveness: Liveness = USUAL
    revoked: dict[str, int] = field(default_factory=dict)
    """Clients whose certificates issued up to a time are revoked, as the coordinator has learnt."""
    overlaps: dict[str, float] = field(default_factory=dict)
    """What members report of their overlap with the plan; nothing by default."""
    bases: dict[str, str] = field(default_factory=dict)
    """Base models of members, a letter each for weights, tokens, chat template, and perhaps what they start from; they
    say nothing by default."""

    def __post_init__(self) -> None:
        self.instances = itertools.count(1)
        self.handlers = self.new_handlers()
        self.driver = self.new_driver(self.store)

    def new_handlers(self, **options: Any) -> Handlers:
        return handlers_on(
            self.store,
            self.changes,
            aggregation=self.pool,
            clock_ms=lambda: self.now_ms,
            new_instance=lambda: f"{next(self.instances):08x}",
            liveness=self.liveness,
            **options,
        )

    def new_driver(self, store: Store) -> Driver:
        tokens = itertools.count(1)
        return driver_on(
            store,
            self.changes,
            aggregation=self.pool,
            authority=self.authority_client,
            revoked=lambda _: dict(self.revoked),
            clock_ms=lambda: self.now_ms,
            new_token=lambda: f"token{next(tokens)}",
            policy=DriverPolicy(liveness=self.liveness, concurrency=2),
        )

    async def begin(
        self, federation: FederationSpec, clients: Iterable[str] = "abc", budget: float = 1.0
    ) -> None:
        await self.handlers.federations.create(federation)
        for client in clients:
            await self.join(client, self.budgets.get(client, budget))
        await self.handlers.federations.start("fed")

    async def join(self, client: str, budget: float = 1.0, rank: int = 4, **changes: Any) -> FederationRecord:
        request = pb.JoinRequest(
            client_id=client,
            rank=rank,
            budget=budget,
            example_count=self.examples.get(client, 10),
            protocol_version=1,
            **changes,
        )
        member = checks.member(request, self.now_ms)
        return await self.handlers.members.join("fed", member, MATRICES, TENSORS)

    async def federation(self) -> FederationRecord:
        return (await self.store.federations.read("fed")).record

    async def shown(self) -> pb.Federation:
        return await Renderer(self.store).federation(await self.federation(), self.now_ms)

    async def settle(self, driver: Driver | None = None) -> Decision:
        """Steps until there is nothing to do."""
        for _ in range(200):
            decision = await (driver or self.driver).step("fed")
            if isinstance(decision, Rest | Done):
                return decision
        raise AssertionError("the driver never comes to rest")

    async def assignment(self, client: str) -> pb.Assignment:
        self.changes.wake_all()  # in place of the notifications, which only a running server listens to
        federation, assignment = await self.handlers.watching.assignment("fed", client, OwnCommit())
        return await Renderer(self.store).assignment(federation, assignment)

    async def act(self) -> None:
        """Every member that is neither silent nor revoked beats and does what it is assigned."""
        federation = await self.federation()
        for client, member in (await self.store.members.all("fed")).items():
            if client not in self.silent and federation.admits(member):
                stage = "idle" if client in self.idle else "training"
                await self.store.presence.see(
                    "fed", client, Sighting(stage=stage, progress=0.5, at_ms=self.now_ms)
                )
                if client not in self.idle:
                    await self.do(client, await self.assignment(client))

    async def beat(self, client: str) -> None:
        await self.store.presence.see(
            "fed", client, Sighting(stage="training", progress=0.5, at_ms=self.now_ms)
        )

    async def do(self, client: str, assignment: pb.Assignment) -> None:
        match assignment.WhichOneof("work"):
            case "vote" if votes_of(await self.federation()).by_ballots:
                await self.cast(client, assignment.vote.round)
            case "vote":
                await self.commit(client, assignment.vote.round)
            case "train":
                await self.commit(client, assignment.train.round)
            case "make_plan":
                await self.publish(client, assignment.make_plan)

    async def commit(
        self, client: str, round_: pb.RoundRef, content: str = "", examples: int | None = None
    ) -> int:
        digests = self.aggregation.put(round_.round_id, client, len(round_.layout.shards), content)
        report = pb.UpdateReport(
            client_id=client,
            example_count=examples or self.examples.get(client, 10),
            train_loss=1.5,
            overlap=self.overlaps.get(client),
            base_model=self.base_of(client),
        )
        return await self.handlers.updates.commit(
            "fed", round_.round_id, self.update(client, round_, digests, report=report)
        )

    def base_of(self, client: str) -> pb.BaseModelTags | None:
        if client not in self.bases:
            return None
        parts = ("weights", "tokenizer", "chat_template", "start")
        return pb.BaseModelTags(
            **{part: letter.encode() * 32 for part, letter in zip(parts, self.bases[client], strict=False)}
        )

    def ballot(self, client: str) -> bytes:
        """What a client votes for: all columns, the one that its name counts to first."""
        values = np.arange(COLUMNS, 0, -1, dtype=np.uint64)
        values[ord(client[0]) - ord("a")] = 1000
        count = math.ceil(self.budgets.get(client, 1.0) * COLUMNS)
        return Ballot(np.arange(COLUMNS, dtype=np.uint32)[:count], values[:count]).encode()

    async def cast(self, client: str, round_: pb.RoundRef, data: bytes | None = None) -> int:
        data = self.ballot(client) if data is None else data
        header = pb.CastBallotHeader(
            client_id=client,
            digest=_announced(data),
            report=pb.UpdateReport(example_count=1, base_model=self.base_of(client)),
        )
        return await self.handlers.updates.cast_ballot(
            "fed", round_.round_id, checks.ballot(header), _pieces(data)
        )

    def update(self, client, round_, digests, examples=10, **changes):
        fields = {
            "client_id": client,
            "layout_digest": layout_from_proto(round_.layout).digest,
            "shards": digests,
            "rank": 1,
            "scaling": 2.0,
            "report": pb.UpdateReport(
                client_id=client,
                example_count=examples,
                train_loss=1.5,
                base_model=self.base_of(client),
            ),
        }
        return checks.update(pb.CommitUpdateRequest(**{**fields, **changes}))

    async def publish(self, client: str, work: pb.MakePlan, sealed: bytes | None = None) -> None:
        sealed = sealed or f"plan {work.plan_number} by {client}".encode() * 50_000
        matrices = []
        for matrix in work.matrices:
            counted = common_pb2.Matrix()
            counted.CopyFrom(matrix)
            counted.tier_columns.extend([2] * len(work.tiers))
            matrices.append(counted)
        await self.handlers.plans.publish(
            "fed", client, work.plan_number, Digest.of(sealed), matrices, _pieces(sealed)
        )

    async def play(self, driver: Driver | None = None, turns: int = 60) -> FederationRecord:
        """Driver and agents in turns until the federation has ended."""
        for _ in range(turns):
            await self.settle(driver)
            if (await self.federation()).ended:
                return await self.federation()
            await self.act()
            self.now_ms += 1000
        raise AssertionError(f"no end in {turns} turns: {await self.federation()}")


def _announced(data: bytes) -> common_pb2.ShardDigest:
    digest = Digest.of(data)
    return common_pb2.ShardDigest(sha256=digest.sha256, total_bytes=digest.total_bytes)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for piece in cut(data):
        yield piece


@asynccontextmanager
async def world(redis_url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(redis_url))
        aggregation, authority = FakeAggregation(), FakeKeyAuthority()
        one = await stack.enter_async_context(serving(aggregation, authority))
        two = await stack.enter_async_context(serving(aggregation))
        replicas = Replicas((one, two), open_channel, refresh_s=3600)
        stack.push_async_callback(replicas.close)
        authority_channel = await stack.enter_async_context(open_channel(one))
        built = World(
            store=redis_store(client, lambda: built.now_ms),
            changes=Changes(client),
            aggregation=aggregation,
            authority=authority,
            pool=AggregationPool(replicas, retry_s=0.3),
            authority_client=KeyAuthorityClient(authority_channel, retry_s=0.3),
        )
        yield built
