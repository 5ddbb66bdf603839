"""Client privacy around the arithmetic: what is promised, who holds it, what is counted and refused."""

import json
from types import SimpleNamespace

import pytest

from client_agent.acceptance import require_hidden
from client_agent.config import AgentConfig, HiddenClient
from client_agent.state import AgentState
from client_agent.sum_budget import LEDGER, SumBudget
from coordinator.decisions import most_weight
from shelora.accounting import epsilon_of
from shelora.errors import DomainError, Reason
from shelora.federation import ClientPrivacySpec, FederationSpec
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import client_privacy

PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "clip": 0.5}


def spec(privacy=PRIVACY, mode="complete", **rules) -> FederationSpec:
    return FederationSpec.model_validate(
        {
            "name": "clinic",
            "training": {"base_model": "tiny", "labels": ["a", "b"]},
            "round": {"rounds": 6, "clients": 5, "min_updates": 4, **rules},
            "protection": {"mode": mode, "client_privacy": privacy},
        }
    )


def promised(**changed) -> ClientPrivacySpec:
    found = spec({**PRIVACY, **changed}).protection.client_privacy
    assert found is not None
    return found


def test_the_noise_follows_from_epsilon_the_rounds_and_who_is_counted_on():
    privacy, noise = promised(), spec().protection.noise
    assert (privacy.sums, privacy.updates, privacy.tolerated) == (6, 4, 1)
    assert 7.9 < privacy.promised <= 8
    assert noise is not None
    assert (noise.honest, noise.clip, noise.multiplier) == (3, 0.5, privacy.multiplier)
    assert privacy.multiplier < promised(sums=12).multiplier
    assert privacy.promised_replaced > 2 * privacy.promised
    given = promised(epsilon=None, noise_multiplier=2.0)
    assert given.promised == pytest.approx(epsilon_of([2.0] * 6, 1e-5))
    assert (
        FederationSpec.model_validate(
            {"name": "a", "training": {"base_model": "b", "labels": ["x", "y"]}}
        ).protection.noise
        is None
    )


def test_what_is_promised_crosses_the_wire_and_stays_when_the_rounds_do_not():
    sent = spec().to_proto()
    assert FederationSpec.from_proto(pb.FederationSpec.FromString(sent.SerializeToString())) == spec()
    stored = FederationSpec.model_validate_json(spec().model_dump_json())
    assert stored == spec()
    sent.round.rounds = 5  # stopped
    assert FederationSpec.from_proto(sent).protection.noise == spec().protection.noise
    sent.round.rounds = 7  # by a server that adds rounds
    with pytest.raises(DomainError, match="6 sums"):
        FederationSpec.from_proto(sent)


@pytest.mark.parametrize(
    ("privacy", "mode", "why"),
    [
        ({"delta": 1e-5, "clip": 0.5}, "complete", "exactly one of epsilon"),
        ({**PRIVACY, "noise_multiplier": 1.0}, "complete", "exactly one of epsilon"),
        ({"epsilon": 8.0, "clip": 0.5}, "complete", "client_privacy.delta"),
        ({"epsilon": 8.0, "delta": 1e-5}, "complete", "client_privacy.clip"),
        ({**PRIVACY, "epsilon": 0.0}, "complete", "client_privacy.epsilon"),
        ({**PRIVACY, "epsilon": 1e-4}, "complete", "cannot be kept for 6 sums"),
        ({**PRIVACY, "delta": 1.0}, "complete", "client_privacy.delta"),
        ({**PRIVACY, "clip": 0.0}, "complete", "client_privacy.clip"),
        ({**PRIVACY, "clip": 1e-9}, "complete", "raise clip, or lower protection.tensor_bound"),
        ({**PRIVACY, "tolerated": 0}, "complete", "client_privacy.tolerated"),
        ({**PRIVACY, "tolerated": 4}, "complete", "leaves no noise to count on"),
        ({**PRIVACY, "sums": 5}, "complete", "raise sums"),
        ({**PRIVACY, "updates": 3}, "complete", "of at least 3 updates"),
        (PRIVACY, "selective", "protection.mode: complete"),
        (PRIVACY, "none", "protection.mode: complete"),
    ],
)
def test_what_promises_nothing_clear_is_refused_with_a_remedy(tmp_path, privacy, mode, why):
    path = tmp_path / "federation.yaml"
    content = {
        "name": "clinic",
        "training": {"base_model": "tiny", "labels": ["a", "b"]},
        "round": {"rounds": 6, "clients": 5, "min_updates": 4},
        "protection": {"mode": mode, "client_privacy": privacy},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(DomainError) as refused:
        FederationSpec.from_yaml(path)
    assert why in refused.value.message


def test_the_operator_reads_what_the_specification_promises():
    told = client_privacy(spec().to_proto())
    assert "epsilon 8 at delta 1e-05" in told
    assert "at most 6 sums" in told
    assert "1 colluding member of a sum's 4 or more" in told
    assert client_privacy(spec(None).to_proto()) == ""
    strange = spec().to_proto()
    strange.protection.client_privacy.clip = -1
    assert "does not know" in client_privacy(strange)


def test_all_clients_weigh_alike_and_without_client_privacy_they_do_not():
    hidden, plain = (SimpleNamespace(spec=s) for s in (spec(), spec(None)))
    assert most_weight([20, 1000, 50, 30, 40], hidden) == 1
    assert most_weight([20, 1000, 50, 30, 40], plain) > 1


HIDDEN = HiddenClient(epsilon=8.0, delta=1e-5)


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        (HIDDEN, True),
        (HiddenClient(epsilon=3.0, delta=1e-6, tolerated=2), True),
        (HiddenClient(epsilon=8.1, delta=1e-5), False),
        (HiddenClient(epsilon=8.0, delta=1e-4), False),
        (None, False),
    ],
)
def test_a_server_cannot_promise_less_later_or_than_the_owner_wrote(offered, taken):
    for written, known in ((HIDDEN, None), (None, HIDDEN), (HIDDEN, HiddenClient(epsilon=1.0, delta=1e-9))):
        if taken:
            require_hidden(offered, written, known)
            continue
        with pytest.raises(DomainError, match=r"epsilon 8 at delta 1e-05") as refused:
            require_hidden(offered, written, known)
        assert refused.value.reason is Reason.PROTECTION_REFUSED
    require_hidden(offered, None, None)


