"""Our protection path, whole: every matrix of the round is protected, aggregated and restored for real."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bench.workload import Cost, Costs, Workload
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.ckks.wire import SeededBlock, encode_block
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, decode_update, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import CLEAR_BITS, Layout, Matrix, build_layout
from shelora.lora.products import KIND as PRODUCTS
from shelora.lora.protect import protect
from shelora.lora.restore import Restored, merged, restored_parts
from shelora.lora.shards import FactoredUpdate, Float64, LoraFactors
from shelora.obfuscation import SECRET_BYTES, Obfuscation

ERROR_ROWS = 400
"""Rows of ΔW compared at a time: they stay in the processor's cache."""
MAX_DIRECTIONS = 256
"""A federation's default."""


@dataclass(kw_only=True)
class Ours:
    """What was measured; all of it over the whole round."""

    chunks: int = 0
    """Ciphertexts a row of the whole round."""
    shards: int = 0
    encryption: Costs = field(default_factory=Costs)
    """Values to ciphertext bytes, all clients."""
    protection: Costs = field(default_factory=Costs)
    """Column order, normalization, encryption and serialization, all clients."""
    validation: Costs = field(default_factory=Costs)
    """What the server checks of arriving shards, all clients."""
    aggregation: Costs = field(default_factory=Costs)
    """Shard bytes to result bytes: QR, clear products, encrypted products."""
    clear_aggregation: Costs = field(default_factory=Costs)
    """The same round with nothing encrypted."""
    restoration: Costs = field(default_factory=Costs)
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
        return self.aggregation.usual.cpu_s - self.clear_aggregation.usual.cpu_s


@dataclass(kw_only=True)
class Once:
    """A federation's default precision: one client's encryption, and the round of all clients, run once."""

    encryption: Cost = field(default_factory=Cost)
    protection: Cost = field(default_factory=Cost)
    """One client."""
    upload_bytes: int = 0
    """Ciphertexts."""
    upload_clear_bytes: int = 0
    aggregation: Cost = field(default_factory=Cost)
    download_bytes: int = 0
    """All of it."""
    max_abs_error: float = 0.0
    largest_entry: float = 0.0
    """Of ΔW."""


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


class Round:
    """The layout, the key and the secret column orders of one round.

    Args:
        budget: Share of the columns that every client encrypts; 0 for none.
        clear_bits: In which clear parts travel. 32 is the published way's; 16 is a federation's default.
    """

    def __init__(
        self, workload: Workload, key: SecretKey, budget: float, clear_bits: int = CLEAR_BITS[-1]
    ) -> None:
        self.workload = workload
        self.key = key
        shapes = {name: workload.shape(name) for name in workload.names}
        self.layout: Layout = build_layout(
            parameters=STANDARD.name,
            key_id=key.key_id,
            matrices=[
                Matrix(name, rows, columns, tier_columns=(round(budget * columns),) if budget else ())
                for name, (rows, columns) in shapes.items()
            ],
            tensors=[],
            tiers=(budget,) if budget else (),
            encrypt_tensors=True,
            max_rank=workload.rank,
            max_directions=min(workload.rank * workload.clients, MAX_DIRECTIONS),
            clear_bits=clear_bits,
        )
        secret = Obfuscation(bytes(SECRET_BYTES), epoch=1)
        self.orders = {name: secret.permutation(name, columns) for name, (_, columns) in shapes.items()}

    def protected(self, client: int, encryption: Cost, protection: Cost) -> list[bytes]:
        """The shards of one client's update."""
        factors = {name: self.workload.factors(client, name) for name in self.workload.names}
        encryptor = MeasuredEncryptor(Encryptor(self.key), encryption)
        with protection.measured():
            return list(self.sent(factors, encryptor))

    def sent(
        self, factors: Mapping[str, LoraFactors], encryptor: Encryptor | MeasuredEncryptor
    ) -> Iterator[bytes]:
        """The shards of an update, one at a time."""
        for content in protect(self.layout, factors, {}, len(self.layout.tiers), self.orders, encryptor):
            yield encode_update(self.layout, content)

    def all_protected(self, encryption: Cost, protection: Cost) -> list[list[bytes]]:
        """The updates of all clients."""
        return [self.protected(client, encryption, protection) for client in range(self.workload.clients)]

    def aggregated(self, updates: list[list[bytes]]) -> list[bytes]:
        """The result shards."""
        count = self.workload.clients
        contributions = [Contribution(str(i), 1 / count, self.workload.scaling) for i in range(count)]
        return [
            aggregate_shard(self.layout, index, contributions, partial(_load, updates, index))
            for index in range(len(self.layout.shards))
        ]

    def restored(self, results: Iterable[bytes]) -> Iterator[Restored]:
        """What a client decrypts, shard by shard."""
        contents = (decode_result(self.layout, index, data) for index, data in enumerate(results))
        return restored_parts(self.layout, contents, self.orders, Decryptor(self.key))


