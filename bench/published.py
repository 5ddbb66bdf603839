"""The published way: TenSEAL vectors, four columns of A a ciphertext, a product of B and A column by column.

Described in the paper's own benchmark, written anew here: `ts.context(CKKS, 8192, [60, 40, 60])` at scale 2^24
with Galois keys; a client packs four columns of A (rank 8, so 32 values) in a ciphertext; the server forms each
column of B A under encryption by `CKKSVector.mm`, with B in the rows of that column and zero in those of the other
three, and sums over clients. The result is one ciphertext of `features` values a column.

A product takes a fifth of a second, so some are measured and all are taken to cost their median.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, TypeAlias

import numpy as np
import tenseal as ts

from bench.workload import Costs, Workload
from shelora.lora.shards import Float32, Float64

PACKED_COLUMNS = 4
"""Columns of A in one ciphertext."""

Vector: TypeAlias = Any
"""A CKKSVector; TenSEAL has no types."""


@dataclass(kw_only=True)
class Published:
    """What was measured; each cost is that of one vector, one product or one column."""

    workload: Workload
    encryption: Costs = field(default_factory=Costs)
    loading: Costs = field(default_factory=Costs)
    products: Costs = field(default_factory=Costs)
    """A product and its addition to the sum."""
    saving: Costs = field(default_factory=Costs)
    clear: Costs = field(default_factory=Costs)
    """Sum over clients of B A of the clear columns of one matrix."""
    vector_bytes: list[int] = field(default_factory=list)
    column_bytes: list[int] = field(default_factory=list)
    max_abs_error: float = 0.0

    @property
    def vectors(self) -> int:
        """Ciphertexts of one client in the whole round."""
        return self.workload.matrices * -(-self.workload.columns // PACKED_COLUMNS)

    @property
    def columns(self) -> int:
        """Encrypted columns of the whole round."""
        return self.workload.matrices * self.workload.columns

    @property
    def encrypt_cpu_s(self) -> float:
        """All clients, whole round."""
        return self.encryption.usual.cpu_s * self.vectors * self.workload.clients

    @property
    def multiply_cpu_s(self) -> float:
        """Products and sums alone, whole round."""
        return self.products.usual.cpu_s * self.columns * self.workload.clients

    @property
    def aggregate_cpu_s(self) -> float:
        """From the clients' bytes to the result's bytes, clear columns included, whole round."""
        loading = self.loading.usual.cpu_s * self.vectors * self.workload.clients
        clear = self.clear.usual.cpu_s * self.workload.matrices
        return loading + self.multiply_cpu_s + self.saving.usual.cpu_s * self.columns + clear

    @property
    def upload_bytes(self) -> float:
        """Ciphertexts of one client, whole round."""
        return mean(self.vector_bytes) * self.vectors

    @property
    def download_bytes(self) -> float:
        """Ciphertexts of the result, whole round."""
        return mean(self.column_bytes) * self.columns


class Measurement:
    """Measures the published way part by part, so that the machine is the same for both ways."""

    def __init__(self, workload: Workload) -> None:
        self.found = Published(workload=workload)
        self._context = _context()
        self._clients = [workload.factors(client, workload.names[0]) for client in range(workload.clients)]

    def part(self, index: int, columns: int, step: Callable[[], None]) -> None:
        """Encrypts one matrix and aggregates some columns of it; `step` is called after each product."""
        workload = self.found.workload
        self._encrypt(workload.factors(0, workload.names[index % workload.matrices]).A)
        for first in range(0, columns, PACKED_COLUMNS):
            packed = [self._load(client.A, first) for client in self._clients]
            for column in range(first, min(first + PACKED_COLUMNS, columns)):
                self._aggregate(packed, column, step)
        self._clear_columns()

    def _encrypt(self, A: Float32) -> None:
        for first in range(0, self.found.workload.columns, PACKED_COLUMNS):
            values = _packed(A, first)
            with self.found.encryption.measured():
                data = ts.ckks_vector(self._context, values).serialize()
            self.found.vector_bytes.append(len(data))

    def _load(self, A: Float32, first: int) -> Vector:
        data = ts.ckks_vector(self._context, _packed(A, first)).serialize()
        with self.found.loading.measured():
            return ts.ckks_vector_from(self._context, data)

    def _aggregate(self, packed: list[Vector], column: int, step: Callable[[], None]) -> None:
        total: Vector = None
        expected = np.zeros(self.found.workload.features)
        for client, vector in zip(self._clients, packed, strict=True):
            B = self.found.workload.scaling / len(packed) * client.B.astype(np.float64)
            expected += B @ client.A[:, column].astype(np.float64)
            block = _column_block(B, column % PACKED_COLUMNS, vector.size())
            with self.found.products.measured():
                product = vector.mm(block)
                total = product if total is None else total + product
            step()
        with self.found.saving.measured():
            data = total.serialize()
        self.found.column_bytes.append(len(data))
        error = float(np.abs(np.array(total.decrypt()) - expected).max())
        self.found.max_abs_error = max(self.found.max_abs_error, error)

    def _clear_columns(self) -> None:
        features, columns = self.found.workload.features, self.found.workload.columns
        with self.found.clear.measured():
            total = np.zeros((features, features - columns), np.float32)
            for client in self._clients:
                total += client.B @ client.A[:, columns:]


def _context() -> ts.Context:
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
    context.global_scale = 2**24
    context.generate_galois_keys()
    return context


def _packed(A: Float32, first: int) -> list[float]:
    """Four columns of A, one after the other."""
    values: list[float] = A[:, first : first + PACKED_COLUMNS].T.ravel().tolist()
    return values


def _column_block(B: Float64, place: int, size: int) -> list[list[float]]:
    """Bᵀ in the rows of one of the packed columns, zero in those of the others."""
    block = np.zeros((size, B.shape[0]))
    block[place * B.shape[1] : (place + 1) * B.shape[1]] = B.T
    rows: list[list[float]] = block.tolist()
    return rows
