"""A network trains each client of a cohort as if it were alone, and is the model that it is cut from."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import EfficientNetConfig, EfficientNetModel, LlamaConfig, LlamaForCausalLM

from client_agent.encoding import NOT_LEARNT
from client_agent.encoding import Encoded as Tokens
from compare.data import Encoded, cached, split
from compare.datasets.digits import below
from compare.datasets.instructions import arranged
from compare.networks.lite0 import Lite0
from compare.networks.minilm import MiniLm
from compare.networks.port import Adapters, Network, Schedule
from compare.networks.smollm2 import UNLEARNT, SmolLm2
from compare.state import Held, World, dense
from shelora.lora.layout import Matrix
from shelora.obfuscation import Obfuscation

WIDTH, EXAMPLES, TESTS, CLASSES = 24, 120, 20, 3
SCALING = 2.0
LABELS = np.arange(EXAMPLES) % CLASSES


def minilm() -> tuple[Network, Encoded]:
    states = separable(4, WIDTH)
    present = np.ones((EXAMPLES, 4), bool)
    present[::5, 3] = False
    data = Encoded(inputs={"states": states, "present": present}, labels=LABELS, tests=TESTS)
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
    return MiniLm(weights, data), data


def efficientnet() -> EfficientNetModel:
    """A small one with normalisations that do something and open gates, as Lite0's are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EfficientNetConfig(
            hidden_act="relu6",
            width_coefficient=0.1,
            depth_coefficient=0.1,
            squeeze_expansion_ratio=1e-3,
            image_size=64,
            hidden_dim=128,
        )
        model = EfficientNetModel(config).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.normal_(std=0.1)
        for block in model.encoder.blocks:
            gates = block.squeeze_excite.expand
            nn.init.zeros_(gates.weight)
            nn.init.constant_(gates.bias, 30.0)
    return model


