"""`client-agent doctor`: does this device have what the agent needs, and what to mend if not.

Every check is done for real, on this device: it calls the servers, reads the data, trains one step of the federation's
kind, encrypts. Nothing is sent.
"""

import asyncio
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.text import Text

from client_agent.conditions import SAMPLE_S, Conditions
from client_agent.config import AgentConfig
from client_agent.footprint import Blueprint, Setting, alternatives, blueprint, free_memory, setting_of
from client_agent.inspection import Inspection, inspect
from client_agent.learner import budget_of
from client_agent.memory import MOMENT_SIZES, memory_here
from client_agent.model import choose_device
from client_agent.session import Session
from client_agent.training import TrainingRun, train
from shelora.ckks.parameters import profile
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError
from shelora.federation import FederationSpec, TrainingSpec
from shelora.terminal import Records
from shelora.transport.channel import is_transient, open_channel
from shelora.transport.proxy import named
from shelora.transport.status import distrusts, error_from_rpc
from shelora.transport.tls import Credentials

CONNECT_S: Final = 10.0
"""Seconds a server has to answer."""
CLOCK_WARNING_S: Final = 5.0
CLOCK_FAILURE_S: Final = 120.0
"""A clock that is off by more soon takes valid certificates for expired ones, or for not valid yet."""
MEMORY_SHARE: Final = 0.75
"""Share of the device's memory above which its service is held back, and soon killed (MemoryHigh of deploy/edge)."""
DEADLINE_SHARE: Final = 0.5
"""Share of a round's time above which training leaves too little for transfers."""
_FIT: Final = "memory, estimated"
_SETTINGS_SHOWN: Final = 3
SPARE_DISK_BYTES: Final = 64 * 2**20
FLOAT_BYTES: Final = 4
TOLERANCE: Final = 2.0**-14
"""Error of one encryption above which something is broken; at a scale of 2^27 it is some 1e-6."""


