from pathlib import Path

import pytest

from client_agent import conditions, doctor
from client_agent.conditions import CpuTimes
from client_agent.config import AgentConfig, ResourcesConfig
from client_agent.doctor import (
    CheckResult,
    Finding,
    check_certificate,
    check_conditions,
    check_learning,
    check_tenseal,
    examine,
    failed,
    judged_clock,
    judged_disk,
    judged_fit,
    judged_memory,
    judged_time,
)
from client_agent.footprint import Blueprint, Setting
from client_agent.memory import Memory
from shelora.ckks import secret
from shelora.federation import FederationSpec
from tests.unit.client_agent.tiny import LABELS


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    (tmp_path / "agent.yaml").write_text(
        "federation: weather\nclient_id: a\ncoordinator: 127.0.0.1:1\naggregation: ['127.0.0.1:1']\n"
        "key_authority: 127.0.0.1:1\nstate_dir: state\nmodel: {path: nowhere}\ndata: {train: none.jsonl}\n"
    )
    return AgentConfig.load(tmp_path / "agent.yaml", {})


async def test_without_a_certificate_what_needs_one_is_skipped_and_the_remedy_is_named(config):
    told: list[str] = []
    findings = {finding.check: finding for finding in await examine(config, told.append)}
    assert findings["certificate"].verdict is CheckResult.FAILED
    assert "client-agent enroll" in findings["certificate"].remedy
    assert findings["network"].verdict is CheckResult.SKIPPED
    assert findings["data and model"].verdict is CheckResult.SKIPPED
    assert findings["TenSEAL"].verdict is CheckResult.OK
    assert told == ["certificate", "power and load", "TenSEAL", "data and model"]
    assert failed(list(findings.values()))


def test_a_certificate_of_another_client_is_named(config):
    finding, credentials = check_certificate(config)
    assert (finding.verdict, credentials) == (CheckResult.FAILED, None)


def test_others_that_use_the_cpu_are_seen_because_it_is_measured_first(config, monkeypatch):
    times = iter([CpuTimes(0, 0, 0), CpuTimes(100, 90, 0)])
    monkeypatch.setattr(conditions, "cpu_times", lambda: next(times))
    busy = config.model_copy(update={"resources": ResourcesConfig(max_other_cpu=0.3)})
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        monkeypatch.setattr(conditions, "SAMPLE_S", 0.0)  # so long has passed

    (finding,) = check_conditions(busy, wait)
    assert waited == [5.0]
    assert finding.verdict is CheckResult.WARNING
    assert "90%" in finding.seen


def test_data_that_run_would_refuse_is_found_by_the_doctor_too(agent_folder):
    spec = FederationSpec.model_validate(
        {"name": "films", "training": {"base_model": "tiny", "labels": LABELS}}
    )
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    found = {finding.check: finding for finding in check_learning(config, spec)}
    assert found["data"].seen == "20 examples, 0 of them cut to 64 tokens"
    assert found["model"].verdict is CheckResult.OK
    config.data.train.write_text('{"text": "a", "label": "good"}\n{"text": null, "label": "bad"}\n')
    finding = check_learning(config, spec)[-1]
    assert finding.verdict is CheckResult.FAILED
    assert finding.seen.endswith("train.jsonl, line 2: 'text' is null")


def test_a_tenseal_that_computes_wrongly_is_found(monkeypatch):
    right = secret.Decryptor.decrypt
    monkeypatch.setattr(secret.Decryptor, "decrypt", lambda *args: right(*args) + 0.1)
    (finding,) = check_tenseal()
    assert finding.verdict is CheckResult.FAILED
    assert "reinstall" in finding.remedy


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "words"),
    [
        (0.4, CheckResult.OK, "0.4 s ahead"),
        (-30, CheckResult.WARNING, "30.0 s behind"),
        (-4000, CheckResult.FAILED, "4000.0 s behind"),
        (4000, CheckResult.FAILED, "ahead"),
    ],
)
def test_a_clock_that_is_off_is_found(ahead_s, verdict, words):
    finding = judged_clock(ahead_s)
    assert finding.verdict is verdict
    assert words in finding.seen
    assert bool(finding.remedy) == (verdict is not CheckResult.OK)


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (judged_memory(10**9, 8 * 10**9), CheckResult.OK),
        (judged_memory(7 * 10**9, 8 * 10**9), CheckResult.WARNING),
        (judged_time(100, 300), CheckResult.OK),
        (judged_time(200, 300), CheckResult.WARNING),
        (judged_time(400, 300), CheckResult.FAILED),
        (judged_disk(10**6, 10**9, Path("/state")), CheckResult.OK),
        (judged_disk(10**9, 10**6, Path("/state")), CheckResult.FAILED),
    ],
)
def test_what_a_device_lacks_is_found_with_a_remedy(finding: Finding, verdict: CheckResult):
    assert finding.verdict is verdict
    assert bool(finding.remedy) == (verdict is not CheckResult.OK)


SIZES = Blueprint(
    linear=10**9, other=10**8, whole=0, factors=10**6, kept=2 * 10**8, layer=10**6, layers=10, logits=0
)
NOW = Setting(dtype="float32", quantization="none", checkpointing=False, micro_batch=8)


def test_what_does_not_fit_is_told_with_the_settings_that_would():
    needed = SIZES.needed(NOW)
    assert judged_fit(SIZES, NOW, 2 * needed).verdict is CheckResult.OK
    assert judged_fit(SIZES, NOW, int(1.2 * needed)).verdict is CheckResult.WARNING
    finding = judged_fit(SIZES, NOW, int(0.9 * needed))
    assert finding.verdict is CheckResult.FAILED
    assert (
        "set model.dtype bfloat16, training.gradient_checkpointing, resources.micro_batch 1" in finding.remedy
    )
    assert "4bit" in finding.remedy
    finding = judged_fit(SIZES, NOW, int(1.1 * needed), private=True)
    assert finding.remedy.startswith("set model.dtype float32, resources.micro_batch 1")
    assert "no setting fits" in judged_fit(SIZES, NOW, 10**8).remedy


def test_a_model_that_does_not_fit_is_not_loaded(agent_folder, monkeypatch):
    spec = FederationSpec.model_validate(
        {"name": "films", "training": {"base_model": "tiny", "labels": LABELS}}
    )
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    monkeypatch.setattr(doctor, "free_memory", lambda _device: Memory(total=10**5, free=10**5))
    monkeypatch.setattr(doctor, "inspect", None)
    (finding,) = check_learning(config, spec)
    assert (finding.check, finding.verdict) == ("memory, estimated", CheckResult.FAILED)
