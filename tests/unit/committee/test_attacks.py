"""Every attack that was tried on the design, each with the control that shows what it gives where the check is off."""

import copy
import itertools
import pickle
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.committee.certificate import ContributorSet, assemble
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import read_dealing, shown_to
from shelora.committee.field import PRIME, encode_values, interpolation, signed, uniform
from shelora.committee.keys import KeySet
from shelora.committee.rules import committee_rule
from shelora.committee.sealing import seal_answer
from shelora.committee.shamir import PackedSharing
from shelora.committee.statements import StatementKind
from shelora.committee.verdict import Checked, judge
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb
from tests.unit.committee.rounds import ANSWER_KEY, World, context_of, rng, signer, trust

RULES = sorted({committee_rule(size) for size in (2, 3, 4, 5, 7, 32, 256)}, key=lambda rule: rule.size)


def refused_with(reason, action, *args, **options):
    with pytest.raises(DomainError) as error:
        action(*args, **options)
    assert error.value.reason is reason, error.value
    return error.value.message


def held_shares(world, member, contributors):
    """What a corrupt member can send for any set it likes: the sum of its shares."""
    total = sum(world.members[member]._held[name].share.astype(np.int64) for name in contributors)
    return total % PRIME


def cheating(world, dealer, alter):
    """Has one client deal shares [members, N / l + 8] that `alter` changed before they were sealed."""
    honest = PackedSharing.shares

    def altered(sharing, polynomials, positions):
        return alter(honest(sharing, polynomials, positions).copy())

    with patch.object(PackedSharing, "shares", altered):
        world.deal(dealer)