def _load(updates: list[list[bytes]], shard: int, client: str) -> bytes:
    return updates[int(client)][shard]


class Measurement:
    """Runs the round again and again, and once compares its result with float64."""

    def __init__(self, workload: Workload) -> None:
        key = SecretKey.generate(STANDARD)
        self._workload = workload
        self._protected = Round(workload, key, workload.columns / workload.features)
        self._clear = Round(workload, key, 0.0)
        self._clear_updates = self._clear.all_protected(Cost(), Cost())
        shards = self._protected.layout.shards
        self.found = Ours(
            chunks=sum(PRODUCTS.chunk_count(self._protected.layout, shard) for shard in shards),
            shards=len(shards),
        )
        self._results: list[bytes] = []

    def part(self) -> None:
        """The whole round once, protected, and once with nothing encrypted."""
        self.found.encryption.runs.append(Cost())
        self.found.protection.runs.append(Cost())
        updates = self._protected.all_protected(
            self.found.encryption.runs[-1], self.found.protection.runs[-1]
        )
        with self.found.validation.measured():
            for shards in updates:
                for index, data in enumerate(shards):
                    validate_update(self._protected.layout, index, data)
        with self.found.aggregation.measured():
            self._results = self._protected.aggregated(updates)
        with self.found.clear_aggregation.measured():
            self._clear.aggregated(self._clear_updates)
        layout = self._protected.layout
        uploads = [decode_update(layout, index, data).ciphertexts for index, data in enumerate(updates[0])]
        self.found.upload_bytes = sum(map(len, uploads))
        self.found.upload_clear_bytes = sum(map(len, updates[0])) - self.found.upload_bytes

    def compare(self, step: Callable[[], None]) -> None:
        """Restores the last result and compares every entry of every ΔW; `step` is called after each matrix."""
        layout = self._protected.layout
        downloads = [
            decode_result(layout, index, data).ciphertexts for index, data in enumerate(self._results)
        ]
        self.found.download_bytes = sum(map(len, downloads))
        self.found.download_clear_bytes = sum(map(len, self._results)) - self.found.download_bytes
        with self.found.restoration.measured():
            restored = merged(self._protected.restored(self._results))
        for name in self._workload.names:
            _compare(self._workload, name, restored.matrices.pop(name), self.found)
            step()


def measure_once(workload: Workload, budget: float) -> Once:
    """A round in which every client encrypts that share of the columns of A, and the rest travels in 16 bits."""
    found = Once()
    shards = Round(workload, SecretKey.generate(STANDARD), budget, CLEAR_BITS[0])
    updates = [shards.protected(0, found.encryption, found.protection)]
    for index, data in enumerate(updates[0]):
        found.upload_bytes += len(validate_update(shards.layout, index, data).ciphertexts)
    found.upload_clear_bytes = sum(map(len, updates[0])) - found.upload_bytes
    updates += [shards.protected(client, Cost(), Cost()) for client in range(1, workload.clients)]
    with found.aggregation.measured():
        results = shards.aggregated(updates)
    found.download_bytes = sum(map(len, results))
    restored = merged(shards.restored(results))
    for name in workload.names:
        _compare(workload, name, restored.matrices.pop(name), found)
    return found


def _compare(workload: Workload, name: str, update: FactoredUpdate, found: Ours | Once) -> None:
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
