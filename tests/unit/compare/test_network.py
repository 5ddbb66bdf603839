"""The network that trains a cohort at once trains each client as if it were alone."""

import numpy as np
import torch

from compare.data import Encoded, split
from compare.network import Network, Schedule
from compare.state import Held, World
from shelora.lora.layout import Matrix
from shelora.obfuscation import Obfuscation

WIDTH, EXAMPLES, CLASSES = 24, 120, 3


def network() -> tuple[Network, Encoded]:
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES) % CLASSES
    states = rng.standard_normal((EXAMPLES, 4, WIDTH)).astype(np.float32)
    states[:, :, :CLASSES] += 2 * np.eye(CLASSES, dtype=np.float32)[labels][:, None]
    present = np.ones((EXAMPLES, 4), bool)
    present[::5, 3] = False
    data = Encoded(states=states, present=present, labels=labels, tests=20)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / WIDTH**0.5

    layer = "encoder.layer.5"
    shapes = {
        **{f"{layer}.attention.self.{p}": (WIDTH, WIDTH) for p in ("query", "key", "value")},
        f"{layer}.attention.output.dense": (WIDTH, WIDTH),
        f"{layer}.intermediate.dense": (4 * WIDTH, WIDTH),
        f"{layer}.output.dense": (WIDTH, 4 * WIDTH),
        "pooler.dense": (WIDTH, WIDTH),
    }
    weights = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    for norm in ("attention.output", "output"):
        weights[f"{layer}.{norm}.LayerNorm.weight"] = torch.ones(WIDTH)
        weights[f"{layer}.{norm}.LayerNorm.bias"] = torch.zeros(WIDTH)
    return Network(weights, data), data


def clients(net: Network, ranks=(2, 6, 4)) -> list[Held]:
    world = World(
        matrices=net.matrices,
        tensors=net.tensors,
        ranks=ranks,
        weights=np.full(len(ranks), 1 / len(ranks)),
        scaling=2.0,
        obfuscation=Obfuscation(bytes(32), 1),
        steps_per_round=5,
        learning_rate=1e-2,
    )
    return [world.initial(rank) for rank in ranks]


def schedule(count: int, **fields) -> Schedule:
    rng = np.random.default_rng(1)
    batches = [[rng.choice(100, 8, replace=False).tolist() for _ in range(5)] for _ in range(count)]
    return Schedule(batches=batches, learning_rate=1e-2, **fields)


def test_a_cohort_trains_every_client_as_if_it_were_alone_whatever_the_others_ranks():
    net, _ = network()
    held = clients(net)
    plan = schedule(3)
    together = net.train(held, plan, 2.0)
    for i, own in enumerate(held):
        alone = Schedule(batches=plan.batches[i : i + 1], learning_rate=plan.learning_rate)
        (single,) = net.train([own], alone, 2.0)
        for name in single.factors:
            np.testing.assert_allclose(together[i].factors[name].B, single.factors[name].B, atol=2e-4)
            np.testing.assert_allclose(together[i].factors[name].A, single.factors[name].A, atol=2e-4)
        assert np.abs(single.factors["query"].B).max() > 1e-3, "the control: it has moved"


def test_only_what_is_to_be_trained_moves():
    net, _ = network()
    before = clients(net)
    for train_A, train_B in ((True, False), (False, True)):
        # Where B is zero no gradient reaches A: a first round moves B.
        start = net.train(before, schedule(3), 2.0)
        after = net.train(start, schedule(3, train_A=train_A, train_B=train_B), 2.0)
        for one, other in zip(start, after, strict=True):
            for name, factors in one.factors.items():
                assert (np.abs(other.factors[name].A - factors.A).max() > 1e-4) == train_A
                assert (np.abs(other.factors[name].B - factors.B).max() > 1e-4) == train_B


def test_training_learns_and_what_is_beside_the_factors_counts():
    net, data = network()
    tests = np.arange(data.training, len(data.labels))
    (held,) = net.train(
        clients(net, (6,)), Schedule(batches=[[list(range(100))] * 40], learning_rate=1e-2), 2.0
    )
    told = net.hits(held, tests, 2.0).mean()
    assert told > 0.75
    beside = {name: (2.0 * f.B @ f.A).astype(np.float32) for name, f in held.factors.items()}
    empty = clients(net, (6,))[0].factors
    merged = Held(factors=empty, head=held.head, beside=beside)
    assert net.hits(merged, tests, 2.0).mean() == told
    bare = Held(factors=empty, head=held.head)
    assert net.matrices[0] == Matrix("query", WIDTH, WIDTH)
    assert not np.array_equal(net.hits(bare, np.arange(120), 2.0), net.hits(merged, np.arange(120), 2.0))


def test_every_example_goes_to_one_client_and_nobody_has_too_few():
    _, data = network()
    for count, uneven in ((3, True), (8, True), (3, False)):
        parts = split(data, count, uneven=uneven, seed=4, least=8)
        assert sorted(np.concatenate(parts).tolist()) == list(range(data.training))
        assert min(map(len, parts)) >= 8
        again = split(data, count, uneven=uneven, seed=4, least=8)
        assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