# --- a server that partitions the committee


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_any_two_quorums_share_an_honest_member(rule):
    assert 2 * rule.quorum - rule.size > rule.threshold
    assert rule.needed <= rule.quorum  # whoever certified a set can open it


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_without_the_certificate_a_partition_and_T_members_give_a_victims_secret_exactly(size):
    world = World(context_of(size)).collect()
    world.check()
    rule, members = world.context.rule, list(world.members)
    everyone = world.context.cohort
    victim = everyone[-1]
    without = everyone[:-1]
    corrupt, honest = members[: rule.threshold], members[rule.threshold :]
    left, right = honest[: len(honest) // 2], honest[len(honest) // 2 :]
    enough = rule.threshold + len(left) >= rule.needed and rule.threshold + len(right) >= rule.needed
    assert enough, "the two halves must each open a set, or the attack is not tried"

    def opened(answering, contributors):
        positions = [world.members[m].position for m in answering]
        answers = np.array([held_shares(world, m, contributors) for m in answering])
        return signed(
            PackedSharing(rule).open(positions[: rule.needed], answers[: rule.needed], rng()).secrets
        )

    difference = opened([*corrupt, *left], everyone) - opened([*corrupt, *right], without)
    assert np.array_equal(difference, world.secrets[victim])


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_with_the_certificate_no_partition_certifies_two_sets(size):
    rule = committee_rule(size)
    for honest_left in range(rule.size - rule.threshold + 1):
        left = rule.threshold + honest_left
        right = rule.size - honest_left
        assert not (left >= rule.quorum and right >= rule.quorum)
    world = World(context_of(size, min_updates=2)).collect()
    world.check()
    everyone, without = world.context.cohort, world.context.cohort[:-1]
    member = next(iter(world.members))
    world.members[member].certify(everyone)
    if len(without) >= 2:
        refused_with(Reason.ROUND_SPENT, world.members[member].certify, without)
    certificate = world.certify(everyone)
    for name in world.members:
        world.release(certificate, [name])
        refused_with(Reason.SET_REFUSED, world.members[name].certify, without)  # the shares are gone


def test_a_certificate_of_fewer_members_than_a_quorum_releases_nothing():
    world = World(context_of(7)).collect()
    world.check()
    statements = [world.members[m].certify(world.context.cohort) for m in list(world.members)[:4]]
    assert assemble(world.context, statements) is None
    few = pb.Certificate(
        content=statements[0].content,
        signatures=[pb.SetSignature(signature=s.signature, certificate=s.certificate) for s in statements],
    )
    for member in world.members.values():
        assert "4 members" in refused_with(Reason.QUORUM_MISSING, member.release, few)
    repeated = pb.Certificate(content=few.content, signatures=[few.signatures[0]] * 7)
    refused_with(Reason.QUORUM_MISSING, world.members[world.committee.members[0]].release, repeated)
    refused_with(Reason.QUORUM_MISSING, world.open, repeated, [])


def test_signatures_of_clients_outside_the_committee_certify_nothing():
    world = World(context_of(8)).collect()
    world.check()
    content = world.members[world.committee.members[0]].certify(world.context.cohort).content
    strangers = [name for name in world.context.cohort if world.committee.position(name) is None]
    chosen = [*strangers, *world.committee.members[:4]]
    statements = [signer(name).sign(StatementKind.SET, world.context, content) for name in chosen]
    forged = assemble(world.context, statements)
    assert forged is not None  # a server can count wrongly, so members and readers count again
    refused_with(Reason.QUORUM_MISSING, world.members[world.committee.members[0]].release, forged)
    refused_with(Reason.QUORUM_MISSING, world.open, forged, [])


def test_a_set_below_min_updates_is_neither_certified_nor_opened():
    world = World(context_of(7, min_updates=5)).collect()
    world.check()
    member = world.members[world.committee.members[0]]
    refused_with(Reason.SET_REFUSED, member.certify, world.context.cohort[:4])
    lax = World(context_of(7, min_updates=2)).collect()
    small = ContributorSet.of(lax.context, {name: (bytes(32), 1) for name in lax.context.cohort[:4]}).content
    statements = [signer(name).sign(StatementKind.SET, world.context, small) for name in world.members]
    refused_with(Reason.SET_REFUSED, world.open, assemble(world.context, statements), [])


# --- replays, attempts, restarts


def test_a_member_answers_once_and_repeats_the_same_bytes():
    world = World(context_of(5)).collect()
    world.check()
    certificate = world.certify(world.context.cohort)
    member = world.members[world.committee.members[0]]
    first = member.release(certificate)
    assert member.release(certificate) == first
    assert not member._held
    assert member._inspector is None
    dealing = shown_to(world.context, world.dealt["ward-001"], member.position)
    refused_with(Reason.SECRET_UNAVAILABLE, member.receive, "ward-001", dealing, world.keys)


def test_a_member_repeats_its_signature_of_the_set_as_the_same_bytes():
    world = World(context_of(5)).collect()
    world.check()
    member = world.members[world.committee.members[0]]
    first = member.certify(world.context.cohort)
    assert member.certify(list(reversed(world.context.cohort))) == first
    assert member.check() == member.check()
    world.release(world.certify(world.context.cohort))
    assert member.certify(world.context.cohort) == first  # the shares are gone, the signature is not


def test_an_answered_member_does_not_answer_for_another_certified_set():
    """Needs a committee with more than T corrupt members, who sign twice: the honest one still answers once."""
    world = World(context_of(5)).collect()
    world.check()
    first = world.certify(world.context.cohort)
    honest = world.members[world.committee.members[0]]
    honest.release(first)
    dealings = {
        n: (world.members[world.committee.members[1]]._held[n].digest, 2) for n in world.context.cohort[:-1]
    }
    other = ContributorSet.of(world.context, dealings).content
    second = assemble(
        world.context, [signer(n).sign(StatementKind.SET, world.context, other) for n in world.members]
    )
    refused_with(Reason.ROUND_SPENT, honest.release, second)


def test_the_next_attempt_of_a_certified_number_opens_no_other_set():
    first = World(context_of(5)).collect()
    first.check()
    first.certify(first.context.cohort)
    second = World(context_of(5, attempt=2, round_id="clinic.0.2"), notes=first.notes).collect()
    assert second.committee == first.committee
    second.check()
    for member in second.members.values():
        message = refused_with(Reason.ROUND_SPENT, member.certify, second.context.cohort[:-1])
        assert "new round number" in message
    unnoted = World(
        context_of(5, attempt=2, round_id="clinic.0.2")
    ).collect()  # the control: members that forgot
    unnoted.check()
    assert unnoted.certify(unnoted.context.cohort[:-1]) is not None


def test_a_restarted_member_notes_on_disk_what_it_signed_and_opens_no_old_share():
    world = World(context_of(5)).collect()
    name = world.committee.members[0]
    world.check()
    world.members[name].certify(world.context.cohort)
    world.seed = 1  # a restarted process draws another key
    world.members[name] = world.member(name)
    error = world.show(name, "ward-001")
    assert error.reason is Reason.DEALING_REFUSED
    world.members[name]._held = dict(world.members[world.committee.members[1]]._held)
    refused_with(Reason.ROUND_SPENT, world.members[name].certify, world.context.cohort[:-1])


def test_a_dealing_of_one_attempt_is_refused_in_another():
    first = World(context_of(5)).collect()
    second = World(context_of(5, attempt=2))
    second.dealt = first.dealt
    error = second.show(second.committee.members[0], "ward-001")
    assert error.reason is Reason.SIGNATURE_REFUSED


def test_a_secret_is_dealt_once():
    world = World(context_of(5))
    dealer = Dealer(world.context, world.keys, signer("ward-001"), rng())
    dealer.deal([bytes(32)], 1)
    refused_with(Reason.SECRET_UNAVAILABLE, dealer.deal, [bytes(32)], 1)
    assert "secret" not in repr(dealer).lower()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_that_holds_a_secret_is_copied(copier):
    world = World(context_of(3))
    dealer = Dealer(world.context, world.keys, signer("ward-001"), rng())
    for holder in (dealer, signer("ward-001"), next(iter(world.members.values())), rng()):
        with pytest.raises(TypeError):
            copier(holder)


# --- members that collude


def rank(matrix):
    """Rank modulo the prime."""
    matrix, found = matrix.copy() % PRIME, 0
    for column in range(matrix.shape[1]):
        pivots = np.flatnonzero(matrix[found:, column])
        if not len(pivots):
            continue
        matrix[[found, found + pivots[0]]] = matrix[[found + pivots[0], found]]
        matrix[found] = matrix[found] * pow(int(matrix[found, column]), -1, PRIME) % PRIME
        for row in set(range(len(matrix))) - {found}:
            matrix[row] = (matrix[row] - matrix[row, column] * matrix[found]) % PRIME
        found += 1
        if found == len(matrix):
            break
    return found


@pytest.mark.parametrize("rule", [r for r in RULES if r.size <= 16], ids=str)
def test_T_members_learn_nothing_and_T_plus_l_everything(rule):
    sharing = PackedSharing(rule)
    dealt = np.array(
        [sharing.shares(np.eye(rule.needed, dtype=np.int64), [p])[0] for p in range(1, rule.size + 1)]
    )

    def known(members):
        """Independent combinations of a polynomial's secrets that shares of these members give."""
        rows = dealt[list(members)]
        return rank(rows) - rank(rows[:, rule.packing :])

    for members in itertools.islice(itertools.combinations(range(rule.size), rule.threshold), 200):
        assert known(members) == 0
    assert known(range(rule.needed)) == rule.packing


def test_T_plus_l_members_with_the_servers_get_a_victims_secret():
    """The limit of the scheme, which the documents state."""
    world = World(context_of(7)).collect()
    world.check()
    rule, victim = world.context.rule, "ward-000"
    members = list(world.members)[: rule.needed]
    shares = np.array([held_shares(world, m, [victim]) for m in members])
    positions = [world.members[m].position for m in members]
    secret = signed(PackedSharing(rule).open(positions, shares, rng()).secrets)
    assert np.array_equal(secret, world.secrets[victim])


# --- dealers that cheat


def one_element(shares):
    shares[2, 5] = (shares[2, 5] + 1) % PRIME
    return shares


def all_random(shares):
    return uniform(rng("garbage"), *shares.shape)


def higher_degree(shares):
    """Shares of polynomials of degree T + l: one more than the committee can interpolate."""
    points = np.arange(1, len(shares) + 1, dtype=np.int64)[:, None]
    return (shares + points**3) % PRIME


@pytest.mark.parametrize("alter", [one_element, all_random, higher_degree])
def test_a_dealer_of_shares_that_do_not_fit_is_left_out_by_name(alter):
    world = World(context_of(5))
    cheating(world, "ward-002", alter)
    world.collect()
    verdict = world.verdict(world.check())
    assert set(verdict.left_out) == {"ward-002"}
    assert verdict.set_aside == ()
    certificate = world.certify(verdict.contributors)
    opened = world.open(certificate, world.release(certificate))
    assert np.array_equal(opened.secret_sum, sum(world.secrets[n] for n in verdict.contributors))


def test_without_the_proof_such_a_dealer_spoils_the_round():
    world = World(context_of(5))
    cheating(world, "ward-002", all_random)
    with patch("shelora.committee.holding.fits", return_value=True):
        world.collect()
        verdict = world.verdict(world.check())
    assert verdict.left_out == {}
    certificate = world.certify(verdict.contributors)
    refused_with(Reason.ANSWERS_REFUSED, world.open, certificate, world.release(certificate))


def test_a_dealer_of_another_secret_makes_garbage_that_no_client_takes():
    """Its shares fit; only its ciphertexts do not. The round is lost, by a message, and nobody can be named."""
    world = World(context_of(5))
    world.deal("ward-002")
    world.uploads["ward-002"] = World(context_of(5, attempt=2)).collect().uploads["ward-002"]
    world.collect()
    contributors = world.verdict(world.check()).contributors
    certificate = world.certify(contributors)
    opened = world.open(certificate, world.release(certificate))
    refused_with(Reason.SUM_UNREADABLE, opened.sum_opener().open, world.total(contributors), world.shape)


def test_a_dealer_of_a_huge_secret_is_noticed_before_anything_is_decrypted():
    world = World(context_of(5))
    honest = PackedSharing.polynomials

    def huge(sharing, secrets, stream):
        return honest(sharing, (secrets + 5000) % PRIME, stream)

    with patch.object(PackedSharing, "polynomials", huge):
        world.deal("ward-002")
    world.collect()
    contributors = world.verdict(world.check()).contributors
    certificate = world.certify(contributors)
    refused_with(Reason.SUM_UNREADABLE, world.open, certificate, world.release(certificate))


def test_a_dealer_that_deals_twice_differently_is_refused():
    world = World(context_of(5)).collect()
    member = world.committee.members[0]
    assert world.show(member, "ward-002") is None
    world.seed = 7
    world.deal("ward-002")
    error = world.show(member, "ward-002")
    assert "made two" in error.message
    assert "ward-002" in Checked.read(world.context, world.members[member].check().content).refused


def test_two_dealings_of_one_client_make_no_certificate():
    """A server shows members different dealings of one client: what they sign differs."""
    world = World(context_of(5)).collect()
    members = list(world.members)
    for member in members[:3]:
        for dealer in world.context.cohort:
            world.show(member, dealer)
    world.seed = 7
    world.deal("ward-002")
    for member in members[3:]:
        for dealer in world.context.cohort:
            world.show(member, dealer)
    assert world.certify(world.context.cohort) is None


def test_a_dealer_with_other_committee_keys_is_refused():
    world = World(context_of(5))
    missing_one = world.key_set(m.key for m in list(world.members.values())[1:])
    world.deal("ward-002", keys=missing_one)
    error = world.show(world.committee.members[1], "ward-002")
    assert error.reason is Reason.DEALING_REFUSED
    assert "other committee keys" in error.message


def test_a_share_of_another_member_or_dealer_does_not_open():
    world = World(context_of(5)).collect()
    member = world.members[world.committee.members[0]]
    other = shown_to(world.context, world.dealt["ward-002"], 2)
    assert "not for this member" in member.receive("ward-002", other, world.keys).message
    mixed = shown_to(world.context, world.dealt["ward-001"], member.position)
    mixed.share.CopyFrom(shown_to(world.context, world.dealt["ward-003"], member.position).share)
    assert "not the one it signed" in member.receive("ward-001", mixed, world.keys).message


def test_a_statement_of_one_client_does_not_pass_for_another():
    world = World(context_of(5)).collect()
    member = world.members[world.committee.members[0]]
    shown = shown_to(world.context, world.dealt["ward-002"], member.position)
    error = member.receive("ward-003", shown, world.keys)
    assert error.reason is Reason.SIGNATURE_REFUSED
    assert "signed by ward-002" in error.message


@pytest.mark.parametrize("weight", [0, 3])
def test_a_weight_beyond_the_agreed_one_is_refused_by_members(weight):
    world = World(context_of(5, most_weight=2**20))
    world.deal("ward-002", weight=1)
    dealing = read_dealing(world.context, world.dealt["ward-002"].dealing.content)
    dealing.weight = weight
    strict = context_of(5)
    refused_with(Reason.DEALING_REFUSED, read_dealing, strict, dealing.SerializeToString())


def test_no_server_names_a_scale_at_which_one_update_outweighs_the_others():
    """Without the rule a colluding client that states and sends 2^20 has nearly all of the sum."""
    world = World(context_of(5, most_weight=2**20)).collect()
    world.check()
    names, dealings = world.context.cohort, world.dealings
    for name in world.members:
        assert "outweigh" in refused_with(Reason.SET_REFUSED, world.members[name].certify, names)
    with patch("shelora.committee.certificate.MOST_OVER_MEAN", 2**30):
        content = ContributorSet.of(world.context, dealings).content
    forged = assemble(
        world.context, [signer(n).sign(StatementKind.SET, world.context, content) for n in world.members]
    )
    refused_with(Reason.SET_REFUSED, world.open, forged, [])


@pytest.mark.parametrize(("most", "accepted"), [(8, True), (9, False)])
def test_an_update_may_weigh_four_times_the_mean_of_its_set(most, accepted):
    context = context_of(5, most_weight=most)
    dealings = {name: (bytes(32), 2) for name in context.cohort}
    if accepted:
        ContributorSet.of(context, dealings)
    else:
        refused_with(Reason.SET_REFUSED, ContributorSet.of, context, dealings)


@pytest.mark.parametrize("reach", [1.0, 1.05])
def test_one_that_sends_more_than_the_bound_of_the_mean_spoils_the_round_and_moves_nothing(reach):
    """What is within looks like an honest sum: the mean is at its bound."""
    world = World(context_of(4, most_weight=1))
    liar, *honest = world.context.cohort
    for name in honest:
        world.deal(name, weight=1, values=0.0)
    with patch("shelora.additive.secret.VALUE_LIMIT", 10.0):
        world.deal(liar, weight=1, values=4 * reach)
    contributors = world.verdict(world.check()).contributors
    certificate = world.certify(contributors)
    opener = world.open(certificate, world.release(certificate)).sum_opener()
    if reach == 1.0:
        np.testing.assert_allclose(opener.open(world.total(contributors), world.shape), 4, atol=1e-4)
    else:
        refused_with(Reason.SUM_UNREADABLE, opener.open, world.total(contributors), world.shape)


def test_weights_bound_the_mean_and_not_the_number_of_updates():
    """Four updates of weight 1 of at most 2 sum to 2: what is between 2 and 4 no honest four send."""
    world = World(context_of(4))
    for name in world.context.cohort:
        world.deal(name, weight=1, values=0.75)
    contributors = world.verdict(world.check()).contributors
    certificate = world.certify(contributors)
    opener = world.open(certificate, world.release(certificate)).sum_opener()
    refused_with(Reason.SUM_UNREADABLE, opener.open, world.total(contributors), world.shape)


# --- members that lie


def answer_of(world, certificate, name, values):
    """A well-formed answer of that member with a content of its choice."""
    chosen = ContributorSet.read(world.context, certificate.content)
    position = world.members[name].position
    sealed = seal_answer(ANSWER_KEY, chosen.digest, position, encode_values(values), rng("nonce", name))
    message = pb.Answer(position=position, sealed=sealed).SerializeToString()
    return signer(name).sign(StatementKind.ANSWER, world.context, message)


def lying_answer(world, certificate, name):
    """One with random values."""
    return answer_of(world, certificate, name, uniform(rng("lie", name), world.context.shares))


@pytest.mark.parametrize(("size", "liars"), [(5, 1), (7, 1), (33, 3)])
def test_members_that_lie_in_their_answers_are_named_and_the_sum_is_right(size, liars):
    world = World(context_of(size)).collect()
    members = list(world.members)
    world.check()
    certificate = world.certify(world.context.cohort)
    answers = [lying_answer(world, certificate, name) for name in members[:liars]]
    answers += world.release(certificate, members[liars:])
    opened = world.open(certificate, answers)
    assert set(opened.liars) == set(members[:liars])
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))


