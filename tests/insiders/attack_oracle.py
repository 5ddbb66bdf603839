"""A malicious aggregation crafts a result whose factors agents send back in the clear (`selective` alone).

The agents refuse it. The control are agents that do not check: their next clear B holds the victim's encrypted values.
"""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from client_agent.keys import EpochSecrets
from shelora.ckks.wire import decode_block
from shelora.cli.cluster import LocalCluster
from shelora.federation import ScreeningSpec
from shelora.lora import products
from shelora.lora.codec import parse_update
from shelora.messages import layout_from_proto
from shelora.operator import operator
from shelora.transport.channel import call, open_channel
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import common_pb2, key_authority_pb2
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1.key_authority_pb2_grpc import KeyAuthorityStub
from shelora.view import training_rounds
from tests.e2e import federations
from tests.e2e.agents import Agent, configure, enrol, save_tiny_bert, specification

ORACLE = Path(__file__).parent / "oracle"
AGENTS = [Agent(name, rank=4, alpha=4, budget=1.0, suffix=".jsonl") for name in ("clinic", "bank", "sensor")]
VICTIM, OBSERVED = "clinic", "bank"
EXPONENT, COLUMNS, SCALE = 12, 4, 0.4


@pytest.mark.parametrize("module", ["client_agent.main", "tests.insiders.trusting_agent"])
def test_a_crafted_result_is_refused_and_agents_that_trust_it_tell_what_they_decrypt(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ORACLE))
    monkeypatch.setenv("SHELORA_TEST_ORACLE", str(seen))
    with LocalCluster(tmp_path / "cluster", fixed_ports=False, workers=1) as cluster:
        federation, secrets = asyncio.run(_attacked(cluster, module, tmp_path, seen))
    told = _told(seen, secrets)
    if module == "client_agent.main":
        assert not told, "no update was made of the crafted result"
        assert len(training_rounds(federation)) >= 1
        logs = "".join(p.read_text() for p in (tmp_path / "cluster" / "logs").glob("*.log"))
        assert "RESULT_REFUSED" in logs
    else:
        assert told, "the attack is real: updates followed"
        assert min(told) > 0.9, told


async def _attacked(
    cluster: LocalCluster, module: str, folder: Path, seen: Path
) -> tuple[pb.Federation, EpochSecrets]:
    spec = specification(
        "selective",
        {"tensor_bound": 4.0, "clear_bits": 32},
        rounds=2,
        clients=3,
        min_updates=2,
        deadline_s=60,
        max_attempts=1,
    )
    # Norms are what aggregation says that they are: one that attacks says that they are small.
    spec = spec.model_copy(update={"screening": ScreeningSpec(max_update_norm=0.0)})
    model = save_tiny_bert(folder / "model")
    await federations.start(cluster, spec)
    for agent in AGENTS:
        await enrol(cluster, agent, folder)
        config = configure(agent, cluster.addresses, model, folder)
        cluster.spawn(agent.name, module, ["run", "--config", str(config)], {})
    federation = await _until(cluster, spec.name, seen)
    return federation, await _secrets_of_a_judge(cluster, folder)


async def _until(cluster: LocalCluster, name: str, seen: Path) -> pb.Federation:
    """Until the federation is over, or updates of the round after the crafted one have been aggregated."""
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        for _ in range(240):
            federation = await connection.get(name)
            if federation.phase != pb.PHASE_RUNNING or _followed(seen):
                break
            await asyncio.sleep(1)
        return await connection.get(name)


def _followed(seen: Path) -> bool:
    """Whether updates of the round after the crafted one have been aggregated."""
    return any(seen.glob("1.*.layout"))


async def _secrets_of_a_judge(cluster: LocalCluster, folder: Path) -> EpochSecrets:
    """The epoch's key, as a member has it: to know what was encrypted."""
    await cluster.enrol_client("weather", "judge", folder / "judge")
    credentials = TlsCredentials(IdentityFolder(folder / "judge" / "identity"))
    request = key_authority_pb2.GetEpochSecretsRequest(federation_id="weather", epoch=1, client_id="judge")
    async with open_channel(cluster.addresses.key_authority, credentials) as channel:
        return EpochSecrets.from_proto(1, await call(KeyAuthorityStub(channel).GetEpochSecrets, request))


def _told(seen: Path, secrets: EpochSecrets) -> list[float]:
    """By shard, how well the victim's encrypted values correlate with what another's next clear B tells."""
    kind, found = products.KIND, []
    for path in sorted(seen.glob("1.*.layout")):
        index = int(path.name.split(".")[1])
        layout = layout_from_proto(common_pb2.Layout.FromString((seen / f"0.{index}.layout").read_bytes()))
        later = layout_from_proto(common_pb2.Layout.FromString(path.read_bytes()))
        update = parse_update(layout, index, (seen / f"0.{index}.{VICTIM}.update").read_bytes())
        block = decode_block(update.ciphertexts, kind.update_block_shape(layout, update))
        shard = layout.shards[index]
        truth = secrets.decryptor.decrypt(block, kind.slot_count(layout, shard))
        scaling = json.loads((seen / f"1.{index}.scalings").read_text())[OBSERVED]
        next_update = parse_update(later, index, (seen / f"1.{index}.{OBSERVED}.update").read_bytes())
        values, guesses = [], []
        for item, part in enumerate(next_update.matrices):
            segment = next(s for s in kind.segments(layout, shard) if s.item == item)
            values.append(truth[:, segment.slot : segment.slot + COLUMNS])
            guesses.append(_read(part.B[: COLUMNS + update.rank].astype(np.float64), scaling))
        found.append(float(np.corrcoef(np.ravel(guesses), np.ravel(values))[0, 1]))
    return found


def _read(B: np.ndarray, scaling: float) -> np.ndarray:
    """The victim's A [rank, COLUMNS], from a clear B whose columns were normalized by powers of two."""
    block = SCALE * 2.0**EXPONENT
    powers = np.round(np.log2(np.linalg.norm(B, axis=0) / (np.sqrt(block / scaling) * 1.06)))
    P = B / 2.0**powers
    H = scaling * P @ P.T
    read: np.ndarray = (H @ H)[COLUMNS:, :COLUMNS] / block**2
    return read
