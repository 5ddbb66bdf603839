"""A cluster in one thread: two coordinators, two aggregation replicas, agents and an operator, all of product code.

What is not product code here: the event loop, the connections, the store's server, the learner, and the pool that
runs the worker's job (in this thread, so that it can be cut off between any two of its store commands).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, Self

import redis

import coordinator.main
import coordinator.scripts
import services.aggregation.main
import services.aggregation.scripts
from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.replicas import replicas_for_transfers
from client_agent.session import Session
from client_agent.state import AgentState
from client_agent.worker import Worker
from coordinator.changes import Changes
from coordinator.decisions import UNOPENED
from coordinator.servicer import CoordinatorServicer, register
from coordinator.settings import CoordinatorSettings
from services.aggregation import worker as aggregation_worker
from services.aggregation.keys import PREFIX
from services.aggregation.settings import AggregationSettings
from services.aggregation.store import RedisShardStore, WorkerStore
from services.common.revocations import Revocations
from services.key_authority.authority import Authority
from services.key_authority.ca import Issuer
from services.key_authority.ca import _new_root as new_root
from services.key_authority.custody import open_custody
from services.key_authority.sealer import SealingKey
from services.key_authority.servicer import KeyAuthorityServicer
from services.key_authority.vault import Vault
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.levels import Level
from shelora.transport.certificates import der_to_pem, new_key, signing_request
from shelora.transport.channel import call
from shelora.transport.identity import Identity, Role
from shelora.transport.replicas import Replicas
from shelora.transport.tls import Held
from shelora.v1 import aggregation_pb2_grpc, key_authority_pb2_grpc
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.coordinator_pb2_grpc import CoordinatorStub
from tests.simulation.clients import AsyncClient, SyncClient, answered
from tests.simulation.faults import Crash, Faults, Outage, Skew
from tests.simulation.learner import MarkedLearner, MarkedModel
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Network
from tests.simulation.observer import Observer
from tests.simulation.parties import take_part
from tests.simulation.processes import Process
from tests.simulation.valkey import Command, Valkey
from tests.simulation.witness import Witness

COORDINATOR: Final = "coordinator:7100"
AUTHORITY: Final = "authority:7102"
AGGREGATION: Final = ("aggregation-0:7103", "aggregation-1:7103")
FEDERATION: Final = "fed"
SUPERVISED_S: Final = 10.0
"""Seconds after which an agent that gave up is started again."""
LOST_WAKE_UPS: Final = 0.1
ROOT: Final = new_root()
"""What certifies clients, for the statements they sign."""
_READS: Final = frozenset(
    {
        "GET",
        "MGET",
        "HGET",
        "HMGET",
        "HGETALL",
        "HLEN",
        "HEXISTS",
        "HKEYS",
        "EXISTS",
        "STRLEN",
        "GETRANGE",
        "PTTL",
        "ZRANGEBYSCORE",
        "SRANDMEMBER",
    }
)
_SCRIPTS: Final = [
    text
    for module in (coordinator.scripts, services.aggregation.scripts)
    for text in vars(module).values()
    if isinstance(text, str) and "redis.call" in text
]


_COORDINATOR: Final = CoordinatorSettings(
    identity=Path("identity"),
    key_authority_address=AUTHORITY,
    aggregation_addresses=AGGREGATION,
    tick_s=5.0,  # longer than by default, as the next: half the commands of a run were idle looks
    watch_poll_s=10.0,
)
_AGGREGATION: Final = AggregationSettings(identity=Path("identity"), key_authority_address=AUTHORITY)


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    clients: int = 3
    rounds: int = 2
    min_updates: int = 2
    deadline_s: int = 30
    max_attempts: int = 3
    negotiation: str = ""
    """How columns are chosen for encryption; "" if nothing is encrypted, or everything."""
    complete: bool = False
    """Whether only encrypted sums are seen."""
    committee_s: int = 5
    replan_every: int = 0
    key_rotation: int = 0
    hostile: str = ""
    """What the last client is, of `parties.PARTIES`; "" for an honest one."""
    liars: tuple[tuple[str, str], ...] = ()
    """Clients that lie as dealers and members of committees, each with its way of `liars.LIARS` or `SPOILERS`."""
    coordinators: str = ""
    """How coordinators cheat committees, of `liars.CHEATS`; "" for honest ones."""
    orders: tuple[str, ...] = ()
    """What the operator does after the start, each some time after the one before: "stop", "extend", "delete"."""

    @property
    def keyed(self) -> bool:
        """Whether a key authority makes keys."""
        return self.complete or bool(self.negotiation)

    @property
    def spec(self) -> FederationSpec:
        protection = {"mode": "complete" if self.complete else "selective"}
        protection |= {"negotiation": self.negotiation} if self.negotiation else {}
        protection |= {"key_rotation_rounds": self.key_rotation}
        return FederationSpec.model_validate(
            {
                "name": FEDERATION,
                "training": {  # a mark is 1, and complete mode has room for what training can move
                    "base_model": "marks",
                    "labels": ["a", "b"],
                    "learning_rate": 0.5,
                    "local_steps": 1,
                },
                "round": {
                    "rounds": self.rounds,
                    "clients": self.clients,
                    "min_updates": self.min_updates,
                    "deadline_s": self.deadline_s,
                    "max_attempts": self.max_attempts,
                    "replan_every_rounds": self.replan_every,
                    "committee_s": self.committee_s,
                },
                "protection": protection if self.keyed else {"mode": "none"},
            }
        )

    @property
    def most_rounds(self) -> int:
        """Training rounds, those added later included."""
        return self.rounds + self.orders.count("extend")

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(f"agent-{index}" for index in range(self.clients))


@cache
def identity_of(client_id: str) -> Held:
    """A client's identity: valid in virtual time and in real time, the same in all runs."""
    key = new_key()
    issuer = Issuer(ROOT, timedelta(days=40_000), lambda: datetime(1990, 1, 1, tzinfo=UTC))
    certificate = issuer.issue(signing_request(key), Identity(Role.CLIENT, FEDERATION, client_id))
    return Held(key, der_to_pem(certificate), ROOT.certificate)


