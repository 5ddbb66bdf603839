"""Clients of a federation in complete mode, without training: real certificates, dealings, committee members."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache

from coordinator.records import Dropped
from services.key_authority.ca import Issuer, Root
from services.key_authority.ca import _new_root as new_root
from shelora.additive.sampler import Csprng
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.keys import KeySet
from shelora.committee.member import Member
from shelora.committee.reader import OpenedRound, open_round
from shelora.committee.statements import Signer, Trust
from shelora.errors import DomainError, Reason
from shelora.obfuscation import Obfuscation
from shelora.strategies.plain import Plain
from shelora.strategies.registry import register
from shelora.transport.certificates import new_key, signing_request
from shelora.transport.identity import Identity, Role
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.world import World

SECRET = Obfuscation(bytes(range(32)), 1)


class Convening(Plain):
    """Updates of any form, which a committee opens: what goes in is no matter of the coordinator's."""

    name = "convening"
    needs_keys = True
    needs_committee = True


register(Convening())


@cache
def root() -> Root:
    return new_root()


@cache
def signer(name: str) -> Signer:
    key = new_key()
    issuer = Issuer(root(), timedelta(hours=24), lambda: datetime.now(UTC))
    return Signer(name, key, issuer.issue(signing_request(key), Identity(Role.CLIENT, "fed", name)))


def trust() -> Trust:
    return Trust(root().der, "fed", lambda: datetime.now(UTC))


@dataclass
class Notes:
    """Certified sets of one client, which outlive its restarts."""

    sets: dict[tuple[str, str, int], bytes] = field(default_factory=dict)

    def certified(self, *place) -> bytes | None:
        return self.sets.get(place)

    def note(self, instance, kind, round_number, set_digest) -> None:
        assert (instance, kind, round_number) not in self.sets
        self.sets[instance, kind, round_number] = set_digest