def test_more_tolerated_clients_are_not_fewer():
    with pytest.raises(DomainError, match="2 clients tolerated"):
        require_hidden(HIDDEN, HiddenClient(epsilon=8.0, delta=1e-5, tolerated=2), None)


def test_what_it_first_took_part_under_is_remembered(tmp_path):
    state = AgentState(tmp_path)
    assert state.hidden() is None
    state.save_hidden(HIDDEN)
    state.save_hidden(HiddenClient(epsilon=1000.0, delta=0.5))
    assert state.hidden() == HIDDEN
    (tmp_path / "client-privacy.json").write_text("{}")
    with pytest.raises(DomainError, match="damaged"):
        state.hidden()
    state.close()


def test_the_owner_may_write_what_is_accepted(tmp_path):
    (tmp_path / "agent.yaml").write_text(
        json.dumps(
            {
                "federation": "clinic",
                "client_id": "ward",
                "coordinator": "localhost:1",
                "aggregation": ["localhost:2"],
                "key_authority": "localhost:3",
                "state_dir": "state",
                "model": {"path": "m"},
                "data": {"train": "t.jsonl"},
                "protection": {"client_privacy": {"epsilon": 8, "delta": 1e-5}},
            }
        )
    )
    assert AgentConfig.load(tmp_path / "agent.yaml", {}).protection.client_privacy == HIDDEN
    with pytest.raises(DomainError, match="epsilon"):
        AgentConfig.load(tmp_path / "agent.yaml", {"SHELORA_AGENT__PROTECTION__CLIENT_PRIVACY__EPSILON": "0"})


def test_a_client_is_in_as_many_sums_as_were_planned_whatever_servers_say(tmp_path):
    budget = SumBudget(tmp_path, promised())
    for number in range(1, 7):
        budget.require("00000001", number)
        budget.take("00000001", number)
    assert budget.spent() == pytest.approx(promised().promised)
    budget.take("00000001", 6)  # another attempt at the same sum: one set is certified for it
    again = SumBudget(tmp_path, promised())  # after a restart
    for instance in ("00000001", "00000002"):  # a federation made anew counts, too
        with pytest.raises(DomainError, match="was in 6 sums") as refused:
            again.require(instance, 7)
        assert refused.value.reason is Reason.PRIVACY_EXHAUSTED
    with pytest.raises(DomainError):
        again.take("00000001", 7)
    assert len(json.loads((tmp_path / LEDGER).read_text())["sums"]) == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "sums": {}}',
        '{"format": 1, "sums": {"a/1": -1}}',
        '{"format": 1, "sums": [1]}',
    ],
)
def test_a_damaged_ledger_is_refused_not_begun_anew(tmp_path, content):
    (tmp_path / LEDGER).write_text(content)
    with pytest.raises(DomainError, match="what sums have told of this client") as refused:
        SumBudget(tmp_path, promised()).require("00000001", 1)
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
