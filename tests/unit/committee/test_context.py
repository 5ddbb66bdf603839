"""What a context refuses, and that everything in it counts."""

import pytest

from shelora.additive import COMPACT, STANDARD
from shelora.committee.context import RoundContext, joined_digest
from shelora.committee.rules import CommitteeRule, committee_rule
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb
from tests.unit.committee.rounds import context_of, names

CHANGES = {
    "federation_id": "other",
    "instance": "00000002",
    "round_id": "clinic.0.9",
    "kind": "VOTE",
    "round_number": 2,
    "attempt": 2,
    "epoch": 2,
    "layout_digest": b"\1" * 32,
    "parameters": STANDARD,
    "cohort": names(8)[1:],
    "most_contributors": 9,
    "rule": CommitteeRule(5, 2, 1),
    "min_updates": 3,
    "most_weight": 99,
    "start": b"\1" * 32,
}

WRONG = {
    "federation_id": "",
    "instance": "a/b",
    "round_id": "",
    "kind": "train",
    "round_number": 0,
    "attempt": 0,
    "epoch": 2**32,
    "layout_digest": bytes(31),
    "cohort": tuple(reversed(names(8))),
    "most_contributors": 7,
    "rule": CommitteeRule(16, 5, 4),
    "min_updates": 1,
    "most_weight": 0,
    "start": b"",
}


def test_every_field_of_the_context_is_in_its_digest():
    assert set(CHANGES) == set(RoundContext.__dataclass_fields__)
    digests = {context_of(8, **{field: value}).digest for field, value in CHANGES.items()}
    assert len(digests | {context_of(8).digest}) == len(CHANGES) + 1


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_named(field):
    with pytest.raises(DomainError) as error:
        context_of(8, **{field: WRONG[field]})
    assert error.value.reason is Reason.INVALID_ARGUMENT
    assert ("committee" if field == "rule" else field) in error.value.message


@pytest.mark.parametrize("cohort", [names(1), ("ward-000", "ward-000"), ("ward-000", "a b"), ()])
def test_a_cohort_is_two_or_more_different_names(cohort):
    with pytest.raises(DomainError):
        context_of(2, cohort=cohort)


@pytest.mark.parametrize("context", [context_of(2), context_of(40, parameters=COMPACT)])
def test_a_context_survives_the_wire(context):
    message = pb.RoundContext.FromString(context.to_proto().SerializeToString())
    assert RoundContext.from_proto(message, insecure=True) == context


def test_a_profile_for_tests_is_refused_from_servers():
    with pytest.raises(DomainError) as error:
        RoundContext.from_proto(context_of(2).to_proto())
    assert "tests only" in error.value.message


def test_a_committee_that_tolerates_fewer_than_its_cohort_needs_is_refused():
    with pytest.raises(DomainError) as error:
        context_of(300, rule=CommitteeRule(3, 1, 1))
    assert "must tolerate 21" in error.value.message


def test_an_update_is_dealt_again_only_to_the_committee_that_certifies_one_set():
    key, first = b"k" * 32, context_of(40)
    member = first.committee(key).members[0]
    others = tuple(name for name in first.cohort if name != member)

    def deciders(**changes):
        context = context_of(40, **changes)
        return context.deciders(context.committee(key))

    assert deciders(attempt=2, round_id="again", min_updates=3) == deciders()
    for change in (
        {"round_number": 2},
        {"kind": "VOTE"},
        {"instance": "00000002"},
        {"federation_id": "other"},
        {"epoch": 2},
        {"rule": CommitteeRule(16, 6, 2)},
        {"cohort": others},
    ):
        assert deciders(**change) != deciders()


@pytest.mark.parametrize("field", [f.name for f in pb.RoundContext.DESCRIPTOR.fields])
def test_a_message_without_one_of_its_fields_is_refused(field):
    message = context_of(8).to_proto()
    message.ClearField(field)
    with pytest.raises(DomainError) as error:
        RoundContext.from_proto(message, insecure=True)
    assert error.value.reason is Reason.INVALID_ARGUMENT


def test_sets_of_clients_are_bits_over_the_cohort():
    context = context_of(9)
    for chosen in ((), ("ward-000",), ("ward-008",), context.cohort):
        assert context.names(context.bits(frozenset(chosen))) == chosen
    for bits in (b"", bytes(1), bytes(3), b"\0\2"):
        with pytest.raises(DomainError):
            context.names(bits)
    with pytest.raises(DomainError) as error:
        context.bits(frozenset({"ward-900"}))
    assert error.value.reason is Reason.NOT_IN_COHORT


def test_two_lists_of_parts_have_two_digests():
    assert joined_digest(b"ab", b"c") != joined_digest(b"a", b"bc")
    assert joined_digest(b"a") != joined_digest(b"a", b"")


@pytest.mark.parametrize(
    ("cohort", "rule"),
    [
        (2, (2, 1, 1)),
        (3, (3, 1, 1)),
        (4, (4, 1, 1)),
        (5, (5, 2, 1)),
        (6, (5, 2, 1)),
        (7, (7, 2, 2)),
        (31, (7, 2, 2)),
        (32, (16, 5, 4)),
        (255, (16, 5, 4)),
        (256, (64, 21, 16)),
        (10_000, (64, 21, 16)),
    ],
)
def test_the_default_committee_of_a_cohort(cohort, rule):
    assert committee_rule(cohort) == CommitteeRule(*rule)


@pytest.mark.parametrize(
    "numbers", [(1, 1, 1), (65, 5, 4), (5, 0, 1), (5, 5, 1), (7, 2, 3), (3, 1, 4), (5, 2, 4)]
)
def test_numbers_that_make_no_committee_are_refused(numbers):
    with pytest.raises(DomainError) as error:
        CommitteeRule(*numbers)
    assert error.value.reason is Reason.INVALID_ARGUMENT


def test_a_cohort_of_one_has_no_committee():
    with pytest.raises(DomainError):
        committee_rule(1)