@pytest.mark.parametrize(("size", "answering"), [(3, 3), (4, 3), (5, 4), (7, 5)])
def test_a_small_committee_tells_a_liar_by_one_answer_more_than_needed(size, answering):
    """Too few for decoding, but a wrong S is nothing like the sum of small secrets."""
    world = World(context_of(size)).collect()
    members = list(world.members)
    world.check()
    certificate = world.certify(world.context.cohort)
    answers = [
        lying_answer(world, certificate, members[0]),
        *world.release(certificate, members[1:answering]),
    ]
    opened = world.open(certificate, answers)
    assert opened.liars == (members[0],)
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))


def test_without_an_answer_to_spare_a_liar_is_noticed_but_not_named():
    world = World(context_of(5)).collect()
    members = list(world.members)
    world.check()
    certificate = world.certify(world.context.cohort)
    answers = [lying_answer(world, certificate, members[0]), *world.release(certificate, members[1:3])]
    message = refused_with(Reason.SUM_UNREADABLE, world.open, certificate, answers)
    assert "a member lied" in message


def test_a_liar_that_makes_a_second_honest_looking_sum_stops_the_round_and_forges_nothing():
    world = World(context_of(5)).collect()
    members = list(world.members)
    world.check()
    certificate = world.certify(world.context.cohort)
    sharing = PackedSharing(world.context.rule)
    secret_point = sharing.base_points[0]
    weight = int(interpolation((1, 2, 3), (secret_point,))[0, 0])  # of the liar among members 1, 2, 3
    honest = held_shares(world, members[0], world.context.cohort)
    lie = (honest + pow(weight, -1, PRIME)) % PRIME  # S + 1 with members 2 and 3
    answers = [
        answer_of(world, certificate, members[0], lie),
        *world.release(certificate, members[1:4]),
    ]
    message = refused_with(Reason.ANSWERS_REFUSED, world.open, certificate, answers)
    assert "cannot be told who lies" in message


