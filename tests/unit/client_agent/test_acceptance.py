"""What a client accepts of a federation, whatever servers say."""

import itertools

import pytest

from client_agent.acceptance import least_accepted, require_level
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec
from shelora.levels import Level

LEVELS = list(Level)


def accepted(offered, written=None, promises=()) -> bool:
    try:
        require_level(offered, written, promises)
    except DomainError as error:
        return error.reason is not Reason.PROTECTION_REFUSED
    return True


def test_levels_are_ordered_from_the_weakest():
    assert LEVELS == [Level.NONE, Level.SELECTIVE_OPE, Level.SELECTIVE, Level.COMPLETE]
    assert [level.strength for level in LEVELS] == [0, 1, 2, 3]


def test_every_federation_has_a_level():
    for mode, negotiation in itertools.product(("none", "selective"), ("sealed", "ope")):
        assert ProtectionSpec(mode=mode, negotiation=negotiation).level in set(Level)
    assert ProtectionSpec(mode="none", negotiation="ope").level is Level.NONE
    for by_ballots in ("ope", "ope-refined"):
        assert ProtectionSpec(mode="selective", negotiation=by_ballots).level is Level.SELECTIVE_OPE


@pytest.mark.parametrize(("promised", "remembered"), list(itertools.product([None, *LEVELS], repeat=2)))
def test_no_less_than_promised_or_remembered_is_accepted_and_never_none(promised, remembered):
    least = least_accepted((promised, remembered))
    assert least is not Level.NONE
    for offered in LEVELS:
        strong = all(offered.strength >= p.strength for p in (promised, remembered) if p)
        assert accepted(offered, None, (promised, remembered)) == (strong and offered is not Level.NONE)


@pytest.mark.parametrize("offered", LEVELS)
def test_what_the_owner_wrote_is_accepted_and_nothing_else(offered):
    assert accepted(offered, (offered,), (Level.COMPLETE,))
    others = tuple(level for level in LEVELS if level is not offered)
    assert not accepted(offered, others)


def test_a_refusal_names_both_levels_and_what_to_write():
    with pytest.raises(DomainError) as refused:
        require_level(Level.NONE, None, (Level.SELECTIVE,))
    assert "offers none protection, and this client was promised selective" in refused.value.message
    assert "protection.accept: [none]" in refused.value.message
    with pytest.raises(DomainError, match=r"protection\.accept lists selective, complete"):
        require_level(Level.NONE, (Level.SELECTIVE, Level.COMPLETE), ())
