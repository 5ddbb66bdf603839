"""The published way: TenSEAL vectors, four columns of A a ciphertext, a product of B and A column by column.

Described in the paper's own benchmark, written anew here: `ts.context(CKKS, 8192, [60, 40, 60])` at scale 2^24
with Galois keys; a client packs four columns of A (rank 8, so 32 values) in a ciphertext; the server forms each
column of B A under encryption by `CKKSVector.mm`, with B in the rows of that column and zero in those of the other
three, and sums over clients. The result is one ciphertext of `features` values a column.

A product takes a fifth of a second, so some are measured and the others are taken to cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import tenseal as ts

from bench.workload import Cost, Workload
from shelora.lora.shards import Float32, LoraFactors

PACKED_COLUMNS = 4
"""Columns of A in one ciphertext."""
ENCRYPTED_MATRICES = 8
"""Matrices whose encryption is measured, for one client."""

Vector: TypeAlias = Any
"""A CKKSVector; TenSEAL has no types."""


@dataclass
class Published:
    """What was measured, and of how much."""

    workload: Workload
    encryption: Cost = field(default_factory=Cost)
    encrypted_vectors: int = 0
    upload_bytes: int = 0
    """Of the encrypted vectors."""
    loading: Cost = field(default_factory=Cost)
    loaded_vectors: int = 0
    products: Cost = field(default_factory=Cost)
    product_count: int = 0
    saving: Cost = field(default_factory=Cost)
    saved_columns: int = 0
    download_bytes: int = 0
    """Of the saved columns."""
    clear: Cost = field(default_factory=Cost)
    """Sum over clients of B A of the clear columns of one matrix."""
    max_abs_error: float = 0.0

    @property
    def vectors(self) -> int:
        """Ciphertexts of one client in the whole round."""
        return self.workload.matrices * -(-self.workload.columns // PACKED_COLUMNS)

    @property
    def encrypt_cpu_s(self) -> float:
        """All clients, whole round."""
        return self.encryption.cpu_s / self.encrypted_vectors * self.vectors * self.workload.clients

    @property
    def multiply_cpu_s(self) -> float:
        """Products and sums alone, whole round."""
        total = self.workload.matrices * self.workload.columns * self.workload.clients
        return self.products.cpu_s / self.product_count * total

    @property
    def aggregate_cpu_s(self) -> float:
        """From the clients' bytes to the result's bytes, clear columns included, whole round."""
        loading = self.loading.cpu_s / self.loaded_vectors * self.vectors * self.workload.clients
        saving = self.saving.cpu_s / self.saved_columns * self.workload.matrices * self.workload.columns
        return loading + self.multiply_cpu_s + saving + self.clear.cpu_s * self.workload.matrices

    @property
    def upload_bytes_per_client(self) -> float:
        return self.upload_bytes / self.encrypted_vectors * self.vectors

    @property
    def download_bytes_per_client(self) -> float:
        return self.download_bytes / self.saved_columns * self.workload.matrices * self.workload.columns


def measure(workload: Workload, sample: int, step: Callable[[], None]) -> Published:
    """Measures encryption of some matrices and `sample` products; `step` is called after each product."""
    context = _context()
    found = Published(workload)
    for name in workload.names[:ENCRYPTED_MATRICES]:
        _encrypt(context, workload.factors(0, name).A, found)
    name = workload.names[0]
    clients = [workload.factors(client, name) for client in range(workload.clients)]
    columns = range(max(1, min(sample // workload.clients, workload.columns)))
    for first in range(0, len(columns), PACKED_COLUMNS):
        packed = [_load(context, f.A, first, found) for f in clients]
        for column in columns[first : first + PACKED_COLUMNS]:
            _aggregate_column(clients, packed, column, found, step)
    _clear_columns(clients, found)
    return found


def _context() -> ts.Context:
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
    context.global_scale = 2**24
    context.generate_galois_keys()
    return context


def _packed(A: Float32, first: int) -> list[float]:
    """Four columns of A, one after the other."""
    values: list[float] = A[:, first : first + PACKED_COLUMNS].T.ravel().tolist()
    return values


def _encrypt(context: ts.Context, A: Float32, found: Published) -> None:
    for first in range(0, found.workload.columns, PACKED_COLUMNS):
        values = _packed(A, first)
        with found.encryption.measured():
            data = ts.ckks_vector(context, values).serialize()
        found.encrypted_vectors += 1
        found.upload_bytes += len(data)


def _load(context: ts.Context, A: Float32, first: int, found: Published) -> Vector:
    data = ts.ckks_vector(context, _packed(A, first)).serialize()
    with found.loading.measured():
        vector = ts.ckks_vector_from(context, data)
    found.loaded_vectors += 1
    return vector


def _aggregate_column(
    clients: list[LoraFactors], packed: list[Vector], column: int, found: Published, step: Callable[[], None]
) -> None:
    total: Vector = None
    expected = np.zeros(found.workload.features)
    for client, vector in zip(clients, packed, strict=True):
        B = found.workload.scaling / len(clients) * client.B.astype(np.float64)
        expected += B @ client.A[:, column].astype(np.float64)
        block = _column_block(B, column % PACKED_COLUMNS, vector.size())
        with found.products.measured():
            product = vector.mm(block)
            total = product if total is None else total + product
        found.product_count += 1
        step()
    with found.saving.measured():
        data = total.serialize()
    found.saved_columns += 1
    found.download_bytes += len(data)
    error = np.abs(np.array(total.decrypt()) - expected).max()
    found.max_abs_error = max(found.max_abs_error, float(error))


def _column_block(
    B: np.ndarray[tuple[int, ...], np.dtype[np.float64]], place: int, size: int
) -> list[list[float]]:
    """Bᵀ in the rows of one of the packed columns, zero in those of the others."""
    block = np.zeros((size, B.shape[0]))
    block[place * B.shape[1] : (place + 1) * B.shape[1]] = B.T
    rows: list[list[float]] = block.tolist()
    return rows


def _clear_columns(clients: list[LoraFactors], found: Published) -> None:
    with found.clear.measured():
        total = np.zeros(
            (found.workload.features, found.workload.features - found.workload.columns), np.float32
        )
        for client in clients:
            total += client.B @ client.A[:, found.workload.columns :]
