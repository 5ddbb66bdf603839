"""Requests, answers and settings of the aggregation service, without Redis or gRPC."""

import inspect
import io
import math
import subprocess
import sys
import threading

import pytest

from services.aggregation.answers import read_answer, refused_line, stored_line
from services.aggregation.main import main
from services.aggregation.records import AggregationRequest, CommittedContribution, StoredResult
from services.aggregation.settings import AggregationSettings
from services.aggregation.worker import _lines_until_exit, _Updates, answer
from shelora.errors import DomainError, Reason
from shelora.transport.pieces import Digest


def request(weights=(0.1, 0.2, 0.7), scaling=1 / 3) -> AggregationRequest:
    parts = [
        CommittedContribution(client_id=f"client-{i:05}", sha256=bytes(32), weight=w, scaling=scaling)
        for i, w in enumerate(weights)
    ]
    return AggregationRequest("round-1", 2, tuple(parts))


def test_a_request_reads_back_to_the_bit():
    assert AggregationRequest.from_line(request().to_line()) == request()


def test_requests_that_differ_in_one_bit_have_other_digests():
    assert request().digest == request().digest
    assert request(scaling=math.nextafter(1 / 3, 1)).digest != request().digest


def test_the_weights_of_ten_thousand_clients_sum_to_one():
    assert len(request(weights=[1 / 10_000] * 10_000).contributions) == 10_000


@pytest.mark.parametrize("weights", [(0.5, 0.5 + 2e-9), (0.5, 0.4), (0.0, 1.0), (math.nan, 1.0), (-0.5, 1.5)])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(DomainError, check=lambda error: error.reason is Reason.INVALID_ARGUMENT):
        request(weights)


def test_an_answer_reads_back():
    result = StoredResult(Digest(b"x" * 32, 123), 0.1)
    assert read_answer(stored_line(result)) == result


def test_a_refusal_reads_back_with_its_reason():
    with pytest.raises(DomainError, match="which one") as caught:
        read_answer(refused_line(DomainError(Reason.SHARD_MISSING, "which one")))
    assert caught.value.reason is Reason.SHARD_MISSING


@pytest.mark.parametrize(
    ("failure", "reason"), [(MemoryError(), Reason.WORKER_FAILED), (ZeroDivisionError(), Reason.INTERNAL)]
)
def test_a_worker_answers_whatever_fails(failure, reason):
    class FailingStore:
        def layout(self, round_id):
            raise failure

    with pytest.raises(DomainError) as caught:
        read_answer(answer(FailingStore(), request().to_line()))
    assert caught.value.reason is reason


def test_a_worker_reads_again_only_what_it_has_no_room_to_keep(monkeypatch):
    reads = []

    class CountingStore:
        def update(self, slot, sha256):
            reads.append(slot.client_id)
            return bytes(10)

    monkeypatch.setattr("services.aggregation.worker.KEPT_BYTES", 25)
    updates = _Updates(CountingStore(), request())
    clients = ["client-00000", "client-00001", "client-00002"]
    assert all(updates.load(client) == bytes(10) for client in 2 * clients)
    assert reads == [*clients, "client-00002"]


def test_a_worker_leaves_when_its_input_ends():
    left = threading.Event()
    lines = _lines_until_exit(io.BytesIO(b"one\ntwo\n"), lambda code: left.set())
    assert (lines.get(), lines.get()) == (b"one\n", b"two\n")
    assert left.wait(10)


@pytest.fixture
def member(monkeypatch):
    """What every server that is a member needs."""
    monkeypatch.setenv("SHELORA_AGGREGATION_IDENTITY", "identity")
    monkeypatch.setenv("SHELORA_AGGREGATION_KEY_AUTHORITY_ADDRESS", "127.0.0.1:7102")


@pytest.mark.usefixtures("member")
def test_settings_come_from_the_environment_and_flags_win(monkeypatch):
    monkeypatch.setenv("SHELORA_AGGREGATION_WORKERS", "3")
    monkeypatch.setenv("SHELORA_AGGREGATION_JOB_TIMEOUT_S", "5")
    monkeypatch.setenv("SHELORA_AGGREGATION_REDIS_URL", "redis://:hunter2@host:1/0")
    settings = AggregationSettings.load(workers=4)
    assert settings.pool_limits.workers == 4
    assert settings.pool_limits.job_timeout_s == 5
    assert "hunter2" not in repr(settings)
    assert settings.worker_environment["SHELORA_AGGREGATION_REDIS_URL"] == "redis://:hunter2@host:1/0"


@pytest.mark.usefixtures("member")
def test_a_flag_gives_the_redis_url():
    settings = AggregationSettings.load(redis_url="redis://host:1/0")
    assert settings.redis_url.get_secret_value() == "redis://host:1/0"


def test_every_setting_is_a_flag():
    parameters = set(inspect.signature(main).parameters)
    assert parameters - {"version"} == set(AggregationSettings.model_fields)


def test_a_refused_setting_is_named():
    with pytest.raises(DomainError, match="SHELORA_AGGREGATION_WORKERS"):
        AggregationSettings.load(workers=0)


@pytest.mark.parametrize("module", ["services.aggregation.main", "services.aggregation.worker"])
def test_a_process_imports_nothing_that_can_hold_a_secret_key(module):
    program = (
        f"import sys, {module}\n"
        "held = {'shelora.ckks.secret', 'shelora.obfuscation', 'shelora.lora.restore', 'torch'} & set(sys.modules)\n"
        "assert not held, held"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