class CheckResult(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """The agent runs, but perhaps not well."""
    FAILED = "failed"
    """The agent cannot take part."""
    SKIPPED = "skipped"
    """Cannot be told before another check passes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to mend."""

    check: str
    verdict: CheckResult
    seen: str
    _: KW_ONLY
    remedy: str = ""


async def examine(config: AgentConfig, tell: Callable[[str], None]) -> list[Finding]:
    """Does every check.

    Args: tell: Takes the name of each check as it begins.
    """
    tell("certificate")
    certificate, credentials = check_certificate(config)
    findings = [certificate]
    spec: FederationSpec | None = None
    if credentials is None:
        findings.append(Finding("network", CheckResult.SKIPPED, "needs a certificate"))
    else:
        tell("network")
        for name, address in _servers(config):
            findings.append(await check_server(name, address, credentials))
        tell("clock and federation")
        told, spec = await check_coordinator(config, credentials)
        findings += told
    for name, check in _local_checks(config, spec):
        tell(name)
        findings += await asyncio.to_thread(check)
    return findings


def failed(findings: list[Finding]) -> bool:
    """Whether something must be mended."""
    return any(finding.verdict is CheckResult.FAILED for finding in findings)


def report(findings: list[Finding]) -> Records:
    """A table for a terminal."""
    styles = {
        CheckResult.OK: "green",
        CheckResult.WARNING: "yellow",
        CheckResult.FAILED: "bold red",
        CheckResult.SKIPPED: "dim",
    }
    table = Records(
        "check", "result", "seen", "to mend", title="This device", sentences=["seen", "to mend"], lines=True
    )
    for finding in findings:
        verdict = Text(finding.verdict, style=styles[finding.verdict])
        table.add(finding.check, verdict, finding.seen, finding.remedy)
    return table


def check_certificate(config: AgentConfig) -> tuple[Finding, Credentials | None]:
    """Whether this client has enrolled, under the configured name, and until when that holds."""
    try:
        credentials = config.credentials()
    except DomainError as error:
        remedy = "client-agent enroll with a token of the operator"
        return Finding("certificate", CheckResult.FAILED, error.message, remedy=remedy), None
    facts = credentials.held.facts
    return Finding(
        "certificate", CheckResult.OK, f"valid until {facts.expires:%Y-%m-%d %H:%M} UTC"
    ), credentials


async def check_server(name: str, address: str, credentials: Credentials) -> Finding:
    """Whether a server answers, is who it should be, and how far away it is."""
    check = f"network: {name}"
    async with open_channel(address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await _answered(stub, address)
            started = time.monotonic()
            await _answered(stub, address)
        except DomainError as error:
            remedy = f"is {address} right, and may this device's network reach it?"
            return Finding(check, CheckResult.FAILED, error.message, remedy=remedy)
    return Finding(
        check,
        CheckResult.OK,
        f"{address} answers in {1000 * (time.monotonic() - started):.0f} ms{named(address)}",
    )


async def check_coordinator(
    config: AgentConfig, credentials: Credentials
) -> tuple[list[Finding], FederationSpec | None]:
    """This device's clock against the coordinator's, and whether the federation exists."""
    session = Session(config, credentials)
    try:
        before = time.time()
        spec, server_s = await asyncio.wait_for(session.specification_and_time(), CONNECT_S)
        ahead_s = (before + time.time()) / 2 - server_s
    except (DomainError, TimeoutError) as error:
        why = error.message if isinstance(error, DomainError) else "the coordinator does not answer in time"
        remedy = f"ask the operator whether the federation {config.federation} exists"
        skipped = Finding("clock", CheckResult.SKIPPED, "needs the coordinator")
        return [skipped, Finding("federation", CheckResult.FAILED, why, remedy=remedy)], None
    finally:
        await session.close()
    seen = f"{spec.training.task}, {spec.round.rounds} rounds of at most {spec.round.deadline_s} s"
    return [judged_clock(ahead_s), Finding("federation", CheckResult.OK, seen)], spec


def judged_clock(ahead_s: float) -> Finding:
    """Takes the seconds by which this device's clock is ahead of the coordinator's."""
    seen = f"{abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} the coordinator's"
    if abs(ahead_s) < CLOCK_WARNING_S:
        return Finding("clock", CheckResult.OK, seen)
    verdict = CheckResult.FAILED if abs(ahead_s) > CLOCK_FAILURE_S else CheckResult.WARNING
    return Finding(
        "clock", verdict, seen, remedy="set the clock; keep it with NTP, e.g. timedatectl set-ntp true"
    )


def check_tenseal(parameters: str = "standard") -> list[Finding]:
    """Whether encryption works on this processor: a round trip, and its time."""
    ckks = profile(parameters)
    values = np.linspace(-1, 1, 4096)[None, :]
    started = time.monotonic()
    try:
        key = SecretKey.generate(ckks)
        error = np.abs(Decryptor(key).decrypt(Encryptor(key).encrypt(values), values.shape[1]) - values).max()
    except (DomainError, RuntimeError, ValueError) as broken:
        remedy = "reinstall the tenseal of the constraints file on this platform (64-bit x86 or ARM)"
        return [Finding("TenSEAL", CheckResult.FAILED, str(broken), remedy=remedy)]
    seen = f"{values.size} values there and back in {time.monotonic() - started:.2f} s, largest error {error:.0e}"
    if error > TOLERANCE:
        return [
            Finding(
                "TenSEAL", CheckResult.FAILED, seen, remedy="this build computes wrongly: reinstall tenseal"
            )
        ]
    return [Finding("TenSEAL", CheckResult.OK, seen)]


def check_learning(config: AgentConfig, spec: FederationSpec) -> list[Finding]:
    """Data, model, and one training step of the federation's kind: memory and time.

    What does not fit by an estimate is not loaded: the kernel would end this process without a word.
    """
    fit = check_fit(config, spec.training)
    if fit.verdict is CheckResult.FAILED:
        return [fit]
    return [fit, *_tried(config, spec)]


def check_fit(config: AgentConfig, training: TrainingSpec) -> Finding:
    """Whether the model and a training step fit by their sizes, and with which settings they would."""
    try:
        sizes = blueprint(config.model.path, training, config.lora.rank)
        free = free_memory(choose_device(config.model.device)).free
    except DomainError as error:
        return Finding(_FIT, CheckResult.SKIPPED, error.message)
    return judged_fit(sizes, setting_of(config, training), free, private=config.privacy is not None)


def judged_fit(sizes: Blueprint, now: Setting, free: int, *, private: bool = False) -> Finding:
    """Takes a model's sizes, the settings, and the bytes that are free."""
    needed = sizes.needed(now)
    seen = f"training takes about {_gb(needed)}, {_gb(free)} are free"
    if needed <= MEMORY_SHARE * free:
        return Finding(_FIT, CheckResult.OK, seen)
    verdict = CheckResult.WARNING if needed <= free else CheckResult.FAILED
    others = alternatives(now, private=private, checkpoints=sizes.checkpoints)
    lighter = {other: sizes.needed(other) for other in others}
    lighter = {other: size for other, size in lighter.items() if size < needed}
    fitting = [f"{other} ({_gb(size)})" for other, size in lighter.items() if size <= MEMORY_SHARE * free]
    if fitting:
        return Finding(_FIT, verdict, seen, remedy=f"set {'; or '.join(fitting[:_SETTINGS_SHOWN])}")
    least = f"the least is {_gb(min([needed, *lighter.values()]))}"
    remedy = f"no setting fits well, {least}: take a smaller model, or ask the operator for fewer max_tokens"
    return Finding(_FIT, verdict, seen, remedy=remedy)


def _tried(config: AgentConfig, spec: FederationSpec) -> list[Finding]:
    try:
        found = inspect(config, spec.training, spec.protection, spec.round.rounds)
    except DomainError as error:
        return [
            Finding(
                "data and model",
                CheckResult.FAILED,
                error.message,
                remedy="see the configuration's data and model",
            )
        ]
    model, lengths = found.prepared.model, found.prepared.lengths
    findings = [
        Finding(
            "data",
            CheckResult.OK,
            f"{len(found.prepared.examples):,} examples"
            + (
                f", {lengths.cut:,} of them cut to {lengths.limit:,} tokens"
                if lengths.is_cut_anywhere
                else ""
            ),
        ),
        Finding("model", CheckResult.OK, f"{len(model.matrices)} matrices on {model.device.type}"),
        *(
            Finding("model", CheckResult.WARNING, note, remedy="take the checkpoint that it was made from")
            for note in model.notes
        ),
    ]
    if found.privacy:
        findings.append(Finding("privacy", CheckResult.OK, found.privacy))
    try:
        seconds = _one_step(config, spec, found)
    except DomainError as error:
        return [*findings, Finding("training", CheckResult.FAILED, error.message)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        *findings,
        judged_memory(peak, memory_here().total),
        judged_time(seconds * spec.training.steps(len(found.prepared.examples)), spec.round.deadline_s),
        judged_disk(
            _disk_needed(found, config), shutil.disk_usage(_existing(config.state_dir)).free, config.state_dir
        ),
    ]


def judged_memory(peak: int, total: int) -> Finding:
    """Takes the bytes that training took at most, and those that this process may use."""
    seen = f"a training step takes {_gb(peak)} of {_gb(total)}"
    if peak < MEMORY_SHARE * total:
        return Finding("memory", CheckResult.OK, seen)
    return Finding(
        "memory", CheckResult.WARNING, seen, remedy="lower resources.micro_batch (8, 4, ... 1) or lora.rank"
    )


def judged_time(seconds: float, deadline_s: float) -> Finding:
    """Takes the seconds that a round's training takes, and those that a round waits."""
    seen = f"a round's training takes about {seconds:.0f} s; the round waits {deadline_s:.0f} s"
    if seconds < DEADLINE_SHARE * deadline_s:
        return Finding("training", CheckResult.OK, seen)
    verdict = CheckResult.WARNING if seconds < deadline_s else CheckResult.FAILED
    remedy = (
        "ask the operator for fewer local_steps or a later deadline_s; give the agent more resources.threads"
    )
    return Finding("training", verdict, seen, remedy=remedy)


def judged_disk(needed: int, free: int, folder: Path) -> Finding:
    """Takes the bytes that the state folder may come to hold, and those that are free there."""
    seen = f"{_gb(free)} free at {folder}, {_gb(needed)} needed"
    if free > needed:
        return Finding("disk", CheckResult.OK, seen)
    return Finding("disk", CheckResult.FAILED, seen, remedy="make room, or put state_dir on a larger disk")


def check_conditions(config: AgentConfig, wait: Callable[[float], None] = time.sleep) -> list[Finding]:
    """Whether the device may compute right now; others' use of the CPU is measured first."""
    conditions = Conditions(config.resources)
    if config.resources.max_other_cpu < 1:
        wait(SAMPLE_S)
    why = conditions.obstacle()
    if why:
        return [Finding("power and load", CheckResult.WARNING, why, remedy="the agent waits")]
    return [Finding("power and load", CheckResult.OK, "the agent may compute now")]


def _servers(config: AgentConfig) -> Iterator[tuple[str, str]]:
    yield "key authority", config.key_authority
    yield "coordinator", config.coordinator
    for address in config.aggregation:
        yield "aggregation", address


def _local_checks(
    config: AgentConfig, spec: FederationSpec | None
) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    yield "power and load", lambda: check_conditions(config)
    yield "TenSEAL", lambda: check_tenseal(spec.protection.parameters if spec else "standard")
    if spec is None:
        yield (
            "data and model",
            lambda: [Finding("data and model", CheckResult.SKIPPED, "needs the federation")],
        )
    else:
        yield "data, model, memory, disk", lambda: check_learning(config, spec)


async def _answered(stub: health_pb2_grpc.HealthStub, address: str) -> None:
    """Any answer will do: health is not for clients. Raises: DomainError if there is none."""
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=CONNECT_S)
    except grpc.aio.AioRpcError as error:
        if is_transient(error) or distrusts(error):
            raise error_from_rpc(error, address) from error


def _one_step(config: AgentConfig, spec: FederationSpec, found: Inspection) -> float:
    """Seconds of a training step, the first one left out: it is slower."""
    training = spec.training
    ready = found.prepared
    run = TrainingRun(
        rates=[1e-6],
        batch_size=training.batch_size,
        seed=1,
        micro_batch=config.resources.micro_batch,
        settings=config.training,
    )
    step = partial(train, ready.model, ready.encoder, ready.examples, run)
    budget = budget_of(config, training, examples=len(ready.examples), rounds=spec.round.rounds)
    if budget is not None:
        from client_agent.private_training import train_privately  # noqa: PLC0415 - an extra of its own

        step = partial(train_privately, ready.model, ready.encoder, ready.examples, run, budget.mechanism)
    seconds = [step(report=lambda _: None).seconds for _ in range(2)]
    return seconds[-1]


def _disk_needed(found: Inspection, config: AgentConfig) -> int:
    """An update on its way out, the result on its way in, three sets of weights, and some room."""
    weights = FLOAT_BYTES * found.prepared.model.trainable_count
    weights *= MOMENT_SIZES if config.training.keeps_moments else 1
    return 3 * found.upload_bytes + 3 * weights + SPARE_DISK_BYTES


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
