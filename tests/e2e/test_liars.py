"""Members of committees that lie, on real processes: what each costs, and who is named for it.

Servers are processes of their own. Agents are the real ones and share this process, where some of them are made to lie
(`tests/simulation/liars.py`, which runs the same under faults in virtual time).
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import client_agent.agent
import client_agent.committees
from client_agent.attempts import Attempt
from client_agent.committees import Committees
from client_agent.learning import BaseDigest
from load.learner import SyntheticLearner
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.additive.wire import HEADER_BYTES
from shelora.cli.cluster import LocalCluster
from shelora.committee.dealer import Dealer
from shelora.committee.keys import KeySet
from shelora.errors import Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.insiders.lab import Lab
from tests.simulation.liars import LIARS

HONEST = ("clinic", "bank", "ward")
DRAW = 2
"""The one that is spoiled: there is a result before it."""


class SharesAnotherSecret(Committees):
    """Deals sound shares of a secret under which it did not encrypt."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        honest = super().dealer(attempt, keys)
        if attempt.context.round_number == DRAW:
            honest._secret = SecretKey.draw(attempt.context.parameters, Csprng.fresh())
        return honest


class EncryptsGarbage(Committees):
    """Sends random bytes in the form of a summand."""

    def dealer(self, attempt: Attempt, keys: KeySet) -> Dealer:
        honest = super().dealer(attempt, keys)
        encrypt = honest.encryption.encrypt

        def garbage(values: Any) -> bytes:
            summand = encrypt(values)
            return summand[:HEADER_BYTES] + Csprng.fresh().bytes(len(summand) - HEADER_BYTES)

        if attempt.context.round_number == DRAW:
            honest.encryption.encrypt = garbage  # type: ignore[method-assign]
        return honest


WAYS = {
    "another-secret": SharesAnotherSecret,
    "garbage": EncryptsGarbage,
    "bad-shares": LIARS["deals bad shares"],
    "bad-answer": LIARS["answers anything"],
    "other-base": Committees,
    "claims": Committees,
}
"""By the federation, what the member `liar` does; in the last two it has another base model, or 10^9 examples."""
EXAMPLES = 64
SPOILED = ("another-secret", "garbage")