def pixels() -> torch.Tensor:
    return torch.randn(EXAMPLES, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def separable(positions: int, width: int, strength: float = 2.0) -> np.ndarray:
    """States with something of each label in a dimension of its own."""
    states = np.random.default_rng(0).standard_normal((EXAMPLES, positions, width)).astype(np.float32)
    states[:, :, :CLASSES] += strength * np.eye(CLASSES, dtype=np.float32)[LABELS][:, None]
    return states


def lite0() -> tuple[Network, Encoded]:
    model = efficientnet()
    states = separable(4, model.encoder.blocks[-1].expansion.expand_conv.in_channels, 6.0)
    data = Encoded(inputs={"states": states}, labels=LABELS, tests=TESTS)
    return Lite0(model, data), data


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def conversations() -> list[Tokens]:
    """Questions of 3 to 8 tokens; an answer repeats its question's label 2 to 5 times."""
    rng = np.random.default_rng(2)
    examples = []
    for label in LABELS.tolist():
        question = [*rng.integers(10, 40, rng.integers(2, 8)).tolist(), 40 + label]
        answer = [50 + label] * int(rng.integers(2, 6))
        examples.append(Tokens(question + answer, [NOT_LEARNT] * len(question) + answer))
    return examples


def smollm2(model: LlamaForCausalLM | None = None) -> tuple[Network, Encoded]:
    model = model or llama()
    data = Encoded(inputs=arranged(model, conversations()), labels=LABELS, tests=TESTS)
    return SmolLm2(model, data), data


NETWORKS = pytest.mark.parametrize("made", [minilm, lite0, smollm2])
Made = Callable[[], tuple[Network, Encoded]]


def clients(net: Network, ranks=(2, 6, 4)) -> list[Held]:
    world = World(
        matrices=net.matrices,
        tensors=net.tensors,
        ranks=ranks,
        weights=np.full(len(ranks), 1 / len(ranks)),
        scaling=SCALING,
        obfuscation=Obfuscation(bytes(32), 1),
        steps_per_round=5,
        learning_rate=1e-2,
    )
    return [world.initial(rank) for rank in ranks]


def schedule(count: int, **fields) -> Schedule:
    rng = np.random.default_rng(1)
    batches = [[rng.choice(100, 8, replace=False).tolist() for _ in range(5)] for _ in range(count)]
    return Schedule(batches=batches, learning_rate=1e-2, **fields)


def long_trained(net: Network) -> Held:
    plan = Schedule(batches=[[list(range(100))] * 40], learning_rate=1e-2)
    return net.train(clients(net, (6,)), plan, SCALING)[0]


@NETWORKS
def test_a_cohort_trains_every_client_as_if_it_were_alone_whatever_the_others_ranks(made: Made):
    net, _ = made()
    held = clients(net)
    plan = schedule(3)
    together = net.train(held, plan, SCALING)
    for i, own in enumerate(held):
        alone = Schedule(batches=plan.batches[i : i + 1], learning_rate=plan.learning_rate)
        (single,) = net.train([own], alone, SCALING)
        for name in single.factors:
            np.testing.assert_allclose(
                dense(together[i], name, SCALING), dense(single, name, SCALING), atol=2e-3
            )
        assert max(np.abs(f.B).max() for f in single.factors.values()) > 1e-2, "the control: it has moved"


@NETWORKS
def test_only_what_is_to_be_trained_moves(made: Made):
    net, _ = made()
    before = clients(net)
    for train_A, train_B in ((True, False), (False, True)):
        # Where B is zero no gradient reaches A: a first round moves B.
        start = net.train(before, schedule(3), SCALING)
        after = net.train(start, schedule(3, train_A=train_A, train_B=train_B), SCALING)
        for one, other in zip(start, after, strict=True):
            for name, factors in one.factors.items():
                assert (np.abs(other.factors[name].A - factors.A).max() > 1e-4) == train_A
                assert (np.abs(other.factors[name].B - factors.B).max() > 1e-4) == train_B


@NETWORKS
def test_training_learns_and_what_is_beside_the_factors_counts(made: Made):
    net, data = made()
    tests = np.arange(data.training, len(data.labels))
    (start,) = clients(net, (6,))
    held = long_trained(net)
    figure = net.measured(held, tests, SCALING).mean
    if net.tensors:
        assert figure > 0.75, "accuracy"
    else:
        assert figure < 0.5 * net.measured(start, tests, SCALING).mean, "loss"
    beside = {name: (SCALING * f.B @ f.A).astype(np.float32) for name, f in held.factors.items()}
    merged = Held(factors=start.factors, head=held.head, beside=beside)
    assert net.measured(merged, tests, SCALING).mean == pytest.approx(figure, abs=1e-3)
    bare = Held(factors=start.factors, head=held.head)
    every = np.arange(EXAMPLES)
    assert not np.allclose(
        net.measured(bare, every, SCALING).totals, net.measured(merged, every, SCALING).totals, atol=1e-3
    )


def test_a_head_that_is_frozen_is_none_of_what_clients_hold():
    net, _ = smollm2()
    held = clients(net)
    assert net.tensors == ()
    assert all(not after.head for after in net.train(held, schedule(3), SCALING))


def test_minilms_matrices_are_square():
    assert minilm()[0].matrices[0] == Matrix("query", WIDTH, WIDTH)


def test_the_upper_part_of_lite0_is_the_models_with_adapters_added_to_its_convolutions():
    model = efficientnet()
    with torch.no_grad():
        states = below(model, pixels()).flatten(2).mT.contiguous().numpy()
    net = Lite0(model, Encoded(inputs={"states": states}, labels=LABELS, tests=TESTS))
    block = model.encoder.blocks[-1]
    places = {
        "expand": block.expansion.expand_conv,
        "project": block.projection.project_conv,
        "top": model.encoder.top_conv,
    }
    for held in (clients(net, (6,))[0], long_trained(net)):
        changes = {name: torch.from_numpy(dense(held, name, SCALING)).float() for name in places}
        with torch.no_grad():
            found = net.pooled(Adapters(net.matrices, [held], SCALING), torch.arange(EXAMPLES))
            for name, convolution in places.items():
                convolution.weight += changes[name][:, :, None, None]
            wanted = model(pixels()).pooler_output
            for name, convolution in places.items():
                convolution.weight -= changes[name][:, :, None, None]
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-3)
    assert changes["project"].abs().max() > 1e-2, "the control: there was something to add"