@dataclass
class Client:
    """One client. Every step may be repeated, as agents do."""

    name: str
    fed: World
    notes: Notes = field(default_factory=Notes)
    seats: dict[str, Member] = field(default_factory=dict)
    dealt: dict[str, committee_pb2.DealtShares] = field(default_factory=dict)
    silent_from: str = ""
    """Step from which on it says nothing: "key", "commit", "check", "sign", "answer"."""
    secret: Obfuscation = SECRET
    """The epoch's, unless it is of another epoch."""
    refuses: frozenset[str] = frozenset()
    """Dealers whose sound shares it refuses: it lies."""

    unreadable: frozenset[str] = frozenset()
    """Rounds whose result it cannot open, or says so."""

    distrusts: frozenset[str] = frozenset()
    """Clients whose update it finds to have spoiled a result."""

    says: Reason | None = Reason.SUM_UNREADABLE
    """Why it gives up a round that begins from what it cannot open, or use; None: it objects and takes part."""

    def restart(self) -> None:
        self.seats.clear()

    async def do(self, assignment: pb.Assignment) -> None:
        if self.silent_from == "all":
            return
        match assignment.WhichOneof("work"):
            case "train":
                spoiled = await self.finds_spoiled(assignment.train.base.round_id)
                if spoiled and self.says is None:
                    await self.object(assignment.train.base.round_id)
                gives_up = spoiled and self.says is not None
                await self.train(assignment.train.round, opens=not gives_up)
                if gives_up:
                    words = "the sum does not open"
                    said = Dropped(client_id=self.name, reason=self.says, why=words, gave_up=True)
                    await self.fed.handlers.members.give_up("fed", assignment.assignment_id, said)
            case "serve":
                await self.serve(assignment.serve)

    async def object(self, round_id: str) -> None:
        said = Dropped(client_id=self.name, reason=Reason.RESULT_REFUSED, why="it forgets")
        await self.fed.handlers.members.object_to_result("fed", round_id, said)

    async def finds_spoiled(self, base: str) -> bool:
        if base in self.unreadable:
            return True
        return bool(base and self.distrusts and self.distrusts & {*(await self.open(base)).contributors})

    async def train(self, round_: pb.RoundRef, *, opens: bool = True) -> None:
        context = RoundContext.from_proto(round_.context)
        scope = ("fed", round_.round_id, self.name)
        committee = context.committee(self.secret.committee_key())
        convening = self.fed.handlers.committees
        if self.silent_from != "key":
            seat = None
            if committee.position(self.name):
                seat = self.seats.get(round_.round_id) or self.seat(context)
            try:
                await convening.post_key(*scope, committee.members, seat.key if seat else None)
                if seat:
                    self.seats[round_.round_id] = seat
            except DomainError as error:
                if error.reason is Reason.STATEMENT_REWRITTEN:
                    await convening.leave(*scope)
                elif error.reason is not Reason.STEP_OVER:
                    raise
        federation = await self.fed.federation()
        record = (await self.fed.store.rounds.read(federation, federation.ticket.sequence)).record
        if opens and record.order and self.silent_from not in {"commit", "key"}:
            await self.commit(round_, context)

    def seat(self, context: RoundContext) -> Member:
        committee = context.committee(self.secret.committee_key())
        return Member(
            context,
            committee,
            signer(self.name),
            trust(),
            self.notes,
            SECRET.answer_key(),
            Csprng.fresh(),
        )

    async def keys(self, round_id: str, context: RoundContext) -> KeySet:
        statements = await self.fed.handlers.committees.keys("fed", round_id, self.name)
        return KeySet.of(context, context.committee(SECRET.committee_key()), statements, trust())

    async def commit(self, round_: pb.RoundRef, context: RoundContext) -> int:
        digests = self.fed.aggregation.put(round_.round_id, self.name, len(round_.layout.shards))
        if round_.round_id not in self.dealt:
            dealer = Dealer(
                context, await self.keys(round_.round_id, context), signer(self.name), Csprng.fresh()
            )
            self.dealt[round_.round_id] = dealer.deal([d.sha256 for d in digests], 10)
        update = self.fed.update(self.name, round_, digests)
        return await self.fed.handlers.updates.commit(
            "fed", round_.round_id, update, self.dealt[round_.round_id]
        )

    async def serve(self, serve: pb.Serve) -> None:
        scope, convening = ("fed", serve.round.round_id, self.name), self.fed.handlers.committees
        seat = self.seats.get(serve.round.round_id)
        if seat is None:
            await convening.leave(*scope)
            return
        step = pb.Serve.Step.Name(serve.step).removeprefix("STEP_").lower()
        if step == self.silent_from:
            return
        with SuppressRefusals():
            match step:
                case "check":
                    await self.check(seat, scope)
                case "sign":
                    signed = seat.certify(seat.context.names(_set(serve.proposed).contributors))
                    signature = committee_pb2.SetSignature(
                        signature=signed.signature, certificate=signed.certificate
                    )
                    await convening.sign(*scope, signature)
                case "answer":
                    await convening.answer(*scope, seat.release(serve.certificate))

    async def check(self, seat: Member, scope: tuple[str, str, str]) -> None:
        keys = await self.keys(scope[1], seat.context)
        async for shown in self.fed.handlers.committees.shares(*scope):
            dealer = trust().author(shown.dealing, "dealing", seat.context)
            if dealer in self.refuses:
                shown.share.sealed = bytes(len(shown.share.sealed))
            with suppress(DomainError):
                seat.receive(dealer, shown, keys)
        await self.fed.handlers.committees.check(*scope, seat.check())

    async def open(self, round_id: str) -> OpenedRound:
        response = await self.fed.handlers.committees.opening("fed", round_id)
        context = RoundContext.from_proto(response.context)
        committee = context.committee(SECRET.committee_key())
        return open_round(context, committee, response.opening, SECRET.answer_key(), trust(), Csprng.fresh())


class SuppressRefusals(suppress):
    """What a member refuses to do, and what comes too late."""

    def __init__(self) -> None:
        super().__init__(DomainError)

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, DomainError) and error.reason not in {
            Reason.SET_REFUSED,
            Reason.ROUND_SPENT,
            Reason.STEP_OVER,
            Reason.STATEMENT_REWRITTEN,
        }:
            return False
        return bool(super().__exit__(kind, error, trace))


def _set(content: bytes) -> committee_pb2.ContributorSet:
    return committee_pb2.ContributorSet.FromString(content)


class Convened:
    """A federation in complete mode with its clients."""

    def __init__(self, fed: World, names: Sequence[str]) -> None:
        fed.now_ms = time.time_ns() // 1_000_000
        fed.handlers = fed.new_handlers(root=root().der)
        self.fed = fed
        self.clients = {name: Client(name, fed) for name in names}

    async def act(self) -> None:
        for name, client in self.clients.items():
            if client.silent_from != "all":
                await self.fed.beat(name)
                await client.do(await self.fed.assignment(name))

    async def step(self) -> pb.Federation:
        await self.fed.settle()
        await self.act()
        await self.fed.settle()
        self.fed.now_ms += 1000
        return await self.fed.shown()

    async def play(self, turns: int = 60):
        for _ in range(turns):
            await self.step()
            federation = await self.fed.federation()
            if federation.ended:
                return federation
        raise AssertionError(f"no end in {turns} turns: {await self.fed.federation()}")

    async def until(self, state: str, turns: int = 90) -> pb.RoundSummary:
        for _ in range(turns):
            shown = await self.step()
            if pb.RoundState.Name(shown.current.state) == f"ROUND_STATE_{state}":
                return shown.current
        raise AssertionError(f"no {state} in {turns} turns: {await self.fed.federation()}")
