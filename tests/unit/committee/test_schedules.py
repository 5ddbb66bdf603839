"""Whatever a server does with up to T corrupt members, no two sets are opened for one number."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shelora.committee.certificate import ContributorSet, assemble
from shelora.committee.rules import CommitteeRule, committee_rule
from shelora.committee.statements import StatementKind
from shelora.errors import DomainError, Reason
from tests.unit.committee.rounds import World, context_of, signer

SIZES = (3, 4, 5, 7)
REFUSALS = {Reason.ROUND_SPENT, Reason.SET_REFUSED, Reason.QUORUM_MISSING}


class Server:
    """Shows every member whatever it likes, over two attempts at one number. Its accomplices sign everything."""

    def __init__(self, size):
        first = World(context_of(size)).collect()
        second = World(context_of(size, attempt=2, round_id="again"), notes=first.notes).collect()
        self.attempts = (first, second)
        for world in self.attempts:
            world.check()
        members = first.committee.members
        threshold = first.context.rule.threshold
        self.corrupt, self.honest = members[:threshold], members[threshold:]
        self.signed = {}
        self.opened = set()

    def content(self, world, chosen):
        """The set of these clients' dealings, as a corrupt member computes it."""
        held = world.dealings
        return ContributorSet.of(world.context, {name: held[name] for name in chosen}).content

    def ask(self, attempt, member, chosen):
        """Asks an honest member to certify a set."""
        world = self.attempts[attempt]
        statement = world.members[member].certify(chosen)
        self.signed.setdefault((attempt, statement.content), {})[member] = statement

    def release(self, attempt, member, chosen):
        """Shows an honest member the best certificate there is for a set."""
        world, content = self.attempts[attempt], self.content(self.attempts[attempt], chosen)
        statements = dict(self.signed.get((attempt, content), {}))
        for name in self.corrupt:
            statements[name] = signer(name).sign(StatementKind.SET, world.context, content)
        certificate = assemble(world.context, list(statements.values()))
        if certificate is not None:
            world.members[member].release(certificate)
            self.opened.add((attempt, content))


def attempted(action, *args):
    try:
        action(*args)
    except DomainError as error:
        if error.reason not in REFUSALS:
            raise


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_schedule_opens_two_sets(data):
    size = data.draw(st.sampled_from(SIZES))
    server = Server(size)
    cohort = server.attempts[0].context.cohort
    sets = [cohort, cohort[:-1], cohort[1:]] if size > 2 else [cohort]
    sets = [chosen for chosen in sets if len(chosen) >= 2]
    for _ in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from((server.ask, server.release)))
        attempt = data.draw(st.integers(0, 1))
        member = data.draw(st.sampled_from(server.honest))
        attempted(action, attempt, member, data.draw(st.sampled_from(sets)))
    assert len(server.opened) <= 1


def opened_by_split(size, on_the_right):
    """The first honest members are shown everyone's updates, the others all but one client's."""
    server = Server(size)
    everyone = server.attempts[0].context.cohort
    for index, member in enumerate(reversed(server.honest)):
        attempted(server.ask, 0, member, everyone[:-1] if index < on_the_right else everyone)
    for member, chosen in itertools.product(server.honest, (everyone, everyone[:-1])):
        attempted(server.release, 0, member, chosen)
    return len(server.opened)


@pytest.mark.parametrize("size", SIZES)
def test_every_split_of_the_honest_members_opens_one_set_at_most(size):
    honest = size - committee_rule(size).threshold
    opened = [opened_by_split(size, on_the_right) for on_the_right in range(honest + 1)]
    assert max(opened) == 1
    assert opened[0] == opened[-1] == 1


@pytest.mark.parametrize("size", [4, 5, 7])
def test_with_a_quorum_of_one_member_less_a_split_opens_two(size, monkeypatch):
    """The control: the size of the quorum is what prevents it."""
    quorum = committee_rule(size).quorum
    monkeypatch.setattr(CommitteeRule, "quorum", property(lambda _: quorum - 1))
    honest = size - committee_rule(size).threshold
    assert max(opened_by_split(size, on_the_right) for on_the_right in range(honest + 1)) == 2