class Cluster:
    """Everything of one run."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: str,
        faults: Faults,
        size: Size,
        folder: Path,
        log: Callable[[str, str], None],
    ) -> None:
        self._loop = loop
        self._seed = seed
        self._faults = faults
        self._size = size
        self._folder = folder
        self._log = log
        self._lives: dict[str, int] = {}
        self._subscriptions: list[Subscription] = []
        self._custody = ExitStack()
        self._vault: Vault | None = None
        self.violation: asyncio.Future[str] = loop.create_future()
        self.outcomes: dict[str, Outcome] = {}
        self.valkey = Valkey(lambda: int(1000 * loop.now_s))
        self.valkey.published = self._publish
        self.valkey.load(*_SCRIPTS)
        self.observer = Observer(self.valkey, FEDERATION, size.agents, size.most_rounds, self.violated)
        self.observer.reopened = self._reopened
        self.witness = Witness(size.min_updates, self.violated)
        self._orders = ["create", "start", *size.orders]
        """What the operator has still to do; it has notes that outlive it."""
        self.network = Network(loop, faults, self.observer.answered, log)
        self._outages = [fault for fault in faults.standing if isinstance(fault, Outage)]
        self._skews = {fault.process: fault.ms for fault in faults.standing if isinstance(fault, Skew)}

    def violated(self, what: str) -> None:
        """Ends the run: something that must hold does not."""
        self._log("VIOLATION", what)
        if not self.violation.done():
            self.violation.set_result(what)

    def start(self) -> None:
        """Starts every process."""
        rng = Random(f"{self._seed}/start")
        for index in range(2):
            self._start_coordinator(f"coordinator-{index}")
            self._start_aggregation(f"aggregation-{index}")
        if self._size.keyed:
            self._start_authority("authority")
        for name in self._size.agents:
            self._loop.call_later(rng.uniform(0, 3), self._start_agent, name)
        self._loop.call_later(rng.uniform(0, 2), self._start_operator)

    @property
    def ended(self) -> bool:
        """Whether the federation has ended and every agent knows it."""
        federation, deleted = self.observer.federation, self.observer.deleted
        told = federation is not None and federation.ended and len(self.outcomes) == self._size.clients
        # Of one that was deleted an agent that starts again hears no more than of one that is not created yet.
        return not self._orders and (deleted or told)

    def _reopened(self) -> None:
        """Their owners start agents again when a federation goes on that had finished."""
        for name in list(self.outcomes):
            del self.outcomes[name]
            self._loop.call_later(SUPERVISED_S, self._start_agent, name)

    # Processes

    def _process(self, name: str, restart: Callable[[str], None]) -> Process:
        life = self._lives[name] = self._lives.get(name, 0) + 1

        def died(_process: Process, fault: Crash) -> None:
            self._log(name, f"CRASH, back in {fault.down_s:.1f} s")
            self._loop.call_later(fault.down_s, restart, name)

        self._log(name, f"starts, life {life}")
        rng = Random(f"{self._seed}/{name}/{life}")
        return Process(self._loop, name, rng, self._faults, skew_ms=self._skews.get(name, 0), on_death=died)

    def _start_coordinator(self, name: str) -> None:
        process = self._process(name, self._start_coordinator)
        client = self._client(process)
        changes = Changes(client)
        aggregation = Replicas(
            AGGREGATION,
            lambda address: self.network.channel(process, address),
            refresh_s=_COORDINATOR.aggregation_refresh_s,
            shuffle=process.rng.shuffle,
        )
        authority = self.network.channel(process, AUTHORITY)
        handlers, driver = coordinator.main.compose(
            _COORDINATOR, client, changes, Revocations(known=True), aggregation, authority, ROOT.der
        )
        register(CoordinatorServicer(handlers), self.network.serve(process, COORDINATOR))
        for work in (changes.run(), driver.run()):
            process.spawn(work).add_done_callback(lambda task: self._background_ended(process, task))

    def _start_aggregation(self, name: str) -> None:
        process = self._process(name, self._start_aggregation)
        client = self._client(process)
        pool = _Jobs(client, process, self._faults)
        servicer = services.aggregation.main.build_servicer(_AGGREGATION, RedisShardStore(client), pool)
        server = self.network.serve(process, f"{name}:7103")
        aggregation_pb2_grpc.add_AggregationServicer_to_server(servicer, server)

    def _start_authority(self, name: str) -> None:
        process = self._process(name, self._start_authority)
        self._custody.close()  # what the end of a process does
        opened = open_custody(self._folder / name, SealingKey(bytes(32)))
        custody = process.run(lambda: self._custody.enter_context(opened))
        self._vault = custody.vault
        authority = Authority(custody.vault, custody.audit, Revocations(known=True))
        server = self.network.serve(process, AUTHORITY)
        key_authority_pb2_grpc.add_KeyAuthorityServicer_to_server(
            _MortalAuthority(authority, process), server
        )

    @property
    def epochs(self) -> list[int]:
        """The epochs that have keys."""
        return [found.epoch for found in self._vault.epochs()] if self._vault else []

    def close(self) -> None:
        """Ends what is left of processes: open files."""
        self._custody.close()

    def _start_agent(self, name: str) -> None:
        process = self._process(name, self._start_agent)
        task = process.spawn(self._agent(name, process))
        task.add_done_callback(lambda task: self._agent_ended(name, process, task))

    def _start_operator(self, name: str = "operator") -> None:
        process = self._process(name, self._start_operator)
        process.spawn(self._operator(process)).add_done_callback(
            lambda task: self._background_ended(process, task)
        )

    def _background_ended(self, process: Process, task: asyncio.Task[None]) -> None:
        if not process.dead and not task.cancelled() and (error := task.exception()):
            self.violated(f"{process.name} crashed by itself: {error!r}")

    # Roles

    async def _operator(self, process: Process) -> None:
        stub = CoordinatorStub(self.network.channel(process, COORDINATOR))
        named = {"federation_id": FEDERATION}
        calls: dict[str, tuple[Any, Any]] = {
            "create": (stub.CreateFederation, pb.CreateFederationRequest(spec=self._size.spec.to_proto())),
            "start": (stub.StartFederation, pb.StartFederationRequest(**named)),
            "stop": (stub.StopFederation, pb.StopFederationRequest(**named)),
            "delete": (stub.DeleteFederation, pb.DeleteFederationRequest(**named)),
        }
        while self._orders:
            order = self._orders[0]
            if order == "extend":
                await self._until_done(lambda: self._extend(stub))
            else:
                method, request = calls[order]
                await self._until_done(lambda method=method, request=request: call(method, request))
            self._log(process.name, f"has done: {self._orders.pop(0)}")
            await asyncio.sleep(process.rng.uniform(0, 3 if "start" in self._orders else 40))

    async def _extend(self, stub: Any) -> None:
        """Adds a round to those of the specification, or to those that a stop left."""
        found = await call(stub.GetFederation, pb.GetFederationRequest(federation_id=FEDERATION))
        rounds = min(found.spec.round.rounds + 1, self._size.most_rounds)
        await call(stub.ExtendFederation, pb.ExtendFederationRequest(federation_id=FEDERATION, rounds=rounds))

    async def _until_done(self, work: Callable[[], Any]) -> None:
        while True:
            try:
                return await work()
            except DomainError as error:
                # An earlier life of the operator did it; or it has failed, or is gone.
                if error.reason in {Reason.FEDERATION_CLOSED, Reason.FEDERATION_UNKNOWN}:
                    return None
                if error.reason is not Reason.STORE_UNAVAILABLE:
                    raise
                await asyncio.sleep(1)

    async def _agent(self, name: str, process: Process) -> Outcome:
        index = self._size.agents.index(name)
        config = AgentConfig.model_validate(
            {
                "federation": FEDERATION,
                "client_id": name,
                "coordinator": COORDINATOR,
                "aggregation": AGGREGATION,
                "key_authority": AUTHORITY,
                "state_dir": self._folder / name,
                "model": {"path": "marks"},
                "data": {"train": "marks.jsonl"},
                "lora": {"rank": 1 + index % 2, "alpha": 1 + index % 2},
                "budget": 1.0 if index % 2 else 0.5,
                "protection": {"accept": list(Level)},
            }
        )

        def learn(config: AgentConfig, _spec: object, state: AgentState, _rounds: int) -> MarkedLearner:
            model = MarkedModel(self._size.most_rounds, self._size.clients, config.lora.rank)
            return MarkedLearner(
                config, state, index=index, examples=10 * 2**index, model=model, applied=self.observer.applied
            )

        def connect(address: str, _credentials: object = None) -> Any:
            return self.network.channel(process, address)

        state = AgentState(config.state_dir)
        if not config.identity.exists():
            config.identity.write(identity_of(name))
        try:
            session = Session(config, None, connect)
            if self._size.hostile and name == self._size.agents[-1]:
                model = MarkedModel(self._size.most_rounds, self._size.clients, config.lora.rank)
                return await take_part(session, model, 10, self._size.hostile)
            replicas = replicas_for_transfers(config.aggregation, None, connect, process.rng.shuffle)
            return await Agent(config, learn)._follow(state, Worker(), session, replicas)
        finally:
            state.close()

    def _agent_ended(self, name: str, process: Process, task: asyncio.Task[Outcome]) -> None:
        if process.dead or task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._log(name, f"ends: {task.result()}")
            self._came_to_rest(name, task.result())
        elif isinstance(error, DomainError) and error.reason in UNOPENED and self._is_spoiled:
            self._log(name, f"has the adapter of the result before: {error.message}")
            self._came_to_rest(name, Outcome.HALTED)
        elif isinstance(error, DomainError) and error.reason is Reason.FEDERATION_CLOSED:
            self._log(name, f"came too late: {error.message}")
            self.outcomes[name] = Outcome.HALTED
        elif isinstance(error, DomainError) and error.reason is Reason.STORE_UNAVAILABLE:
            self._log(name, f"gives up, to be started again: {error.message}")
            process.kill()
            self._loop.call_later(SUPERVISED_S, self._start_agent, name)
        else:
            self.violated(f"{name} ended with {error!r}")

    def _came_to_rest(self, name: str, outcome: Outcome) -> None:
        federation = self.observer.federation
        ongoing = federation is not None and not federation.ended and not federation.deleting
        if ongoing and not self.observer.deleted:  # it went on meanwhile
            self._loop.call_later(SUPERVISED_S, self._start_agent, name)
        else:
            self.outcomes[name] = outcome

    @property
    def _is_spoiled(self) -> bool:
        """Whether clients may spoil sums: the last one is not repeated unless the operator extends the federation."""
        return bool(self._size.liars)

    # The store

    def _client(self, process: Process) -> AsyncClient:
        async def exchange(commands: Sequence[Command]) -> list[Any]:
            spoiled = await process.operate(_kind(commands))
            if self._is_away():
                raise redis.ConnectionError("simulated outage")
            if spoiled is not None and spoiled.kind == "late":
                return await self._executed_late(process, commands, spoiled.seconds)
            answers = self._executed(process, commands)
            if spoiled is not None:
                answers = self._executed(process, commands)
                if spoiled.kind == "lost":
                    raise redis.ConnectionError("simulated loss of an answer")
            if process.rng.random() < 0.1:
                await process.latency()
            return answers

        return AsyncClient(exchange, lambda: Subscription(self, process))

    async def _executed_late(
        self, process: Process, commands: Sequence[Command], seconds: float
    ) -> list[Any]:
        """The answers to commands that arrive late, but do arrive, also if their caller left."""
        arrived = self._loop.create_future()

        def arrive() -> None:
            answers = self._executed(process, commands)
            if not arrived.done():
                arrived.set_result(answers)

        self._loop.call_later(seconds, arrive)
        answers: list[Any] = await arrived
        await process.latency()
        return answers

    def _executed(self, process: Process, commands: Sequence[Command]) -> list[Any]:
        answers = answered(self.valkey, commands)
        self.observer.after(commands, answers)
        for command, answer in zip(commands, answers, strict=True):
            if command[0] == "EVALSHA":
                outcome = answer[:2] if isinstance(answer, list) else answer
                self._log(process.name, f"script on {command[3]} -> {outcome}")
                self._look_for_promotion(command)
        return answers

    def _look_for_promotion(self, command: Command) -> None:
        """Whether this made an update shard complete, and whether that one is to be lost."""
        updates = [
            str(key)
            for key in command[3 : 3 + int(command[2])]
            if f"{PREFIX}" in str(key) and "}:update:" in str(key)
        ]
        if updates and self.valkey.value(updates[0]) is not None and (loss := self._faults.on("promotion")):
            self._loop.call_later(loss.delay_s, self._lose, updates[0])

    def _lose(self, key: str) -> None:
        self.observer.lost = True
        client, shard = key.partition("}:update:")[2].split(":")[:2]
        base = key.partition("update:")[0]
        self._log("store", f"LOSES {key}")
        self.valkey.execute("DEL", key)
        self.valkey.execute("HDEL", f"{base}client:{client}", f"complete:{shard}")

    def _is_away(self) -> bool:
        return any(fault.at_s <= self._loop.now_s < fault.at_s + fault.seconds for fault in self._outages)

    def _publish(self, channel: bytes, message: bytes) -> None:
        for subscription in self._subscriptions:
            subscription.offer(channel, message)


class _MortalAuthority(KeyAuthorityServicer):
    """The key authority, which can die before what a call does, or after it and before its answer."""

    def __init__(self, authority: Authority, process: Process) -> None:
        super().__init__(authority)
        self._process = process

    async def OpenEpoch(self, *call: Any) -> Any:
        return await self._mortal(super().OpenEpoch, *call)

    async def RetireEpochs(self, *call: Any) -> Any:
        return await self._mortal(super().RetireEpochs, *call)

    async def GetEpochSecrets(self, *call: Any) -> Any:
        return await self._mortal(super().GetEpochSecrets, *call)

    async def _mortal(self, work: Callable[..., Awaitable[Any]], *call: Any) -> Any:
        await self._process.operate("script")
        answer = await work(*call)
        await self._process.operate("script")
        return answer


class Subscription:
    """What product code needs of redis-py's subscriptions."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self._cluster = cluster
        self._process = process
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self in self._cluster._subscriptions:
            self._cluster._subscriptions.remove(self)

    async def psubscribe(self, pattern: str) -> None:
        await self._process.operate()
        self._require_connection()
        self._cluster._subscriptions.append(self)

    async def get_message(self, timeout: float) -> dict[str, Any] | None:
        self._require_connection()
        try:
            async with asyncio.timeout(timeout):
                message = await self._messages.get()
        except TimeoutError:
            return None
        await self._process.latency()
        return message

    def offer(self, channel: bytes, message: bytes) -> None:
        """Brings a message, unless it gets lost."""
        uneven = not self._process.even
        if not (uneven and self._process.rng.random() < LOST_WAKE_UPS):
            self._messages.put_nowait({"type": "pmessage", "channel": channel, "data": message})

    def _require_connection(self) -> None:
        if self._cluster._is_away():
            raise redis.ConnectionError("simulated outage")