@dataclass
class Seen:
    """What agents did and found in one federation."""

    outcomes: dict[str, str] = field(default_factory=dict)
    applied: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By client, the results that it applied."""
    named: set[tuple[str, ...]] = field(default_factory=set)
    """Liars that readers of results found."""
    weights: set[int] = field(default_factory=set)
    """Weights of all certified updates together."""
    history: list[pb.RoundSummary] = field(default_factory=list)


class Learner(SyntheticLearner):
    """Has a base model, the same at all but one member of one federation, and notes the results that it applied."""

    seen: Seen

    def __init__(self, config: Any, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        lies = config.client_id == "liar" and config.federation.rpartition("-")[0]
        other, self.examples = lies == "other-base", range(10**9 if lies == "claims" else EXAMPLES)
        self.base = BaseDigest(weights=bytes([other]) * 32, tokenizer=bytes(32), chat_template=bytes(32))

    def apply(self, round_id: str, *arguments: Any, **named: Any) -> None:
        super().apply(round_id, *arguments, **named)
        self.seen.applied[self._client_id].append(round_id)


async def a_federation(lab: Lab, way: str) -> Seen:
    seen = Seen()
    learner = type("Noting", (Learner,), {"seen": seen})
    rounds = 3 if way in SPOILED else 1
    rules = {
        "clients": 4,
        "min_updates": 3,
        "rounds": rounds,
        "max_attempts": 3,
        "committee_s": 300,
        "deadline_s": 300,
    }
    spec = await lab.create(way, protection={"mode": "complete"}, round=rules)
    names = [*HONEST, "liar"]
    found = await asyncio.gather(*(lab.honest(spec, name, learn=learner) for name in names))
    seen.outcomes = dict(zip(names, found, strict=True))
    seen.history = list((await lab.view(spec)).history)
    return seen


def made(federation_id: str, client_id: str, *arguments: Any, **named: Any) -> Committees:
    kind = WAYS[federation_id.rpartition("-")[0]] if client_id == "liar" else Committees
    return kind(federation_id, client_id, *arguments, **named)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """All federations at once on one cluster."""
    folder: Path = tmp_path_factory.mktemp("liars")
    open_round, named, weights = client_agent.committees.open_round, defaultdict(set), defaultdict(set)

    def opened(context: Any, *arguments: Any) -> Any:
        found = open_round(context, *arguments)
        way = context.federation_id.rpartition("-")[0]
        named[way].add(found.liars)
        weights[way].add(found.total_weight)
        return found

    async def everything(lab: Lab) -> list[Seen]:
        return await asyncio.gather(*(a_federation(lab, way) for way in WAYS))

    with (
        LocalCluster(folder / "cluster", fixed_ports=False, workers=1) as cluster,
        mock.patch.object(client_agent.agent, "Committees", made),
        mock.patch.object(client_agent.committees, "open_round", opened),
    ):
        found = dict(zip(WAYS, asyncio.run(everything(Lab(cluster, folder))), strict=True))
    for way, what in found.items():
        what.named, what.weights = named[way], weights[way]
    return found


def ended(seen: Seen) -> list[tuple[int, str, Reason | None]]:
    return [
        (r.number, pb.RoundState.Name(r.state).removeprefix("ROUND_STATE_"), r.reason) for r in seen.history
    ]


@pytest.mark.parametrize("way", SPOILED)
def test_a_spoiled_sum_costs_its_round_and_is_repeated_from_the_result_before(seen, way):
    found = seen[way]
    assert set(found.outcomes.values()) == {"finished"}
    rounds = ended(found)
    numbers = [1, 2, 3, 2, 3]
    assert [number for number, *_ in rounds] == numbers, rounds
    assert rounds[2] == (3, "ABANDONED", Reason.SUM_UNREADABLE), (
        "it could not begin from the second round's result"
    )
    sound = [found.history[index].round_id for index in (0, 3, 4)]
    suspect = "bank"  # the first of equal weight sits the repetition out
    assert found.applied.pop(suspect) == [sound[0], sound[2]]
    for client, applied in found.applied.items():
        assert applied == sound, client
    dropped = [{(d.client_id, d.reason) for d in r.dropped} for r in found.history]
    assert not dropped[1], "nobody can say whose fault it was"
    assert dropped[2] <= {(name, Reason.SUM_UNREADABLE) for name in found.outcomes}, (
        "all that could not open it say so"
    )


def test_a_dealer_whose_share_does_not_open_is_left_out_by_name(seen):
    found = seen["bad-shares"]
    assert set(found.outcomes.values()) == {"finished"}
    (round_,) = found.history
    assert [(d.client_id, d.reason) for d in round_.dropped] == [("liar", Reason.DEALING_REFUSED)]


def test_a_member_that_lies_in_its_answer_is_named_by_every_reader_and_the_sum_is_right(seen):
    found = seen["bad-answer"]
    assert found.named == {("liar",)}
    assert set(found.outcomes.values()) == {"finished"}
    assert {len(applied) for applied in found.applied.values()} == {1}


def test_an_agent_with_another_base_model_is_left_out_by_name_before_a_set_is_certified(seen):
    found = seen["other-base"]
    assert found.outcomes == {**dict.fromkeys(HONEST, "finished"), "liar": Reason.MODEL_MISMATCH}
    (round_,) = found.history
    assert [(d.client_id, d.reason) for d in round_.dropped] == [("liar", Reason.MODEL_MISMATCH)]


def test_one_that_claims_a_billion_examples_has_the_documented_share_and_no_more(seen):
    found = seen["claims"]
    assert set(found.outcomes.values()) == {"finished"}
    (total,) = found.weights
    others = EXAMPLES * len(HONEST)
    assert Fraction(total - others, total) == Fraction(1, len(HONEST) + 1)
