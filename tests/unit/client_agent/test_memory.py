import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from client_agent.memory import FIXED_BYTES, Memory, memory_here, require_memory, result_bytes, update_bytes
from client_agent.results import cut_to_rank
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Layout, Matrix, build_layout
from shelora.lora.protect import protect
from shelora.lora.restore import restored_parts
from shelora.lora.shards import LoraFactors
from shelora.obfuscation import SECRET_BYTES, Obfuscation

RANK = 64
OTHERS_RANK = 32
FEATURES = 3200
"""As OpenLLaMA-3B."""
SECRETS = Obfuscation(bytes(SECRET_BYTES), epoch=1)
SLACK = 3
"""Most that an estimate may exceed what was measured."""


@pytest.fixture(scope="module")
def key() -> SecretKey:
    return SecretKey.generate(STANDARD)


def some_layout(key: SecretKey, budget: float) -> Layout:
    """Several shards; the cohort has other ranks as well."""
    columns = (round(budget * FEATURES),) if budget else ()
    return build_layout(
        parameters=STANDARD.name,
        key_id=key.key_id,
        matrices=[
            Matrix(f"layer-{i}", FEATURES, FEATURES, tier_columns=columns)
            for i in range(6 if budget == 0 else 2)
        ],
        tensors=[],
        tiers=(budget,) if budget else (),
        encrypt_tensors=True,
        max_rank=RANK,
        max_directions=256,
    )


def some_update(layout: Layout, rank: int, seed: int) -> dict[str, LoraFactors]:
    rng = np.random.default_rng(seed)
    return {
        m.name: LoraFactors(
            rng.standard_normal((m.out_features, rank), dtype=np.float32),
            rng.standard_normal((rank, m.in_features), dtype=np.float32),
        )
        for m in layout.matrices
    }


def peak(work: Callable[[], object]) -> int:
    """Bytes that some work allocated at most, beyond what was there."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("budget", [0.0, 0.01, 1.0])
def test_the_estimate_covers_what_was_measured_and_is_near_it(
    key: SecretKey, budget: float, tmp_path: Path
) -> None:
    layout = some_layout(key, budget)
    orders = {m.name: SECRETS.permutation(m.name, m.in_features) for m in layout.matrices}
    encryptor, decryptor = Encryptor(key), Decryptor(key)

    def protected(rank: int, seed: int) -> list[bytes]:
        factors = some_update(layout, rank, seed)
        contents = protect(layout, factors, {}, len(layout.tiers), orders, encryptor)
        return [encode_update(layout, content) for content in contents]

    factors = some_update(layout, RANK, 1)

    def protect_all() -> None:
        for content in protect(layout, factors, {}, len(layout.tiers), orders, encryptor):
            encode_update(layout, content)

    taken = peak(protect_all)
    assert taken <= update_bytes(layout, RANK) + FIXED_BYTES <= SLACK * taken + FIXED_BYTES

    updates = [protected(RANK, 1), protected(OTHERS_RANK, 2)]
    contributions = [Contribution(str(i), 0.5, 1.0) for i in range(len(updates))]
    sizes = []
    for shard in range(len(layout.shards)):
        data = aggregate_shard(layout, shard, contributions, lambda client, i=shard: updates[int(client)][i])
        sizes.append((tmp_path / str(shard)).write_bytes(data))

    def restore_all() -> int:
        contents = (
            decode_result(layout, shard, (tmp_path / str(shard)).read_bytes()) for shard in range(len(sizes))
        )
        weights = cut_to_rank(restored_parts(layout, contents, orders, decryptor), RANK, 1.0, SECRETS)
        return sum(f.A.nbytes + f.B.nbytes for f in weights.factors.values())

    kept = sum(f.A.nbytes + f.B.nbytes for f in factors.values())
    taken = peak(restore_all) - kept
    assert taken <= result_bytes(layout, sizes) + FIXED_BYTES <= SLACK * taken + FIXED_BYTES


def test_too_little_memory_is_named_with_both_numbers_and_the_remedies() -> None:
    require_memory(5_000_000, lambda: Memory(10**9, 5_000_000))
    with pytest.raises(
        DomainError, match=r"5\.0 MB of memory are free .* 6\.0 MB: .*MemoryMax.*lora\.rank"
    ) as e:
        require_memory(6_000_000, lambda: Memory(10**9, 5_000_000))
    assert e.value.reason is Reason.MEMORY_UNAVAILABLE


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(total=8_000, available=6_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def group(folder: Path, limit: tuple[str, str], used: tuple[str, int], stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit[0]).write_text(f"{limit[1]}\n")
    (folder / used[0]).write_text(f"{used[1]}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.mark.usefixtures("machine")
def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    assert memory_here(tmp_path / "none", tmp_path) == Memory(8_000, 6_000)
    group(tmp_path, ("memory.max", "max"), ("memory.current", 9_000), "inactive_file 1\n")
    (tmp_path / "own").write_text("0::/\n")
    assert memory_here(tmp_path / "own", tmp_path) == Memory(8_000, 6_000)


@pytest.mark.usefixtures("machine")
def test_the_narrowest_group_around_the_process_counts_and_cached_files_are_free(tmp_path: Path) -> None:
    stat = "anon 1\ninactive_file 300\n"
    group(tmp_path / "system.slice", ("memory.max", "2000"), ("memory.current", 1_500), stat)
    group(tmp_path / "system.slice/agent", ("memory.max", "max"), ("memory.current", 10), stat)
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/system.slice/agent\n")
    assert memory_here(tmp_path / "own", tmp_path) == Memory(2_000, 800)


@pytest.mark.usefixtures("machine")
def test_the_first_version_of_groups_is_understood_and_paths_of_a_host_are_not_needed(tmp_path: Path) -> None:
    limit, used = ("memory.limit_in_bytes", "1000"), ("memory.usage_in_bytes", 1_200)
    group(tmp_path / "memory", limit, used, "inactive_file 1\ntotal_inactive_file 100\n")
    (tmp_path / "own").write_text("9:cpu:/\n4:memory:/docker/0123\n0::/\n")
    assert memory_here(tmp_path / "own", tmp_path) == Memory(1_000, 0)
