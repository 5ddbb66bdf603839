"""What a server cannot talk an agent into."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client_agent.keys import EpochSecrets
from client_agent.model import AdaptedModel
from client_agent.protection import check_vote_layout, round_context
from client_agent.session import is_fatal
from shelora.ckks.parameters import profile
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec
from shelora.lora.layout import Layout, Matrix, build_layout
from shelora.negotiation.plan import Plan, make_plan
from shelora.negotiation.votes import vote_layout
from shelora.strategies.agents.she_lora import PLAIN, SHE_LORA
from shelora.v1 import key_authority_pb2

PROTECTION = ProtectionSpec()
KEY_ID = b"k" * 16


def plan_of(model: AdaptedModel) -> Plan:
    rng = np.random.default_rng(1)
    return make_plan({m.name: rng.random(m.in_features) for m in model.matrices}, model.matrices, (0.25, 1.0))


def layout_of(model: AdaptedModel, plan: Plan, **changes: Any) -> Layout:
    fields = {
        "parameters": "standard",
        "key_id": KEY_ID,
        "matrices": plan.matrices_with_counts(model.matrices),
        "tensors": [replace(t, bound=PROTECTION.tensor_bound) for t in model.tensors],
        "tiers": plan.tiers,
        "encrypt_tensors": True,
        "max_rank": 8,
        "max_directions": 16,
        "clear_bits": PROTECTION.clear_bits,
    }
    return build_layout(**(fields | changes))


def secrets_of(key: SecretKey, **changes: Any) -> key_authority_pb2.GetEpochSecretsResponse:
    fields = {
        "parameters": "standard",
        "ckks_secret_key": key.to_bytes(),
        "obfuscation_secret": bytes(32),
        "key_id": key.key_id,
    }
    return key_authority_pb2.GetEpochSecretsResponse(**(fields | changes))


def test_a_layout_under_the_plan_is_accepted(model: AdaptedModel) -> None:
    plan = plan_of(model)
    SHE_LORA.check(layout_of(model, plan), model, PROTECTION, plan, 1.0)


def test_clear_parts_in_more_bits_than_promised_are_refused(model: AdaptedModel) -> None:
    plan = plan_of(model)
    with pytest.raises(DomainError, match="clear parts in 32 bits, and the federation promised 16") as caught:
        SHE_LORA.check(layout_of(model, plan, clear_bits=32), model, PROTECTION, plan, 1.0)
    assert caught.value.reason is Reason.PROTECTION_REFUSED
    published = PROTECTION.model_copy(update={"clear_bits": 32})
    SHE_LORA.check(layout_of(model, plan), model, published, plan, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": "large"}, "another CKKS profile"),
        ({"tensors": []}, "other tensors"),
        ({"max_rank": 2}, "its largest rank is 2, this client's is 4"),
    ],
)
def test_a_layout_of_another_model_or_profile_is_refused(
    model: AdaptedModel, changes: dict[str, Any], said: str
) -> None:
    plan = plan_of(model)
    with pytest.raises(DomainError, match=said) as caught:
        SHE_LORA.check(layout_of(model, plan, **changes), model, PROTECTION, plan, 1.0)
    assert caught.value.reason is Reason.LAYOUT_MISMATCH


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encrypt_tensors": False}, "tensors in the clear"),
        ({"tiers": (0.001, 0.002)}, "0.002 of the columns"),
    ],
)
def test_a_layout_that_protects_less_is_refused_for_good(
    model: AdaptedModel, changes: dict[str, Any], said: str
) -> None:
    plan = plan_of(model)
    with pytest.raises(DomainError, match=said) as caught:
        SHE_LORA.check(layout_of(model, plan, **changes), model, PROTECTION, plan, 1.0)
    assert caught.value.reason is Reason.PROTECTION_REFUSED
    assert is_fatal(caught.value)


def test_a_layout_of_other_matrices_is_refused(model: AdaptedModel) -> None:
    plan = plan_of(model)
    matrices = [replace(m, name=f"{m.name}.x") for m in plan.matrices_with_counts(model.matrices)]
    with pytest.raises(DomainError, match="other matrices"):
        SHE_LORA.check(layout_of(model, plan, matrices=matrices), model, PROTECTION, plan, 1.0)


def test_a_layout_that_leaves_the_plan_out_is_refused(model: AdaptedModel) -> None:
    bare = layout_of(model, plan_of(model), matrices=model.matrices, tiers=())
    with pytest.raises(DomainError, match="the round has 0 of the columns encrypted at most"):
        SHE_LORA.check(bare, model, PROTECTION, None, 1.0)
    SHE_LORA.check(bare, model, PROTECTION, None, 0.0)


def test_a_layout_with_other_column_counts_than_the_plan_is_refused(model: AdaptedModel) -> None:
    plan = plan_of(model)
    other = make_plan(
        {m.name: np.arange(32.0) + i for i, m in enumerate(model.matrices)}, model.matrices, plan.tiers
    )
    with pytest.raises(DomainError) as caught:
        SHE_LORA.check(layout_of(model, other), model, PROTECTION, plan, 1.0)
    assert caught.value.reason is Reason.PLAN_REFUSED


def test_votes_are_cast_only_in_their_own_layout(model: AdaptedModel) -> None:
    right = vote_layout(model.matrices, "standard", KEY_ID)
    check_vote_layout(right, model, PROTECTION)
    other = vote_layout([Matrix("x", 4, 4)], "standard", KEY_ID)
    for wrong in (replace(right, encrypt_tensors=False), replace(right, parameters="large"), other):
        with pytest.raises(DomainError) as caught:
            check_vote_layout(wrong, model, PROTECTION)
        assert caught.value.reason is Reason.LAYOUT_MISMATCH


def test_columns_are_in_secret_order_whenever_there_is_a_secret(model: AdaptedModel) -> None:
    key = SecretKey.generate(profile("standard"))
    secrets = EpochSecrets.from_proto(1, secrets_of(key))
    bare = layout_of(model, plan_of(model), matrices=model.matrices, tiers=(), tensors=[])
    assert not bare.encrypts
    name = model.matrices[0].name
    assert list(SHE_LORA.orders(bare, round_context(model, bare, None, 0.0, secrets))[name]) != list(
        range(32)
    )
    unprotected = round_context(model, bare, None, 0.0, EpochSecrets.unprotected("films", 1))
    assert list(PLAIN.orders(bare, unprotected)[name]) == list(range(32))


def test_secrets_open_only_layouts_under_their_own_key(model: AdaptedModel) -> None:
    key = SecretKey.generate(profile("standard"))
    secrets = EpochSecrets.from_proto(1, secrets_of(key))
    plan = plan_of(model)
    assert secrets.encryptor_for(layout_of(model, plan, key_id=key.key_id)) is secrets.encryptor
    for use in (
        secrets.encryptor_for,
        secrets.decryptor_for,
        EpochSecrets.unprotected("films", 1).encryptor_for,
    ):
        with pytest.raises(DomainError) as caught:
            use(layout_of(model, plan))
        assert caught.value.reason is Reason.SECRET_UNAVAILABLE


def test_a_key_other_than_announced_is_refused() -> None:
    key = SecretKey.generate(profile("standard"))
    with pytest.raises(DomainError) as caught:
        EpochSecrets.from_proto(1, secrets_of(key, key_id=b"x" * 16))
    assert caught.value.reason is Reason.SECRET_UNAVAILABLE


def test_secrets_do_not_show_in_a_repr() -> None:
    key = SecretKey.generate(profile("standard"))
    secret = b"\xaa" * 32
    shown = repr(EpochSecrets.from_proto(1, secrets_of(key, obfuscation_secret=secret)))
    for encoded in (repr(secret)[2:-1], secret.hex()):
        assert encoded not in shown
