"""A whole federation, every part a process of its own, with a real model that really learns."""

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from coordinator.main import now_ms
from coordinator.store import redis_store
from services.common.redis_client import connect
from services.key_authority.custody import read_root, read_vault
from services.key_authority.epochs import EpochId
from services.key_authority.sealer import SealingKey
from shelora.cli.cluster import LocalCluster
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import round_figures, training_rounds
from tests.e2e import federations
from tests.e2e.agents import AGENTS, LABELS, enrol, spawn_agent, specification
from tests.e2e.recorder import Recorder, inside_tls, recording
from tests.identities import KEY_AUTHORITY, TestAuthority

WINDOW = 12
"""Bytes of a secret that count as found: 2^-96 by chance."""


HISTORY = {
    "federation",
    "members",
    "sessions",
    "round",
    "commits",
    "refusals",
    "evaluations",
    "layout",
    "plan",
}
RETENTION_S = 30 * 86_400

REPLANNING = {"replan_every_rounds": 1, "replan_below_overlap": 0.5}
NEW_KEYS = {"key_rotation_rounds": 2}
FLOOR = {"coverage_floor": 0.9, "max_vote_weight": 16.0}


@pytest.mark.parametrize(
    ("spec", "votes", "epoch"),
    [
        (specification("selective"), 1, 1),
        (
            specification("selective", {"negotiation": "ope", **FLOOR, **NEW_KEYS}, **REPLANNING, rounds=3),
            3,
            2,
        ),
    ],
    ids=["sealed", "ope, replanned, then with new keys"],
)
async def test_a_private_federation_learns_and_nothing_a_server_sees_holds_a_secret(
    cluster: LocalCluster, model: Path, tmp_path: Path, spec: FederationSpec, votes: int, epoch: int
):
    real = cluster.addresses
    for agent in AGENTS:
        await enrol(cluster, agent, tmp_path)
    clients = [tmp_path / agent.name / "state" / "identity" for agent in AGENTS]
    servers = {
        real.coordinator: tmp_path / "cluster" / "identities" / "coordinator",
        real.aggregation[0]: tmp_path / "cluster" / "identities" / "aggregation",
        real.key_authority: _posing_as_key_authority(tmp_path / "cluster"),
    }
    inside = [inside_tls(target, folder, clients) for target, folder in servers.items()]
    async with (
        recording(*inside) as (coordinator, aggregation, key_authority),
        recording(*(Recorder(recorder.address) for recorder in inside)) as wire,
    ):
        addresses = [recorder.address for recorder in wire]
        proxied = replace(
            real, coordinator=addresses[0], aggregation=(addresses[1],), key_authority=addresses[2]
        )
        agents = [spawn_agent(cluster, agent, proxied, model, tmp_path) for agent in AGENTS]
        await federations.start(cluster, spec)
        federation = await federations.wait_until_over(cluster, spec, agents)
        seen = coordinator.recorded() + aggregation.recorded()
        released = key_authority.recorded()
        captured = b"".join(recorder.recorded() for recorder in wire)

    assert (federation.phase, federation.epoch) == (pb.PHASE_FINISHED, epoch), federation.failure
    assert [agent.popen.returncode for agent in agents] == [0, 0, 0]
    _assert_rounds_are_complete(federation)
    assert [r.kind for r in federation.history].count(pb.ROUND_KIND_VOTE) == votes
    for summary in training_rounds(federation):
        reported = [update.overlap for update in summary.updates if update.HasField("overlap")]
        assert reported == [1.0] * (len(AGENTS) if spec.round.replan_below_overlap else 0)
    _assert_adapters_agree_and_load(tmp_path, model)
    await _assert_history_and_results_are_left(real.redis_url, spec.name)

    folder = tmp_path / "cluster"
    stored = b"".join(path.read_bytes() for path in (folder / "redis").rglob("*") if path.is_file())
    logged = b"".join(path.read_bytes() for path in (folder / "logs").glob("*.log"))
    sealed = b"".join(path.read_bytes() for path in (folder / "key-authority").rglob("*") if path.is_file())
    assert len(stored) > 100_000, "the append-only file was not recorded"
    assert len(seen) > 100_000, "the traffic was not recorded"
    assert len(captured) > len(seen), "the packets were not captured"
    for word in (b"weather", b"clinic", b"shelora"):
        assert word in seen + released
        assert word not in captured, "a packet capture shows who talks about what"
    for name, secret in _secrets(cluster, epoch).items():
        assert any(window in released for window in _windows(secret)), (
            f"the search does not find {name} where it is"
        )
        for place, content in (("traffic", seen), ("store", stored), ("logs", logged), ("vault", sealed)):
            found = [window for window in _windows(secret) if window in content]
            assert not found, f"{name} appears in the {place}"


