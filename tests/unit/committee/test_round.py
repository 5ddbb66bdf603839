"""Whole rounds at every size: who may be lost, before and after the certificate."""

import numpy as np
import pytest

from shelora.committee.rules import committee_rule
from shelora.errors import DomainError, Reason
from tests.unit.committee.rounds import World, context_of


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 9, 33])
def test_a_round_opens_the_sum_of_its_updates(size):
    world = World(context_of(size))
    opened, values = world.run()
    assert opened.contributors == world.context.cohort
    assert opened.total_weight == 2 * size
    assert opened.liars == ()
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))
    assert np.abs(values - world.true_sum(opened.contributors)).max() <= world.tolerance(size)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_a_committee_may_lose_what_the_document_says_and_no_member_more(size):
    rule = committee_rule(size)
    world = World(context_of(size)).collect()
    members = list(world.members)
    checks = world.check(members[: rule.quorum])
    if rule.quorum > 1:
        with pytest.raises(DomainError) as error:
            world.verdict(dict(list(checks.items())[:-1]))
        assert error.value.reason is Reason.QUORUM_MISSING
    contributors = world.verdict(checks).contributors
    assert world.certify(contributors, members[: rule.quorum - 1]) is None
    certificate = world.certify(contributors, members[: rule.quorum])
    answers = world.release(certificate, members[: rule.needed])
    opened = world.open(certificate, answers)
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))
    with pytest.raises(DomainError) as error:
        world.open(certificate, answers[:-1])
    assert error.value.reason is Reason.ANSWERS_REFUSED
    assert f"{rule.needed} are needed" in error.value.message


def test_a_client_that_is_gone_after_its_dealing_still_counts():
    world = World(context_of(8)).collect(absent=("ward-003",))
    contributors = world.verdict(world.check()).contributors
    assert "ward-003" not in contributors
    certificate = world.certify(contributors)
    opened = world.open(certificate, world.release(certificate))
    values = opened.sum_opener().open(world.total(contributors), world.shape)
    assert np.abs(values - world.true_sum(contributors)).max() <= world.tolerance(8)


def test_a_member_without_a_key_is_only_lost():
    world = World(context_of(8))
    _silent, *others = world.members
    world.keys = world.key_set(world.members[name].key for name in others)
    world.collect()
    contributors = world.verdict(world.check(others)).contributors
    assert contributors == world.context.cohort
    certificate = world.certify(contributors, others)
    opened = world.open(certificate, world.release(certificate, others))
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))


def test_a_member_that_signed_nothing_may_still_answer_the_one_certified_set():
    world = World(context_of(7)).collect()
    world.check()
    late, *others = world.members
    certificate = world.certify(world.context.cohort, others)
    world.release(certificate, [late])
    with pytest.raises(DomainError) as error:
        world.members[late].certify(world.context.cohort[:-1])
    assert error.value.reason in {Reason.ROUND_SPENT, Reason.SET_REFUSED}