def test_a_malformed_answer_counts_as_none_and_its_member_is_named():
    world = World(context_of(5)).collect()
    members = list(world.members)
    world.check()
    certificate = world.certify(world.context.cohort)
    bad = signer(members[0]).sign(
        StatementKind.ANSWER, world.context, pb.Answer(position=1, sealed=b"x").SerializeToString()
    )
    opened = world.open(certificate, [bad, *world.release(certificate, members[1:])])
    assert opened.liars == (members[0],)


def test_a_server_that_repeats_an_answer_makes_no_liar_of_its_member():
    world = World(context_of(5)).collect()
    world.check()
    certificate = world.certify(world.context.cohort)
    answers = world.release(certificate)
    assert world.open(certificate, [answers[0], *answers[:4]]).liars == ()
    members = list(world.members)
    both = [lying_answer(world, certificate, members[0]), *answers]
    refused_with(Reason.ANSWERS_REFUSED, world.open, certificate, both)  # more answers than members
    assert world.open(certificate, both[:5]).liars == (members[0],)


def test_one_hostile_member_evicts_at_most_one_honest_client():
    context = context_of(8)
    dealers = frozenset(context.cohort)
    for evil in range(len(dealers) + 1):
        refused = frozenset(sorted(dealers)[:evil])
        checks = {p: Checked(p, dealers, frozenset()) for p in range(2, 8)}
        checks[1] = Checked(1, dealers - refused, refused)
        verdict = judge(context, dealers, checks)
        assert len(dealers) - len(verdict.contributors) <= 1
        assert verdict.set_aside == ((1,) if evil > 1 else ())


