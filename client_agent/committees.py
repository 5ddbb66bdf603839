"""This client's part in the committees that open sums: as a dealer, as a member, as a reader.

Nothing here trusts a server. What a round is about is compared with what the federation promised; the committee is
worked out from the epoch's secret; keys, dealings, sets and answers are believed for their signatures alone. A member's
key and shares are in memory only: after a restart it says so and sits the round out.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import structlog

from client_agent.attempts import Attempt, Attempts, require
from client_agent.committee_calls import CommitteeCalls
from client_agent.keys import EpochSecrets
from client_agent.state import AgentState
from client_agent.worker import Worker
from shelora.additive.sampler import Csprng
from shelora.committee.bare import certificates_in, completed
from shelora.committee.certificate import ContributorSet
from shelora.committee.context import COMMON_START, RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.keys import KeySet
from shelora.committee.member import Member
from shelora.committee.reader import OpenedRound, open_round
from shelora.committee.statements import Signer, StatementKind, Trust
from shelora.errors import DomainError, Reason
from shelora.federation import RoundSpec
from shelora.lora.layout import Layout
from shelora.rounds import longest_s
from shelora.transport.certificates import pem_to_der
from shelora.transport.tls import Held
from shelora.v1 import committee_pb2, common_pb2
from shelora.v1 import coordinator_pb2 as pb

READING_GRACE: Final = timedelta(days=30)
"""How long after its end a member's certificate vouches for a result: as long as coordinators keep results."""
_KNOWN_ROUNDS: Final = 4
"""Rounds of which the committee's certificates are kept, 35 KB each at most: a result is opened in the next one."""
_BATCH: Final = 64
"""Dealings checked in one go, about 30 ms."""

_REFUSALS: Final = frozenset(
    {Reason.SET_REFUSED, Reason.ROUND_SPENT, Reason.QUORUM_MISSING, Reason.SIGNATURE_REFUSED}
)
"""Why a member does not do what it is asked to."""

_log = structlog.get_logger(__name__)


class Identifies(Protocol):
    """What `shelora.transport.tls.IdentityFolder` does."""

    def read(self) -> Held:
        """The identity as it is now."""


@dataclass(kw_only=True)
class _Seat:
    """A place on the committee of the newest round."""

    member: Member
    keys: KeySet | None = None
    check: committee_pb2.Signed | None = None
    signed: dict[bytes, committee_pb2.SetSignature] = field(default_factory=dict)
    """By the set's content: signatures are random, and repeats must be the same bytes."""


@dataclass(frozen=True)
class _Known:
    """What this client has of a round whose sum it will open."""

    context: RoundContext
    certificates: dict[int, bytes] = field(repr=False)
    """Of the members whose keys it got, by position."""