def _kind(commands: Sequence[Command]) -> str:
    """How much depends on commands: a sighting is worth little, whatever writes it."""
    names = {command[0] for command in commands}
    if "EVALSHA" in names:
        return "read" if ":seen:" in str(commands[0][2 + int(commands[0][2])]) else "script"
    return "read" if names <= _READS else "write"


class _Pending(BaseException):
    """A job wants commands answered."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = list(commands)


class _Jobs:
    """A worker without a process: runs a job up to its next store command, again from the start with every answer.

    A job computes the same every time, so it only looks as if it waited; but it can be cut off between two commands.
    """

    def __init__(self, client: AsyncClient, process: Process, faults: Faults) -> None:
        self._client = client
        self._process = process
        self._faults = faults
        self._free = asyncio.Lock()

    async def run(self, line: bytes) -> bytes:
        death = self._faults.on("job", self._process.name)
        async with self._free:
            answers: list[list[Any] | redis.RedisError] = []
            while True:
                try:
                    return aggregation_worker.answer(WorkerStore(SyncClient(_replayed(answers))), line)
                except _Pending as pending:
                    if death is not None and len(answers) >= death.commands:
                        raise DomainError(Reason.WORKER_FAILED, "simulated death of a worker") from None
                    answers.append(await self._answers(pending.commands))

    async def spread(self, line: bytes) -> list[bytes]:
        try:
            return [await self.run(line)]
        except DomainError:
            return []

    async def _answers(self, commands: Sequence[Command]) -> list[Any] | redis.RedisError:
        try:
            return await self._client._exchange(commands)
        except redis.RedisError as error:
            return error


def _replayed(answers: Sequence[list[Any] | redis.RedisError]) -> Callable[[Sequence[Command]], list[Any]]:
    left = iter(list(answers))

    def exchange(commands: Sequence[Command]) -> list[Any]:
        found = next(left, None)
        if found is None:
            raise _Pending(commands)
        if isinstance(found, redis.RedisError):
            raise found
        return found

    return exchange