def test_a_dealer_that_more_than_T_members_refuse_is_left_out_and_no_member_with_it():
    context = context_of(8)
    dealers = frozenset(context.cohort)
    bad = frozenset({"ward-004", "ward-005"})
    checks = {p: Checked(p, dealers - bad, bad) for p in range(1, 4)}
    checks |= {p: Checked(p, dealers, frozenset()) for p in range(4, 8)}
    verdict = judge(context, dealers, checks)
    assert set(verdict.left_out) == bad
    assert verdict.left_out["ward-004"] == (1, 2, 3)
    assert verdict.set_aside == ()


@pytest.mark.parametrize("cheated", [1, 2])
def test_dealers_that_cheat_the_same_few_members_are_out_themselves(cheated):
    """At most T members each, so that no dealer is refused by more than T; one cheated member is lost, two are not."""
    context = context_of(8)
    dealers = frozenset(context.cohort)
    bad = frozenset({"ward-004", "ward-005"})
    checks = {p: Checked(p, dealers - bad if p <= cheated else dealers, frozenset()) for p in range(1, 8)}
    verdict = judge(context, dealers, checks)
    if cheated == 1:
        assert verdict.set_aside == (1,)
        assert verdict.left_out == {}
    else:
        assert verdict.set_aside == ()
        assert set(verdict.left_out) == bad


