"""Clients that lie as members and as dealers of committees, and a coordinator that does not spend draws."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final
from unittest import mock

import client_agent.agent
import client_agent.committees
import shelora.committee.dealer
from client_agent.attempts import Attempt
from client_agent.committees import Committees
from coordinator import decisions, transitions
from coordinator.convening import Convening
from coordinator.servicer import CoordinatorServicer
from coordinator.statements import dealings_in
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.committee.certificate import ContributorSet
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.field import PRIME
from shelora.committee.keys import KeySet
from shelora.committee.sealing import seal_answer
from shelora.committee.statements import Signer, StatementKind
from shelora.errors import DomainError
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.simulation.learner import MarkedLearner
from tests.simulation.observer import Observer
from tests.simulation.witness import Witness


class _RefusesEveryone(Committees):
    """A member that says that nobody's share is sound."""

    def _receive(self, attempt: Attempt, member: Any, keys: KeySet, batch: list[Any]) -> None:
        for shown in batch:
            shown.share.sealed = bytes(len(shown.share.sealed))
        super()._receive(attempt, member, keys, batch)


class _AnswersAnything(Committees):
    """A member whose sum of shares is noise."""

    async def _step(self, serve: pb.Serve, attempt: Attempt, seat: Any) -> None:
        if serve.step != pb.Serve.STEP_ANSWER:
            await super()._step(serve, attempt, seat)
            return
        values = Csprng.fresh().bytes(2 * attempt.context.shares)
        low = bytes(byte & 0x7F if index % 2 else byte for index, byte in enumerate(values))
        digest = ContributorSet.read(attempt.context, serve.certificate.content).digest
        sealed = seal_answer(attempt.answer_key, digest, seat.member.position, low, Csprng.fresh())
        answer = committee_pb2.Answer(position=seat.member.position, sealed=sealed)
        signed = self._signer().sign(StatementKind.ANSWER, attempt.context, answer.SerializeToString())
        await self._calls.post_answer(attempt.round_id, signed)


class _DealsBadShares(Committees):
    """A dealer whose share for the first other member is no share."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        honest = super().dealer(attempt, keys)
        real = shelora.committee.dealer.seal_share
        cheated = 2 if attempt.committee.position(self._client_id) == 1 else 1

        deal = honest.deal

        def dealt(*arguments: Any) -> committee_pb2.DealtShares:
            liar = threading.get_ident()  # honest agents of this process may deal at the same time

            def sealed(context: Any, name: str, position: int, *rest: Any) -> bytes:
                found = real(context, name, position, *rest)
                lies = position == cheated and threading.get_ident() == liar
                return bytes(len(found)) if lies else found

            with mock.patch.object(shelora.committee.dealer, "seal_share", sealed):
                return deal(*arguments)

        honest.deal = dealt  # type: ignore[method-assign]
        return honest


class _DealsOtherPolynomials(Committees):
    """A dealer whose shares open and are of the right size; those of half the members lie on no polynomial."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        honest = super().dealer(attempt, keys)
        shares = honest._sharing.shares

        def bent(polynomials: Any, positions: Sequence[int]) -> Any:
            found = shares(polynomials, positions)
            found[::2] = (found[::2] + 1) % PRIME
            return found

        honest._sharing.shares = bent  # type: ignore[method-assign]
        return honest


class _SignsAnything(Committees):
    """A member that signs whatever set it is shown, whatever it signed before."""

    async def _sign(self, attempt: Attempt, seat: Any, proposed: bytes) -> None:
        signer: Signer = self._signer()
        signed = signer.sign(StatementKind.SET, attempt.context, proposed)
        signature = committee_pb2.SetSignature(signature=signed.signature, certificate=signed.certificate)
        await self._calls.sign_set(attempt.round_id, signature)


class _StopsAtSigning(Committees):
    """A member that checks and then says nothing."""

    async def _step(self, serve: pb.Serve, attempt: Attempt, seat: Any) -> None:
        if serve.step == pb.Serve.STEP_CHECK:
            await super()._step(serve, attempt, seat)


class _SharesAnotherSecret(Committees):
    """A dealer that shares another secret than it encrypted under: what it deals is sound, and no sum of it opens."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        honest = super().dealer(attempt, keys)
        honest._secret = SecretKey.draw(attempt.context.parameters, Csprng.fresh())
        return honest


class _SharesAnotherSecretOnce(_SharesAnotherSecret):
    """The same, in the first draw."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        first = attempt.context.round_number == 1
        return super().dealer(attempt, keys) if first else Committees.dealer(self, attempt, keys)


LIARS: Final[dict[str, type[Committees]]] = {
    "refuses everyone": _RefusesEveryone,
    "answers anything": _AnswersAnything,
    "deals bad shares": _DealsBadShares,
    "deals other polynomials": _DealsOtherPolynomials,
    "signs anything": _SignsAnything,
    "stops at signing": _StopsAtSigning,
}


SPOILERS: Final[dict[str, type[Committees]]] = {
    "shares another secret": _SharesAnotherSecret,
    "shares another secret once": _SharesAnotherSecretOnce,
}
"""Those that cost the others rounds, and end a federation if they never stop."""


@contextmanager
def lying(by_client: Mapping[str, str]) -> Iterator[None]:
    """Has clients lie, each in a way of LIARS or SPOILERS."""

    def made(federation_id: str, client_id: str, *arguments: Any, **named: Any) -> Committees:
        kind = (LIARS | SPOILERS)[by_client[client_id]] if client_id in by_client else Committees
        return kind(federation_id, client_id, *arguments, **named)

    with (
        mock.patch.object(client_agent.agent, "Committees", made),
        mock.patch.object(Observer, "liars", True),
    ):
        yield


