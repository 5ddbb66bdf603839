"""Random cohorts and what their aggregate must be, in float64; the real engine from factors to what agents hold."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Layout, Matrix, Shard, Tensor
from shelora.lora.protect import protect
from shelora.lora.restore import restore
from shelora.lora.shards import LoraFactors
from shelora.negotiation.plan import column_orders, make_plan
from shelora.obfuscation import Obfuscation

SECRET = bytes(range(32))
TOY_KEY = SecretKey.generate(INSECURE_TOY)


@dataclass(frozen=True)
class Member:
    weight: float
    scaling: float
    encrypted_tiers: int
    factors: dict[str, LoraFactors]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    layout: Layout
    orders: dict[str, np.ndarray]
    members: tuple[Member, ...]
    key: SecretKey = TOY_KEY

    def updates(self):
        """By member, by shard: serialized, as the server accepted them."""
        encryptor = Encryptor(self.key)
        updates = []
        for m in self.members:
            contents = protect(self.layout, m.factors, m.tensors, m.encrypted_tiers, self.orders, encryptor)
            updates.append([encode_update(self.layout, content) for content in contents])
            for index, data in enumerate(updates[-1]):
                validate_update(self.layout, index, data)
        return updates

    def contributions(self):
        return [Contribution(str(i), m.weight, m.scaling) for i, m in enumerate(self.members)]

    def results(self, updates):
        return [self.result(index, lambda c, i=index: updates[int(c)][i]) for index in range(len(updates[0]))]

    def result(self, index, load):
        return aggregate_shard(self.layout, index, self.contributions(), load)

    def contents(self, updates=None):
        results = self.results(self.updates() if updates is None else updates)
        return [decode_result(self.layout, index, data) for index, data in enumerate(results)]

    def restored(self, contents=None):
        contents = self.contents() if contents is None else contents
        return restore(self.layout, contents, self.orders, Decryptor(self.key))

    def stacked(self, name):
        """B* and A*: all w_i s_i B_i side by side, all A_i one over the other."""
        B = [m.weight * m.scaling * m.factors[name].B.astype(np.float64) for m in self.members]
        A = [m.factors[name].A.astype(np.float64) for m in self.members]
        return np.hstack(B), np.vstack(A)

    def exact(self, name):
        B, A = self.stacked(name)
        return B @ A

    def mean(self, name):
        return sum(m.weight * m.tensors[name].astype(np.float64) for m in self.members)

    @property
    def terms(self):
        return sum(next(iter(m.factors.values())).A.shape[0] for m in self.members)


def planned(shapes, budgets, seed=0):
    """Matrices with the column counts of a real plan, and the secret column orders."""
    rng = np.random.default_rng(seed)
    bare = [Matrix(f"layer.{i}", out, columns) for i, (out, columns) in enumerate(shapes)]
    if not budgets:
        return tuple(bare), column_orders(None, bare, Obfuscation(SECRET, seed))
    scores = {m.name: rng.exponential(size=m.in_features) for m in bare}
    plan = make_plan(scores, bare, budgets)
    matrices = plan.matrices_with_counts(bare)
    return matrices, column_orders(plan, matrices, Obfuscation(SECRET, seed))


def lora_factors(rng, matrices, rank, *, b=0.01):
    """Factors at LoRA's typical magnitudes."""
    return {
        m.name: LoraFactors(
            (b * rng.standard_normal((m.out_features, rank))).astype(np.float32),
            (rng.uniform(-1, 1, (rank, m.in_features)) / np.sqrt(m.in_features)).astype(np.float32),
        )
        for m in matrices
    }


def shards_of(matrix_cuts, matrices, tensors):
    """Runs of matrices that end at the cuts, and a shard a tensor."""
    ends = sorted({cut for cut in matrix_cuts if 0 < cut < len(matrices)} | {len(matrices)})
    runs = [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False) if a < b]
    return tuple(Shard(matrices=run) for run in runs) + tuple(
        Shard(tensors=(i,)) for i in range(len(tensors))
    )


def layout_of(matrices, tensors=(), *, tiers=(), cuts=(), key=TOY_KEY, **changes):
    values = {
        "parameters": key.parameters.name,
        "key_id": key.key_id,
        "encrypt_tensors": True,
        "max_rank": 8,
        "max_directions": 64,
        "shards": shards_of(cuts, matrices, tensors),
    }
    return Layout(matrices=tuple(matrices), tensors=tuple(tensors), tiers=tuple(tiers), **(values | changes))


BUDGETS = st.lists(st.sampled_from([0.01, 0.1, 0.35, 0.5, 0.8, 1.0]), max_size=3, unique=True).map(sorted)
SHAPES = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 70)), min_size=1, max_size=5)
MAGNITUDES = st.sampled_from([1e-30, 1e-6, 0.01, 1.0, 1e4, 1e20])


@st.composite
def cohorts(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    budgets = draw(BUDGETS)
    matrices, orders = planned(draw(SHAPES), budgets, seed)
    tensors = [
        Tensor(f"head.{i}", shape, draw(st.sampled_from([0.1, 1.0, 3e3])))
        for i, shape in enumerate(draw(st.lists(st.sampled_from([(), (1,), (3, 5), (70,)]), max_size=2)))
    ]
    layout = layout_of(
        matrices,
        tensors,
        tiers=budgets,
        cuts=draw(st.sets(st.integers(1, 4), max_size=2)),
        encrypt_tensors=draw(st.booleans()),
    )
    count = draw(st.integers(2, 5))
    weights = rng.dirichlet(np.full(count, draw(st.sampled_from([0.05, 1.0, 50.0]))))
    members = tuple(_member(draw, rng, layout, float(weight)) for weight in weights)
    return Cohort(layout, orders, members)


def _member(draw, rng, layout, weight):
    rank = draw(st.integers(1, 4))
    factors = lora_factors(rng, layout.matrices, rank, b=draw(MAGNITUDES))
    zeroed = draw(st.sampled_from(["", "", "B", "row of A"]))
    for f in factors.values():
        if zeroed == "B":
            f.B[:] = 0
        elif zeroed == "row of A":
            f.A[0] = 0
    bounds = {t.name: np.float32(t.bound) for t in layout.tensors}
    tensors = {t.name: np.float32(rng.uniform(-1, 1, t.shape)) * bounds[t.name] for t in layout.tensors}
    return Member(
        weight=weight,
        scaling=draw(st.sampled_from([0.25, 1.0, 2.0, 32 / 3])),
        encrypted_tiers=draw(st.integers(0, len(layout.tiers))),
        factors=factors,
        tensors={name: np.asarray(value) for name, value in tensors.items()},
    )