def test_members_are_set_aside_only_while_a_quorum_remains():
    context = context_of(8)
    dealers = frozenset(context.cohort)
    refused = frozenset(sorted(dealers)[:4])
    checks = {p: Checked(p, dealers - refused if p == 1 else dealers, frozenset()) for p in range(1, 6)}
    verdict = judge(context, dealers, checks)  # five have checked, and five must sign
    assert verdict.set_aside == ()
    assert set(verdict.left_out) == refused


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_whoever_is_not_set_aside_holds_a_share_of_every_contributor(data):
    context = context_of(8)
    dealers = frozenset(data.draw(st.sets(st.sampled_from(context.cohort))))
    present = data.draw(st.sets(st.integers(1, 7), min_size=5))
    held = {
        p: frozenset(data.draw(st.sets(st.sampled_from(sorted(dealers))))) if dealers else dealers
        for p in present
    }
    verdict = judge(context, dealers, {p: Checked(p, held[p], frozenset()) for p in present})
    assert len(present) - len(verdict.set_aside) >= context.rule.quorum
    assert set(verdict.contributors) | set(verdict.left_out) == dealers
    for position in present - set(verdict.set_aside):
        assert set(verdict.contributors) <= held[position]


# --- servers that choose the committee


def test_a_committee_is_the_one_that_clients_compute():
    world = World(context_of(20))
    assert context_of(20, attempt=2).committee(b"k" * 32) == context_of(20).committee(b"k" * 32)
    assert context_of(20, round_number=2).committee(b"k" * 32) != context_of(20).committee(b"k" * 32)
    assert context_of(20).committee(b"other" * 6).members != world.committee.members


