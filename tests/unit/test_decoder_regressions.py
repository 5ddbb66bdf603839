"""What fuzzing found: each of these ended in an exception without a reason, or in memory without a bound."""

import tracemalloc

import pytest

from client_agent.state import AgentState, PlanFit
from coordinator.records import MemberRecord
from services.aggregation.answers import read_answer
from services.aggregation.records import AggregationRequest
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from tests.fuzz.decoders import DECODERS


def reason_of(call, *arguments):
    with pytest.raises(DomainError) as caught:
        call(*arguments)
    return caught.value.reason


@pytest.mark.parametrize(
    "content",
    ["[" * 600, "name: 2001-99-99", "name: 0x_", f"name: {'9' * 5000}"],
    ids=["deep", "no such day", "no digits", "too many digits"],
)
def test_yaml_whose_values_python_refuses_is_not_valid_yaml(tmp_path, content):
    path = tmp_path / "federation.yaml"
    path.write_text(content)
    with pytest.raises(DomainError, match="is not valid YAML"):
        FederationSpec.from_yaml(path)


def test_yaml_whose_anchors_stand_for_gigabytes_is_refused_in_little_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path = tmp_path / "federation.yaml"
    path.write_text("\n".join(lines))
    tracemalloc.start()
    try:
        assert reason_of(FederationSpec.from_yaml, path) is Reason.CONFIGURATION_INVALID
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_an_identity_whose_key_is_encrypted_is_damaged():
    *_, encrypted = DECODERS["identity-file"].seeds()
    assert b"ENCRYPTED" in encrypted
    assert DECODERS["identity-file"].attempt(encrypted) is Reason.CONFIGURATION_INVALID


def test_weights_without_one_of_their_factors_count_as_absent():
    decoder = DECODERS["weights-file"]
    (whole,) = decoder.seeds()
    assert decoder.decode(whole) is not None
    assert decoder.decode(whole.replace(b'"B/q"', b'"C/q"')) is None


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "0.5", "-1"])
def test_a_plan_fit_that_no_vote_can_have_is_that_of_a_new_client(tmp_path, weight):
    state = AgentState(tmp_path / "state")
    content = f'{{"format": 1, "vote_round_id": "v", "weight": {weight}, "fresh_overlap": 0.5}}'
    (tmp_path / "state" / "plan_fit.json").write_text(content)
    assert state.plan_fit() == PlanFit()
    state.close()


@pytest.mark.parametrize("line", [b"", b"{}\n", b"[]\n", b'{"reason":"NO_SUCH"}\n', b"[" * 100_000])
def test_what_is_no_answer_of_a_worker_is_the_worker_s_failure(line):
    assert reason_of(read_answer, line) is Reason.WORKER_FAILED


@pytest.mark.parametrize("line", [b"", b"{}\n", b"7\n", b'{"contributions":[1]}\n'])
def test_what_is_no_job_is_refused_as_an_argument(line):
    assert reason_of(AggregationRequest.from_line, line) is Reason.INVALID_ARGUMENT


def test_a_record_of_a_format_to_come_waits_for_a_release_that_reads_it():
    content = MemberRecord(client_id="a", rank=4, budget=0.5, example_count=3).model_dump_json()
    assert MemberRecord.read(content).client_id == "a"
    assert (
        reason_of(MemberRecord.read, content.replace('"format":1', '"format":2')) is Reason.RECORD_UNREADABLE
    )