def _assert_rounds_are_complete(federation: pb.Federation) -> None:
    rounds = training_rounds(federation)
    assert [r.number for r in rounds] == list(range(1, federation.spec.round.rounds + 1))
    for summary in rounds:
        assert summary.update_count == len(AGENTS)
        assert len(summary.evaluations) == len(AGENTS)
    last = round_figures(rounds[-1])
    assert last.test_examples == 60, "after the last round agents evaluate on all their test examples"
    assert last.test_accuracy is not None
    if not federation.spec.round.replan_every_rounds:
        assert last.test_accuracy >= 0.9


async def _assert_history_and_results_are_left(redis_url: str, name: str) -> None:
    """Of a finished federation Redis keeps its history and what agents may still ask for; the rest is gone or going."""
    async with connect(redis_url) as client:
        store = redis_store(client, now_ms)
        while (record := (await store.federations.read(name)).record).garbage:  # noqa: ASYNC110 - a driver sweeps
            await asyncio.sleep(0.1)
        kept = {record.round_id(sequence) for sequence in record.results_in_use}
        found = {key.decode(): await client.ttl(key) async for key in client.scan_iter()}
    for key, seconds in found.items():
        service, _, rest = key.removeprefix("shelora:").partition(":")
        owner, _, part = rest.removeprefix("{").partition("}:")
        result = service == "aggregation" and owner in kept and part.startswith("result")
        history = service == "coordinator" and (not part or HISTORY & set(part.split(":")))
        assert 0 <= seconds <= (RETENTION_S if result or history else 3600), f"{key}: {seconds} s"


def _assert_adapters_agree_and_load(folder: Path, model: Path) -> None:
    """Agents of one rank end with the same product B A; every adapter loads with PEFT."""
    products = {agent.name: _products(folder / agent.name / "state" / "adapter") for agent in AGENTS}
    for name, product in products["bank"].items():
        np.testing.assert_allclose(products["sensor"][name], product, atol=1e-5)
        assert np.abs(product).max() > 0
    for agent in AGENTS:
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(LABELS))
        loaded = PeftModel.from_pretrained(base, folder / agent.name / "state" / "adapter")
        assert loaded.peft_config["default"].r == agent.rank


def _products(adapter: Path) -> dict[str, np.ndarray]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    weights = load_file(adapter / "adapter_model.safetensors")
    down = {name: value for name, value in weights.items() if "lora_A" in name}
    return {name: scaling * weights[name.replace("lora_A", "lora_B")] @ value for name, value in down.items()}


def _posing_as_key_authority(cluster: Path) -> Path:
    """A folder with an identity of the key authority, which only the root signs: it keeps its own in memory."""
    root = read_root(cluster / "key-authority", SealingKey.from_file(cluster / "sealing-key"))
    return TestAuthority(cluster / "posing", root).enrolled(KEY_AUTHORITY)


def _secrets(cluster: LocalCluster, number: int) -> dict[str, bytes]:
    """An epoch's secrets as the key authority keeps them; those of an earlier one are destroyed."""
    folder = Path(cluster.addresses.operator_identity).parents[1]
    vault = read_vault(folder / "key-authority", SealingKey.from_file(folder / "sealing-key"))
    epoch = vault.read(EpochId("weather", number))
    return {"the CKKS secret key": epoch.ckks_secret_key, "the obfuscation secret": epoch.obfuscation_secret}


def _windows(secret: bytes) -> Iterator[bytes]:
    """Parts of a secret, raw and in the encodings a careless log or record would use."""
    middle = len(secret) // 2
    for start in (0, 4, middle, middle + 4, len(secret) - WINDOW):
        part = secret[start : start + WINDOW]
        if len(set(part)) < WINDOW // 2:
            continue
        yield part
        yield part.hex().encode()
    for shift in range(3):
        yield base64.b64encode(secret[middle + shift : middle + shift + WINDOW])[:16]


def test_windows_find_a_secret_in_each_encoding():
    secret = bytes(range(7, 71))
    for encoded in (secret, secret.hex().encode(), base64.b64encode(secret)):
        assert any(window in encoded for window in _windows(secret))
    assert not any(window in bytes(1000) for window in _windows(secret))