@contextmanager
def objecting(*clients: str, to: int) -> Iterator[None]:
    """Has clients find the result of one round useless, by its number among all attempts."""

    def why(learner: MarkedLearner) -> str:
        mine = learner._client_id in clients
        return "it forgets" if mine and learner._position.endswith(f".{to}") else ""

    with (
        mock.patch.object(MarkedLearner, "objection", property(why)),
        mock.patch.object(Observer, "liars", True),
    ):
        yield


@contextmanager
def draws_unspent() -> Iterator[None]:
    """A coordinator that asks for another set of updates that a committee may have certified already."""
    real: Callable[..., Any] = transitions.settled

    def settled(record: Any, *arguments: Any, **named: Any) -> Any:
        after = real(record, *arguments, **named)
        return after.model_copy(update={"draws": record.draws})

    with (
        mock.patch.object(transitions, "settled", settled),
        mock.patch.object(Observer, "draws_repeat", True),
        mock.patch.object(Witness, "draws_repeat", True),
    ):
        yield


@dataclass
class Signed:
    """Who signed which set of a round's draw, whoever asked."""

    sets: defaultdict[int, dict[bytes, set[str]]] = field(default_factory=lambda: defaultdict(dict))


Forge = Callable[[RoundContext, bytes, dict[str, tuple[bytes, int]], str], bytes]
"""What a coordinator shows a member in place of a set: its context, its bytes, all dealings, the member's name."""


def equivocating(every: int = 1) -> AbstractContextManager[Signed]:
    """A coordinator that shows every other member a set without its first contributor. Args: every: as of `too_few`."""

    def forge(context: RoundContext, content: bytes, dealings: Any, client_id: str) -> bytes:
        if context.round_number % every or not dealings:
            return content
        names = ContributorSet.read(context, content).contributors
        other = ContributorSet.of(context, {name: dealings[name] for name in names[1:]}).content
        return other if int(client_id[-1]) % 2 else content

    return proposing(forge)


def too_few(every: int = 1) -> AbstractContextManager[Signed]:
    """A coordinator that asks for the sum of fewer updates than were promised, and of as few as a sum can have.

    Args: every: which numbers.
    """

    def forge(context: RoundContext, content: bytes, dealings: Any, client_id: str) -> bytes:
        if context.round_number % every:
            return content
        chosen = {name: dealings[name] for name in sorted(dealings)[:2]}
        if len(chosen) < 2:  # the round is over, and what was dealt is deleted
            return content
        most = max(weight for _, weight in chosen.values())
        return ContributorSet.of(replace(context, min_updates=2, most_weight=most), chosen).content

    return proposing(forge)


def outweighed() -> AbstractContextManager[None]:
    """A coordinator that names a scale at which one update could outweigh all others."""
    return mock.patch.object(decisions, "most_weight", return_value=2**20)


@contextmanager
def proposing(forge: Forge) -> Iterator[Signed]:
    """A coordinator that shows members other sets than it stored. Yields what members signed."""
    watch, sign = CoordinatorServicer.Watch, Convening.sign
    seen = Signed()
    shown: defaultdict[str, dict[bytes, RoundContext]] = defaultdict(dict)

    async def forked(self: CoordinatorServicer, request: Any, grpc_context: Any) -> Any:
        async for assignment in watch(self, request, grpc_context):
            if assignment.serve.step != pb.Serve.STEP_SIGN:
                yield assignment
                continue
            own = pb.Assignment.FromString(assignment.SerializeToString())
            context = RoundContext.from_proto(own.serve.round.context)
            shown[context.round_id][own.serve.proposed] = context
            with suppress(
                DomainError
            ):  # the store is away, the round over, or too few are left: then the truth
                dealings = await dealings_of(self, context)
                own.serve.proposed = forge(context, own.serve.proposed, dealings, request.client_id)
                shown[context.round_id][own.serve.proposed] = context
            yield own

    async def dealings_of(
        servicer: CoordinatorServicer, context: RoundContext
    ) -> dict[str, tuple[bytes, int]]:
        store = servicer._handlers.lookup.store
        record = (await store.federations.read(context.federation_id)).record
        sequence = record.sequence_of(context.round_id) or 0
        return dealings_in(context, await store.committees.dealings(record, sequence, context.cohort))

    async def noted(
        self: Convening, federation_id: str, round_id: str, client_id: str, signature: Any
    ) -> None:
        for content, context in shown[round_id].items():
            signed = committee_pb2.Signed(
                content=content, signature=signature.signature, certificate=signature.certificate
            )
            with suppress(DomainError):
                self.statements.trust(federation_id).verify(signed, StatementKind.SET, context, client_id)
                seen.sets[context.round_number].setdefault(content, set()).add(client_id)
        await sign(self, federation_id, round_id, client_id, signature)

    with (
        mock.patch.object(CoordinatorServicer, "Watch", forked),
        mock.patch.object(Convening, "sign", noted),
    ):
        yield seen


CHEATS: Final[dict[str, Callable[[], AbstractContextManager[Any]]]] = {
    "equivocates": partial(equivocating, every=2),
    "asks for too few": partial(too_few, every=2),
    "repeats draws": draws_unspent,
}
"""What coordinators do whom nobody watches."""


@contextmanager
def dishonest(liars: Mapping[str, str], coordinators: str) -> Iterator[None]:
    """Clients that lie, as of `lying`, and coordinators that cheat in a way of CHEATS, or do not: ""."""
    with ExitStack() as stack:
        if liars:
            stack.enter_context(lying(liars))
        if coordinators:
            stack.enter_context(CHEATS[coordinators]())
        yield
