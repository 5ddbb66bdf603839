"""Committees with members and dealers that lie, and with a coordinator that asks for a second set."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from unittest import mock

import pytest

from client_agent.adapters import Adapters
from client_agent.learning import Evaluation
from coordinator.convening import Convening
from shelora.committee.rules import committee_rule
from tests.simulation.cluster import Size
from tests.simulation.learner import MarkedLearner
from tests.simulation.liars import LIARS, draws_unspent, equivocating, lying, objecting, outweighed, too_few
from tests.simulation.simulation import Report, Schedule, run
from tests.simulation.test_simulation import explained

TWO = [pytest.param({"agent-1": kind, "agent-3": kind}, id=f"two: {kind}") for kind in LIARS]
ONE = [pytest.param({"agent-1": kind}, id=kind) for kind in LIARS]


def complete(seed: int, clients: int, faults: tuple = ()) -> Schedule:
    size = Size(clients, 2, min_updates=2, deadline_s=30, max_attempts=3, complete=True)
    return Schedule(seed, size, faults)


def kept(report: Report) -> None:
    """Nothing is opened that must not be; a federation may fail over liars, never with a wrong result."""
    assert not report.violation, explained(report)


@pytest.mark.parametrize("liars", ONE)
def test_one_liar_of_four_stops_nobody(liars):
    with lying(liars):
        report = run(complete(1, 4))
    kept(report)
    assert report.phase == "FINISHED"


@pytest.mark.parametrize("liars", TWO)
def test_two_liars_of_seven_stop_nobody(liars):
    with lying(liars):
        report = run(complete(2, 7))
    kept(report)
    assert report.phase == "FINISHED"


@pytest.mark.parametrize("key_rotation", [0, 1])
def test_a_sum_that_does_not_open_costs_its_round_and_the_federation_goes_on(key_rotation):
    schedule = complete(3, 4)
    size = replace(schedule.size, key_rotation=key_rotation)
    with lying({"agent-1": "shares another secret once"}):
        report = run(replace(schedule, size=size), traced=True)
    kept(report)
    assert report.phase == "FINISHED"
    assert any("abandon_round" in line and "SUM_UNREADABLE" in line for line in report.trace), "it did lie"


@pytest.mark.parametrize(
    ("liars", "phase"),
    [(("agent-1",), "FINISHED"), (("agent-3",), "FINISHED"), (("agent-1", "agent-3"), "FAILED")],
)
def test_one_client_that_spoils_every_sum_sits_out_and_two_end_the_federation(liars, phase):
    with lying(dict.fromkeys(liars, "shares another secret")):
        report = run(complete(3, 4), traced=True)
    kept(report)
    assert report.phase == phase
    assert any("abandon_round" in line and "SUM_UNREADABLE" in line for line in report.trace), "they did lie"


@pytest.mark.parametrize(("objectors", "taken_back"), [("1", False), ("12", False), ("123", True)])
def test_who_objects_takes_part_and_more_than_half_take_a_result_back(objectors, taken_back):
    with objecting(*(f"agent-{index}" for index in objectors), to=1):
        report = run(complete(5, 4), traced=True)
    kept(report)
    assert report.phase == "FINISHED"
    abandoned = [line for line in report.trace if "abandon_round" in line]
    assert [("SUM_UNREADABLE" in line) for line in abandoned] == [True] * taken_back
    said = [line for line in report.trace if "ObjectToResult" in line]
    assert len(said) >= len(objectors), "they did object"


def number_of(round_id: str) -> str:
    """Its number among all attempts."""
    return round_id.rpartition(".")[2]


@contextmanager
def adapters() -> Iterator[dict[str, list[str]]]:
    """Which results' adapters agents save, by agent: the round's number among all attempts."""
    saved: dict[str, list[str]] = defaultdict(list)
    real = MarkedLearner.save_adapter

    def noted(learner: MarkedLearner, *arguments, **named):
        saved[learner._client_id].append(number_of(learner._position))
        real(learner, *arguments, **named)

    with mock.patch.object(MarkedLearner, "save_adapter", noted):
        yield saved


def test_who_objects_to_the_last_result_finishes_too_and_keeps_the_adapter_before():
    with adapters() as saved, objecting("agent-0", "agent-1", "agent-2", to=2):
        report = run(complete(6, 4), traced=True)
    kept(report)
    assert report.phase == "FINISHED"
    assert not any("abandon_round" in line for line in report.trace), "no round begins from it"
    newest = {name: rounds[-1] for name, rounds in saved.items()}
    assert newest == {"agent-0": "1", "agent-1": "1", "agent-2": "1", "agent-3": "2"}


def test_a_result_that_is_taken_back_is_nobodys_adapter():
    """Nor of who found it useful: until its round is repeated the adapter is that of the result before again."""
    schedule = complete(6, 4)
    with adapters() as saved, objecting("agent-1", "agent-2", "agent-3", to=2):
        report = run(replace(schedule, size=replace(schedule.size, rounds=3)))
    kept(report)
    assert report.phase == "FINISHED"
    assert saved["agent-0"] == ["1", "2", "1", "4", "5"]
    assert all("2" not in saved[f"agent-{index}"] for index in (1, 2, 3))


def test_the_best_adapter_is_of_no_result_that_was_taken_back():
    """Also where the client itself found that result the best: it has the best one from before again, at once."""
    losses = {"1": 0.5, "2": 0.1, "4": 0.6, "5": 0.4}
    best: list[str] = []

    def evaluate(learner: MarkedLearner, *_arguments, **_named) -> Evaluation:
        return Evaluation(count=1, correct=1, loss=losses[number_of(learner._position)], seconds=0.0)

    def noting(real):
        def noted(adapters: Adapters, *arguments):
            returned = real(adapters, *arguments)
            if adapters.best.parent.name == "agent-0" and adapters.best.is_dir():
                best.append(number_of((adapters.best / "position").read_text()))
            return returned

        return noted

    schedule = complete(6, 4)
    with (
        mock.patch.object(MarkedLearner, "evaluate", evaluate),
        mock.patch.object(Adapters, "follow", noting(Adapters.follow)),
        mock.patch.object(Adapters, "keep_if_best", noting(Adapters.keep_if_best)),
        objecting("agent-1", "agent-2", "agent-3", to=2),
    ):
        report = run(replace(schedule, size=replace(schedule.size, rounds=3)))
    kept(report)
    assert report.phase == "FINISHED"
    assert [number for number, _ in groupby(best)] == ["1", "2", "1", "5"]


@pytest.mark.parametrize("seed", range(6))
def test_liars_of_every_kind_and_faults_at_random_open_nothing_twice(seed):
    kinds = sorted(LIARS)
    liars = {"agent-0": kinds[seed % len(kinds)], "agent-2": kinds[(seed + 2) % len(kinds)]}
    with lying(liars):
        report = run(Schedule(seed, complete(seed, 5 + seed % 3).size))
    kept(report)


@pytest.mark.parametrize("seed", range(4))
def test_a_coordinator_that_asks_for_a_second_set_of_a_draw_gets_none(seed):
    """The observer sees whether two sets of one draw are certified."""
    with draws_unspent(), lying({"agent-0": "signs anything", "agent-1": "signs anything"}):
        report = run(Schedule(seed, complete(seed, 7).size))
    assert "two sets are certified" not in report.violation, explained(report)


@pytest.mark.parametrize("clients", [4, 5, 7])
def test_a_coordinator_that_shows_members_two_sets_gets_a_quorum_for_one_at_most(clients):
    rule = committee_rule(clients)
    corrupt = {f"agent-{index}" for index in range(rule.threshold)}
    with equivocating() as signed, lying(dict.fromkeys(corrupt, "signs anything")):
        kept(run(complete(clients, clients)))
    assert signed.sets, "members were asked to sign"
    for sets in signed.sets.values():
        assert len(sets) == 2, "two sets were shown"
        honest = [signers - corrupt for signers in sets.values()]
        assert not honest[0] & honest[1], "nobody honest signs two"
        assert sum(len(signers | corrupt) >= rule.quorum for signers in sets.values()) <= 1


@pytest.mark.parametrize("clients", [4, 7])
def test_a_coordinator_that_asks_for_fewer_updates_than_promised_gets_no_signature(clients):
    schedule = complete(clients, clients)
    with too_few() as signed:
        report = run(replace(schedule, size=replace(schedule.size, min_updates=3)))
    kept(report)
    assert not signed.sets
    assert report.phase == "FAILED", "members were asked, refused and left"


def test_agents_are_sent_openings_without_what_came_with_the_committees_keys():
    real, sent = Convening.opening, []

    async def noted(self, *scope, has_keys=False):
        sent.append(await real(self, *scope, has_keys=has_keys))
        return sent[-1]

    with mock.patch.object(Convening, "opening", noted):
        report = run(complete(1, 4))
    kept(report)
    assert report.phase == "FINISHED"
    assert len(sent) == 2 * 4, "each agent opens each result"
    for response in sent:
        assert not response.HasField("context")
        statements = [*response.opening.certificate.signatures, *response.opening.answers]
        assert statements
        assert all(statement.signer and not statement.certificate for statement in statements)


def test_a_coordinator_that_names_a_scale_for_one_client_alone_gets_no_set_certified():
    """The control is any other run: the same federation finishes (`test_one_liar_of_four_stops_nobody`)."""
    with outweighed():
        report = run(complete(4, 4), traced=True)
    kept(report)
    assert report.phase == "FAILED"
    assert any("SET_REFUSED" in line for line in report.trace)
    assert not any("certify_set" in line for line in report.trace)
