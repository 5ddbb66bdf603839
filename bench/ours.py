"""Our protection path, whole: every matrix of the round is protected, aggregated and restored for real."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.workload import Cost, Workload
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.ckks.wire import SeededBlock, encode_block
from shelora.lora.aggregate import Contribution, aggregate_shard
from shelora.lora.layout import Layout, Matrix, build_layout
from shelora.lora.protect import protect
from shelora.lora.restore import Restored, restore
from shelora.lora.shards import FactoredUpdate, Float64
from shelora.messages import decode_result, encode_update, validate_update
from shelora.obfuscation import SECRET_BYTES, Obfuscation

REPETITIONS = 3
"""Of everything that takes less than a second; the median counts."""
ERROR_ROWS = 400
"""Rows of ΔW compared at a time: they stay in the processor's cache."""


@dataclass
class Ours:
    """What was measured; all of it over the whole round."""

    chunks: int = 0
    """Ciphertexts a row of the whole round."""
    shards: int = 0
    encryption: Cost = field(default_factory=Cost)
    """Values to ciphertext bytes, all clients."""
    protection: Cost = field(default_factory=Cost)
    """Column order, normalization, encryption and serialization, all clients."""
    validation: Cost = field(default_factory=Cost)
    """What the server checks of arriving shards, all clients."""
    aggregation: Cost = field(default_factory=Cost)
    """Shard bytes to result bytes: QR, clear products, encrypted products."""
    clear_aggregation: Cost = field(default_factory=Cost)
    """The same round with nothing encrypted."""
    restoration: Cost = field(default_factory=Cost)
    """Result bytes to Q and M, one client."""
    upload_bytes: int = 0
    """Ciphertext bytes, one client."""
    upload_clear_bytes: int = 0
    download_bytes: int = 0
    """Ciphertext bytes."""
    download_clear_bytes: int = 0
    max_abs_error: float = 0.0
    largest_entry: float = 0.0
    """Of ΔW."""

    @property
    def encrypted_aggregation_cpu_s(self) -> float:
        """What encryption adds to aggregation."""
        return self.aggregation.cpu_s - self.clear_aggregation.cpu_s


@dataclass
class EncryptAll:
    """One client that encrypts every column of A."""

    encryption: Cost = field(default_factory=Cost)
    protection: Cost = field(default_factory=Cost)
    upload_bytes: int = 0


class MeasuredEncryptor:
    """An encryptor that measures itself, serialization of the ciphertexts included."""

    def __init__(self, encryptor: Encryptor, cost: Cost) -> None:
        self._encryptor = encryptor
        self._cost = cost

    def encrypt(self, values: Float64) -> SeededBlock:
        with self._cost.measured():
            block = self._encryptor.encrypt(values)
            encode_block(block)
        return block


class _Round:
    """The layout, the key and the secret column orders of one round."""

    def __init__(self, workload: Workload, key: SecretKey, budget: float) -> None:
        self.workload = workload
        self.key = key
        columns = (round(budget * workload.features),) if budget else ()
        size = workload.features
        self.layout: Layout = build_layout(
            parameters=STANDARD.name,
            key_id=key.key_id,
            matrices=[Matrix(name, size, size, columns) for name in workload.names],
            tensors=[],
            tiers=(budget,) if budget else (),
            encrypt_tensors=True,
            max_rank=workload.rank,
            max_directions=workload.rank * workload.clients,
        )
        secret = Obfuscation(bytes(SECRET_BYTES), epoch=1)
        self.orders = {name: secret.permutation(name, size) for name in workload.names}

    def protected(self, client: int, encryption: Cost, protection: Cost) -> list[bytes]:
        """The shards of one client's update."""
        factors = {name: self.workload.factors(client, name) for name in self.workload.names}
        encryptor = MeasuredEncryptor(Encryptor(self.key), encryption)
        with protection.measured():
            contents = protect(self.layout, factors, {}, len(self.layout.tiers), self.orders, encryptor)
            return [encode_update(self.layout, content) for content in contents]

    def all_protected(self, encryption: Cost, protection: Cost) -> list[list[bytes]]:
        """The updates of all clients."""
        return [self.protected(client, encryption, protection) for client in range(self.workload.clients)]

    def aggregated(self, updates: list[list[bytes]], aggregation: Cost) -> list[bytes]:
        count = self.workload.clients
        contributions = [Contribution(str(i), 1 / count, self.workload.scaling) for i in range(count)]
        with aggregation.measured():
            return [
                aggregate_shard(self.layout, shard, contributions, lambda client: updates[int(client)][shard])  # noqa: B023
                for shard in range(len(self.layout.shards))
            ]

    def restored(self, results: list[bytes], restoration: Cost) -> Restored:
        with restoration.measured():
            contents = (decode_result(self.layout, i, data) for i, data in enumerate(results))
            return restore(self.layout, contents, self.orders, Decryptor(self.key))


