"""Who signed: certificates, kinds, contexts."""

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from services.key_authority.ca import _new_root as new_root
from shelora.committee.statements import Signer, StatementKind, Trust
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import holder, new_key
from shelora.transport.identity import Role
from tests.unit.committee.rounds import FEDERATION, NOW, certificate_of, context_of, root, trust

CONTEXT = context_of(3)


def statement(name="ward-001", context=CONTEXT, kind=StatementKind.CHECK, **certified):
    key = new_key()
    return Signer(name, key, certificate_of(name, key, **certified)).sign(kind, context, b"content")


def message_of(signed, kind=StatementKind.CHECK, context=CONTEXT, at=NOW):
    with pytest.raises(DomainError) as error:
        trust(at).author(signed, kind, context)
    assert error.value.reason is Reason.SIGNATURE_REFUSED
    return error.value.message


def test_the_author_of_a_genuine_statement_is_named():
    assert trust().author(statement(), StatementKind.CHECK, CONTEXT) == "ward-001"


def test_a_statement_of_another_kind_or_round_is_refused():
    assert "ward-001" in message_of(statement(kind=StatementKind.SET))
    assert "ward-001" in message_of(statement(context=context_of(3, attempt=2)))
    assert "ward-001" in message_of(statement(context=context_of(3, min_updates=3)))


@pytest.mark.parametrize("field", ["content", "signature", "certificate"])
def test_a_damaged_statement_is_refused(field):
    signed = statement()
    value = bytearray(getattr(signed, field))
    value[len(value) // 2] ^= 1
    setattr(signed, field, bytes(value))
    message_of(signed)


def test_a_certificate_of_another_authority_federation_or_role_is_refused():
    assert "authority" in message_of(statement(authority=new_root()))
    assert "not a client of this federation" in message_of(statement(federation="other"))
    assert "the aggregation" in message_of(statement(role=Role.AGGREGATION))


def test_a_certificate_is_held_against_the_clock():
    assert "not valid now" in message_of(statement(), at=NOW + timedelta(hours=25))
    assert "not valid now" in message_of(statement(), at=NOW - timedelta(hours=1))


def test_a_reader_that_comes_late_may_take_an_expired_certificate():
    late = NOW + timedelta(hours=30)
    assert "not valid now" in message_of(statement(), at=late)
    patient = Trust(root().der, FEDERATION, lambda: late, grace=timedelta(days=1))
    assert patient.author(statement(), StatementKind.CHECK, CONTEXT) == "ward-001"


def test_the_authoritys_own_certificate_names_no_client():
    signed = statement()
    signed.certificate = root().der
    message_of(signed)


def test_the_key_of_a_certificate_is_the_one_that_signs():
    key = new_key()
    other = Signer("ward-001", new_key(), certificate_of("ward-001", key))
    message_of(other.sign(StatementKind.CHECK, CONTEXT, b"content"))
    found = holder(certificate_of("ward-001", key), root().der)
    assert found.key == key.public_key()
    assert isinstance(found.key, ec.EllipticCurvePublicKey)


@pytest.mark.parametrize(("field", "size"), [("content", 65537), ("signature", 81), ("certificate", 4097)])
def test_what_is_larger_than_any_statement_is_refused_unread(field, size):
    signed = statement()
    setattr(signed, field, bytes(size))
    assert "larger" in message_of(signed)
