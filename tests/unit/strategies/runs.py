"""A strategy from a model and its clients' updates to what agents hold, through all that happens in between."""

from dataclasses import dataclass, field, replace

import numpy as np

from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.noise import ClientNoise
from shelora.lora.restore import merged
from shelora.lora.shards import LoraFactors
from shelora.obfuscation import Obfuscation
from shelora.strategies.agents.port import AgentContext
from shelora.strategies.port import RoundTerms

MATRICES = (Matrix("layer.0.query", 12, 20), Matrix("layer.0.value", 12, 16))
TENSORS = (Tensor("head.weight", (3, 12)), Tensor("head.bias", (3,)))


@dataclass(frozen=True)
class SumProtection:
    """The terms of a federation in complete mode."""

    parameters: str = "standard"
    tensor_bound: float = 2.0
    max_directions: int = 64
    clear_bits: int = 32
    noise: ClientNoise | None = None
    mean_figures: bool = False


@dataclass(frozen=True)
class Model:
    rank: int
    scaling: float
    matrices: tuple[Matrix, ...] = MATRICES
    tensors: tuple[Tensor, ...] = TENSORS


@dataclass(frozen=True)
class Client:
    """A model with what was trained in it."""

    model: Model
    weight: float
    factors: dict[str, LoraFactors]
    tensors: dict[str, np.ndarray]
    frozen: dict = field(default_factory=dict)
    exponents: dict = field(default_factory=dict)


def client(seed, rank, weight, scaling=2.0, A=None):
    rng = np.random.default_rng(seed)
    factors = {
        m.name: LoraFactors(
            (0.05 * rng.standard_normal((m.out_features, rank))).astype(np.float32),
            A(m, rank) if A else (0.2 * rng.standard_normal((rank, m.in_features))).astype(np.float32),
        )
        for m in MATRICES
    }
    tensors = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in TENSORS}
    return Client(Model(rank, scaling), weight, factors, tensors)


def sums(clients):
    """Σ w_i s_i B_i A_i by matrix and Σ w_i t_i by tensor, in float64."""
    matrices = {
        m.name: sum(
            c.weight * c.model.scaling * c.factors[m.name].B.astype(float) @ c.factors[m.name].A.astype(float)
            for c in clients
        )
        for m in MATRICES
    }
    return matrices, {
        t.name: sum(c.weight * c.tensors[t.name].astype(float) for c in clients) for t in TENSORS
    }


def run(public, secret, clients, terms, obfuscation=None, key=None, round_=None):
    """What every agent holds after a round of a strategy whose secrets are the epoch's."""
    key = key or SecretKey.generate(terms.ckks)
    obfuscation = obfuscation or Obfuscation(bytes(32), 1)
    max_rank = max(c.model.rank for c in clients)
    round_ = replace(round_ or RoundTerms(key_id=key.key_id, max_rank=1), max_rank=max_rank)
    layout = public.layout(clients[0].model, terms, round_)
    updates = []
    for c in clients:
        context = AgentContext(
            model=c.model, obfuscation=obfuscation, encryptor=Encryptor(key), decryptor=Decryptor(key)
        )
        secret.check(layout, c.model, terms, None, 0.0)
        updates.append([encode_update(layout, content) for content in secret.protect(layout, c, context)])
        for index, data in enumerate(updates[-1]):
            validate_update(layout, index, data)
            shard = layout.shard(index)
            assert len(data) <= kind_of(shard).largest_update_bytes(layout, shard, layout.max_rank)
    members = [Contribution(str(i), c.weight, c.model.scaling) for i, c in enumerate(clients)]
    contents = [
        decode_result(layout, i, aggregate_shard(layout, i, members, lambda c, i=i: updates[int(c)][i]))
        for i in range(len(layout.shards))
    ]
    secret.check_result(layout, clients[0].model)
    context = AgentContext(model=clients[0].model, obfuscation=obfuscation, decryptor=Decryptor(key))
    return merged(secret.restored(layout, contents, context))