def measure(workload: Workload, step: Callable[[], None]) -> Ours:
    """Runs the round; `step` is called after each repetition and each matrix that was compared."""
    found = Ours()
    key = SecretKey.generate(STANDARD)
    protected = _Round(workload, key, workload.columns / workload.features)
    found.shards = len(protected.layout.shards)
    found.chunks = sum(map(protected.layout.chunk_count, protected.layout.shards))
    updates = _protect(protected, found, step)
    _check(protected.layout, updates, found)
    found.aggregation, results = _aggregate(protected, updates, step)
    del updates
    for shard, data in enumerate(results):
        ciphertexts = len(decode_result(protected.layout, shard, data).ciphertexts)
        found.download_bytes += ciphertexts
        found.download_clear_bytes += len(data) - ciphertexts
    restored = protected.restored(results, found.restoration)
    for name in workload.names:
        _compare(workload, name, restored.matrices.pop(name), found)
        step()
    clear = _Round(workload, key, 0.0)
    found.clear_aggregation, _ = _aggregate(clear, clear.all_protected(Cost(), Cost()), step)
    return found


def steps(workload: Workload) -> int:
    """How often `measure` calls its `step`."""
    return 3 * REPETITIONS + workload.matrices


def _protect(shards: _Round, found: Ours, step: Callable[[], None]) -> list[list[bytes]]:
    encryption, protection = [], []
    for _ in range(REPETITIONS):
        encryption.append(Cost())
        protection.append(Cost())
        updates = shards.all_protected(encryption[-1], protection[-1])
        step()
    found.encryption, found.protection = Cost.median(encryption), Cost.median(protection)
    return updates


def _aggregate(
    shards: _Round, updates: list[list[bytes]], step: Callable[[], None]
) -> tuple[Cost, list[bytes]]:
    costs = []
    for _ in range(REPETITIONS):
        costs.append(Cost())
        results = shards.aggregated(updates, costs[-1])
        step()
    return Cost.median(costs), results


def measure_everything_encrypted(workload: Workload) -> EncryptAll:
    """One client that encrypts all columns of A."""
    found = EncryptAll()
    key = SecretKey.generate(STANDARD)
    shards = _Round(workload, key, 1.0)
    updates = shards.protected(0, found.encryption, found.protection)
    for shard, data in enumerate(updates):
        found.upload_bytes += len(validate_update(shards.layout, shard, data).ciphertexts)
    return found


def _check(layout: Layout, updates: list[list[bytes]], found: Ours) -> None:
    for client, shards in enumerate(updates):
        for shard, data in enumerate(shards):
            with found.validation.measured():
                ciphertexts = len(validate_update(layout, shard, data).ciphertexts)
            if client == 0:
                found.upload_bytes += ciphertexts
                found.upload_clear_bytes += len(data) - ciphertexts


def _compare(workload: Workload, name: str, update: FactoredUpdate, found: Ours) -> None:
    """Error of Q M against sum_i w_i s_i B_i A_i in float64, over every entry."""
    factors = [workload.factors(client, name) for client in range(workload.clients)]
    weight = workload.scaling / workload.clients
    B = np.hstack([weight * f.B.astype(np.float64) for f in factors])
    A = np.vstack([f.A.astype(np.float64) for f in factors])
    for first in range(0, workload.features, ERROR_ROWS):
        rows = slice(first, first + ERROR_ROWS)
        exact = B[rows] @ A
        found.largest_entry = max(found.largest_entry, float(np.abs(exact).max()))
        exact -= update.Q[rows] @ update.M
        found.max_abs_error = max(found.max_abs_error, float(np.abs(exact).max()))