def test_keys_of_others_than_the_committee_are_left_out():
    world = World(context_of(8))
    stranger = next(n for n in world.context.cohort if world.committee.position(n) is None)
    fake = pb.CommitteeKey(position=1, public_key=bytes(31) + b"\x09").SerializeToString()
    statement = signer(stranger).sign(StatementKind.COMMITTEE_KEY, world.context, fake)
    keys = [m.key for m in world.members.values()]
    assert world.key_set([statement, *keys]).digest == world.keys.digest
    members = list(world.members)
    twice = signer(members[0]).sign(StatementKind.COMMITTEE_KEY, world.context, fake)
    assert set(world.key_set([twice, *keys]).keys) == set(range(2, 8))
    message = refused_with(Reason.COMMITTEE_REFUSED, world.key_set, keys[:4])
    assert members[-1] in message


def test_a_key_of_small_order_is_refused_by_the_dealer():
    world = World(context_of(3))
    keys = dict(world.keys.keys) | {1: bytes(32)}
    dealer = Dealer(world.context, KeySet(keys, world.keys.digest), signer("ward-001"), rng())
    refused_with(Reason.COMMITTEE_REFUSED, dealer.deal, [bytes(32)], 1)


def test_answers_and_signatures_of_others_count_for_nothing():
    world = World(context_of(8)).collect()
    world.check()
    certificate = world.certify(world.context.cohort)
    stranger = next(n for n in world.context.cohort if world.committee.position(n) is None)
    content = pb.Answer(position=1, sealed=bytes(64)).SerializeToString()
    foreign = signer(stranger).sign(StatementKind.ANSWER, world.context, content)
    forged = signer(world.committee.members[6]).sign(StatementKind.SET, world.context, content)
    answers = world.release(certificate, world.committee.members[:5])
    certificate.signatures[0].signature = b"garbage"
    opened = world.open(certificate, [foreign, forged, *answers])
    assert opened.liars == ()
    assert np.array_equal(opened.secret_sum, sum(world.secrets.values()))
    assert "0 members answered" in refused_with(Reason.ANSWERS_REFUSED, world.open, certificate, [foreign])
    for signature in certificate.signatures:
        signature.signature = b"garbage"
    assert "is not signed by it" in refused_with(Reason.QUORUM_MISSING, world.open, certificate, answers)


def test_a_client_that_was_not_asked_does_not_deal():
    world = World(context_of(5))
    refused_with(Reason.NOT_IN_COHORT, Dealer, world.context, world.keys, signer("ward-900"), rng())


def test_trust_of_the_worlds_clock():
    """The control of the certificate tests: what is refused elsewhere passes here."""
    world = World(context_of(3))
    for name, member in world.members.items():
        assert trust().author(member.key, StatementKind.COMMITTEE_KEY, world.context) == name