def test_the_last_layer_of_smollm2_gives_the_models_loss_of_answers_with_adapters_added():
    model = llama()
    net, data = smollm2(model)
    examples, words = conversations(), torch.from_numpy(data.inputs["words"])
    assert len(words) < model.config.vocab_size, "the control: not every token is in use"
    attention = model.model.layers[-1].self_attn
    places = {"query": attention.q_proj, "value": attention.v_proj, "attended": attention.o_proj}
    for held in (clients(net, (6,))[0], long_trained(net)):
        changes = {name: torch.from_numpy(dense(held, name, SCALING)).float() for name in places}
        measured = net.measured(held, np.arange(EXAMPLES), SCALING)
        with torch.no_grad():
            for name, linear in places.items():
                linear.weight += changes[name]
            wanted = [answer_loss(model, one, words) for one in examples]
            for name, linear in places.items():
                linear.weight -= changes[name]
        np.testing.assert_allclose(measured.totals, wanted, rtol=1e-3, atol=1e-3)
    counts = [sum(target != NOT_LEARNT for target in one.targets) for one in examples]
    assert measured.counts.tolist() == counts
    assert measured.mean == pytest.approx(sum(wanted) / sum(counts), rel=1e-3)


def answer_loss(model: LlamaForCausalLM, one: Tokens, words: torch.Tensor) -> float:
    """Nats of all tokens of an answer, chosen among these words."""
    logits = model(input_ids=torch.tensor([one.ids])).logits[0, :-1]
    following = torch.tensor(one.targets[1:])
    learnt = following != NOT_LEARNT
    targets = torch.searchsorted(words, following[learnt])
    return float(functional.cross_entropy(logits[learnt][:, words], targets, reduction="sum"))


def test_conversations_end_at_the_last_position():
    _, data = smollm2()
    states, targets = data.inputs["states"], data.inputs["targets"]
    words = data.inputs["words"]
    for i, one in enumerate(conversations()):
        assert (states[i] != 0).any(axis=1).sum() == len(one.ids) - 1
        learnt = targets[i][targets[i] != UNLEARNT]
        assert words[learnt].tolist() == [target for target in one.targets if target != NOT_LEARNT]
        assert targets[i, -1] != UNLEARNT


@NETWORKS
def test_moments_are_of_what_each_matrix_sees(made: Made):
    net, _ = made()
    few, more = (net.moments(clients(net, (2,))[0], np.arange(n), SCALING) for n in (10, 20))
    for m in net.matrices:
        assert few[m.name].shape == (m.in_features, m.in_features)
        np.testing.assert_allclose(few[m.name], few[m.name].T)
        assert 0 < np.trace(few[m.name]) < np.trace(more[m.name])


def test_what_is_encoded_is_kept_and_read_again(tmp_path):
    _, data = minilm()
    calls = []

    def encode() -> Encoded:
        calls.append(1)
        return data

    for _ in range(2):
        found = cached(tmp_path / "data" / "texts-1.npz", encode)
        assert found.tests == TESTS
        assert found.classes == CLASSES
        np.testing.assert_array_equal(found.labels, data.labels)
        assert set(found.inputs) == {"states", "present"}
        for name, values in data.inputs.items():
            np.testing.assert_array_equal(found.inputs[name], values)
    assert len(calls) == 1


def test_every_example_goes_to_one_client_and_nobody_has_too_few():
    _, data = minilm()
    for count, uneven in ((3, True), (8, True), (3, False)):
        parts = split(data, count, uneven=uneven, seed=4, least=8)
        assert sorted(np.concatenate(parts).tolist()) == list(range(data.training))
        assert min(map(len, parts)) >= 8
        again = split(data, count, uneven=uneven, seed=4, least=8)
        assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
