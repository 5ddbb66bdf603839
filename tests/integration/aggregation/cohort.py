"""A cohort with a key, its updates as bytes, and what their aggregate must be, in float64."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.lora.codec import decode_result, encode_update
from shelora.lora.layout import Layout, Matrix, Shard, Tensor
from shelora.lora.protect import protect
from shelora.lora.restore import restore
from shelora.lora.shards import LoraFactors, UpdateShardContent
from shelora.v1 import aggregation_pb2 as pb

RANK = 4
MATRIX_NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class Update:
    factors: dict[str, LoraFactors]
    tensors: dict[str, np.ndarray]
    contents: tuple[UpdateShardContent, ...]
    scaling: float


def small_layout(key_id: bytes) -> Layout:
    return Layout(
        parameters=INSECURE_TOY.name,
        key_id=key_id,
        matrices=tuple(Matrix(name, 24, 40, tier_columns=(10, 6)) for name in MATRIX_NAMES),
        tensors=(Tensor("head", (5, 7)),),
        tiers=(0.25, 0.4),
        encrypt_tensors=True,
        max_rank=RANK,
        max_directions=16,
        shards=(Shard(matrices=(0, 1)), Shard(matrices=(2,)), Shard(tensors=(0,))),
    )


def large_layout(_key_id: bytes = b"") -> Layout:
    """One shard of 4 MiB, in the clear: several batches of an upload."""
    return Layout(
        parameters=INSECURE_TOY.name,
        key_id=b"",
        matrices=(Matrix("wide", 2**18, 8),),
        tensors=(),
        tiers=(),
        encrypt_tensors=False,
        max_rank=RANK,
        max_directions=8,
        shards=(Shard(matrices=(0,)),),
    )


class Cohort:
    """Clients `client-0`, `client-1` and so on; client i encrypts no, one, two tiers in turn."""

    def __init__(self, size: int = 3, layout: Callable[[bytes], Layout] = small_layout) -> None:
        self._random = np.random.default_rng(1)
        self.key = SecretKey.generate(INSECURE_TOY)
        self.layout = layout(self.key.key_id)
        self.orders = {m.name: self._random.permutation(m.in_features) for m in self.layout.matrices}
        self.clients = [f"client-{i}" for i in range(size)]
        self.updates = {client: self._update(i) for i, client in enumerate(self.clients)}
        weights = self._random.random(size) + 0.1
        self.weights = dict(zip(self.clients, (weights / weights.sum()).tolist(), strict=True))

    def shard_bytes(self, client: str, shard: int) -> bytes:
        return encode_update(self.layout, self.updates[client].contents[shard])

    def altered(self, client: str, shard: int, **changes: object) -> bytes:
        """A client's shard with other contents, as a faulty or hostile client could send it."""
        return encode_update(self.layout, replace(self.updates[client].contents[shard], **changes))

    def contributions(self, shard: int, clients: Sequence[str] | None = None) -> list[pb.Contribution]:
        return [
            pb.Contribution(
                client_id=client,
                sha256=hashlib.sha256(self.shard_bytes(client, shard)).digest(),
                weight=self.weights[client],
                scaling=self.updates[client].scaling,
            )
            for client in clients or self.clients
        ]

    def assert_aggregate(self, results: Sequence[bytes]) -> None:
        """Compares decrypted results with the sums in float64."""
        contents = [decode_result(self.layout, index, data) for index, data in enumerate(results)]
        restored = restore(self.layout, contents, self.orders, Decryptor(self.key))
        for name, factored in restored.matrices.items():
            wanted = sum(
                self.weights[c]
                * u.scaling
                * u.factors[name].B.astype(float)
                @ u.factors[name].A.astype(float)
                for c, u in self.updates.items()
            )
            np.testing.assert_allclose(factored.Q @ factored.M, wanted, atol=1e-5 * np.abs(wanted).max())
        for name, value in restored.tensors.items():
            wanted = sum(self.weights[c] * u.tensors[name].astype(float) for c, u in self.updates.items())
            np.testing.assert_allclose(value, wanted, atol=1e-5)
        assert set(restored.matrices) == {m.name for m in self.layout.matrices}
        assert set(restored.tensors) == {t.name for t in self.layout.tensors}

    def _update(self, number: int) -> Update:
        factors = {
            m.name: LoraFactors(self._normal(m.out_features, RANK), self._normal(RANK, m.in_features))
            for m in self.layout.matrices
        }
        tensors = {
            t.name: self._random.uniform(-1, 1, t.shape).astype(np.float32) for t in self.layout.tensors
        }
        encryptor = Encryptor(self.key) if self.layout.encrypts else None
        tiers = number % (len(self.layout.tiers) + 1)
        contents = tuple(protect(self.layout, factors, tensors, tiers, self.orders, encryptor))
        return Update(factors, tensors, contents, scaling=0.5 + number)

    def _normal(self, *shape: int) -> np.ndarray:
        return self._random.normal(size=shape).astype(np.float32)