class Committees:
    """All of it for one client.

    Args:
        federation_id: Of the client.
        client_id: Its name.
        rules: What the federation promised of its rounds.
        calls: To the coordinator.
        state: Where certified sets are noted.
        identity: Signs for the client, and pins the authority.
        worker: Where what takes long is done.
        clock: What certificates are held against.
    """

    def __init__(
        self,
        federation_id: str,
        client_id: str,
        rules: RoundSpec,
        *,
        calls: CommitteeCalls,
        state: AgentState,
        identity: Identifies,
        worker: Worker,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._federation_id = federation_id
        self._client_id = client_id
        self._rules = rules
        self._attempts = Attempts(federation_id, client_id, rules)
        self._calls = calls
        self._state = state
        self._identity = identity
        self._worker = worker
        self._clock = clock
        self._attempt: Attempt | None = None
        self._seat: _Seat | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """By the round, of the newest few."""

    def attempt(
        self, round_: pb.RoundRef, layout: Layout, secrets: EpochSecrets, start: bytes = COMMON_START
    ) -> Attempt:
        """The round as this client works it out. Raises: as `Attempts.of`."""
        return self._attempts.of(round_, layout, secrets, start)

    # As a member

    async def join(self, attempt: Attempt) -> None:
        """Says which committee this client works out, and takes its seat if it has one. Forgets earlier rounds.

        Raises: NOT_IN_COHORT, ROUND_UNKNOWN.
        """
        member = attempt.committee.position(self._client_id) is not None
        if self._attempt is None or self._attempt.round_id != attempt.round_id:
            self.forget()
            self._attempt = attempt
            self._seat = _Seat(member=self._member(attempt)) if member else None
        elif member and self._seat is None:
            return  # it has left this committee; as a dealer it tries again
        try:
            key = self._seat.member.key if self._seat else None
            await self._calls.post_key(attempt.round_id, attempt.committee.members, key)
        except DomainError as error:
            if error.reason is Reason.STEP_OVER and not member:
                return  # the committee was seated without this view
            if error.reason not in {Reason.STEP_OVER, Reason.STATEMENT_REWRITTEN}:
                raise
            await self._leave(
                attempt.round_id, "this client restarted, and its committee key was in memory only"
            )

    def _member(self, attempt: Attempt) -> Member:
        notes = self._state.certified_sets()
        trust = self._trust(self._round_grace)
        return Member(
            attempt.context,
            attempt.committee,
            self._signer(),
            trust,
            notes,
            attempt.answer_key,
            Csprng.fresh(),
        )

    async def _leave(self, round_id: str, why: str) -> None:
        """Says that this member takes no part (any more)."""
        self._seat = None
        _log.warning("sits_out", round=round_id, why=why)
        await self._calls.leave(round_id)

    async def serve(self, serve: pb.Serve) -> None:
        """Does a member's next step. One that it must not do it refuses, says so, and leaves the committee.

        Raises: STEP_OVER, ROUND_UNKNOWN: it came too late.
        """
        attempt, seat = self._attempt, self._seat
        if attempt is None or attempt.round_id != serve.round.round_id or seat is None:
            await self._leave(
                serve.round.round_id, "this client restarted, and its committee key was in memory only"
            )
            return
        try:
            await self._step(serve, attempt, seat)
        except DomainError as error:
            if error.reason not in _REFUSALS:
                raise
            await self._leave(attempt.round_id, error.message)

    async def _step(self, serve: pb.Serve, attempt: Attempt, seat: _Seat) -> None:
        match serve.step:
            case pb.Serve.STEP_CHECK:
                await self._check(attempt, seat)
            case pb.Serve.STEP_SIGN:
                await self._sign(attempt, seat, serve.proposed)
            case pb.Serve.STEP_ANSWER:
                answer = await self._worker.run(seat.member.release, serve.certificate)
                await self._calls.post_answer(attempt.round_id, answer)

    async def _check(self, attempt: Attempt, seat: _Seat) -> None:
        if seat.check is None:
            keys = await self.keys(attempt)
            batch: list[committee_pb2.DealtShare] = []
            async for shown in self._calls.shares(attempt.round_id):
                batch.append(shown)
                if len(batch) == _BATCH:
                    await self._worker.run(self._receive, attempt, seat.member, keys, batch)
                    batch = []
            await self._worker.run(self._receive, attempt, seat.member, keys, batch)
            seat.check = seat.member.check()
        await self._calls.post_check(attempt.round_id, seat.check)

    def _receive(
        self, attempt: Attempt, member: Member, keys: KeySet, batch: list[committee_pb2.DealtShare]
    ) -> None:
        trust = self._trust(self._round_grace)
        for shown in batch:
            try:
                dealer = trust.author(shown.dealing, StatementKind.DEALING, attempt.context)
            except DomainError as error:  # nobody's word: it cannot be refused by name
                _log.warning("dealing_refused", round=attempt.round_id, why=error.message)
                continue
            if refusal := member.receive(dealer, shown, keys):
                _log.warning("dealing_refused", round=attempt.round_id, dealer=dealer, why=refusal.message)

    async def _sign(self, attempt: Attempt, seat: _Seat, proposed: bytes) -> None:
        if proposed not in seat.signed:
            wanted = ContributorSet.read(attempt.context, proposed)
            signed = await self._worker.run(seat.member.certify, wanted.contributors)
            if signed.content != proposed:
                raise DomainError(
                    Reason.SET_REFUSED, "the proposed set is not of the dealings that this member holds"
                )
            seat.signed[proposed] = committee_pb2.SetSignature(
                signature=signed.signature, certificate=signed.certificate
            )
        await self._calls.sign_set(attempt.round_id, seat.signed[proposed])

    def forget(self) -> None:
        """Forgets key and shares of the newest round."""
        if self._seat is not None:
            self._seat.member.forget()
        self._attempt = self._seat = None

    # As a dealer

    async def keys(self, attempt: Attempt) -> KeySet:
        """The committee's keys, waited for. Raises: QUORUM_MISSING: too few of them are; STEP_OVER, ROUND_UNKNOWN."""
        if self._seat is not None and self._seat.keys is not None and self._attempt is attempt:
            return self._seat.keys
        statements = await self._calls.keys(attempt.round_id)
        try:
            keys = KeySet.of(attempt.context, attempt.committee, statements, self._trust(self._round_grace))
        except DomainError as error:
            raise DomainError(Reason.QUORUM_MISSING, error.message) from error
        self._known[attempt.round_id] = _Known(attempt.context, certificates_in(statements))
        while len(self._known) > _KNOWN_ROUNDS:
            self._known.popitem(last=False)
        if self._seat is not None and self._attempt is attempt:
            self._seat.keys = keys
        return keys

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        """Encrypts one update and deals its key."""
        return Dealer(attempt.context, keys, self._signer(), Csprng.fresh())

    # As a reader

    async def opened(
        self, result: common_pb2.ResultRef, layout: Layout, secrets: EpochSecrets
    ) -> OpenedRound:
        """Opens a published sum.

        Raises: COMMITTEE_REFUSED, SET_REFUSED, SIGNATURE_REFUSED, QUORUM_MISSING, ANSWERS_REFUSED, SUM_UNREADABLE,
        RESULT_UNKNOWN.
        """
        known = self._known.get(result.round_id)
        response = await self._calls.opening(result.round_id, has_keys=known is not None)
        if known is None or response.HasField("context"):
            context = self._attempts.context(response.context, layout)
        else:
            context = known.context
            require(context.layout_digest == layout.digest, "it is about another layout")
        named = (context.round_id, context.epoch) == (result.round_id, result.epoch)
        require(named, "it opens another result")
        attempt = self._attempts.worked_out(context, secrets)
        opened = await self._worker.run(
            open_round,
            context,
            attempt.committee,
            completed(response.opening, known.certificates if known else {}),
            attempt.answer_key,
            self._trust(READING_GRACE),
            Csprng.fresh(),
        )
        require(
            len(opened.contributors) == result.contributor_count,
            f"{result.contributor_count} updates are announced, and {len(opened.contributors)} are certified",
        )
        if opened.liars:
            _log.warning("members_lied", round=result.round_id, members=list(opened.liars))
        return opened

    # Identities

    @property
    def _round_grace(self) -> timedelta:
        """How long a certificate vouches for a statement of a round: as long as a round may last."""
        collecting_s = longest_s(self._rules.deadline_s, self._rules.grace)
        return timedelta(seconds=collecting_s + 4 * self._rules.committee_s)

    def _signer(self) -> Signer:
        held = self._identity.read()
        return Signer(self._client_id, held.key, pem_to_der(held.certificate))

    def _trust(self, grace: timedelta) -> Trust:
        authority = pem_to_der(self._identity.read().authority)
        return Trust(authority, self._federation_id, self._clock, grace)
