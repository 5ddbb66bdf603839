"""What each method makes of the same updates: who is exact, who is not, and that ours is."""

import numpy as np
import pytest

from compare.methods.registry import METHODS
from compare.state import Held, World, dense, effective_rank
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.shards import LoraFactors
from shelora.obfuscation import Obfuscation

MATRICES = (Matrix("query", 40, 48), Matrix("value", 40, 48))
TENSORS = (Tensor("weight", (3, 40)), Tensor("bias", (3,)))
SCALING = 2.0


def world(ranks=(2, 4, 4), tensors=TENSORS) -> World:
    weights = np.arange(1.0, len(ranks) + 1)
    return World(
        matrices=MATRICES,
        tensors=tensors,
        ranks=ranks,
        weights=weights / weights.sum(),
        scaling=SCALING,
        obfuscation=Obfuscation(bytes(32), 1),
        steps_per_round=16,
        learning_rate=3e-3,
        inputs={m.name: np.diag(np.arange(48.0)) for m in MATRICES},
    )


def trained(held, seed, *, A=True, B=True) -> Held:
    """As after local steps that moved every value by at most 16 times 3e-3: mostly the same way at all clients."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)

    def moved(values, moves):
        move = common.uniform(-0.045, 0.045, (48, 48))[tuple(slice(size) for size in (1, *values.shape)[-2:])]
        move = move.reshape(values.shape)
        return (values + moves * (move + own.uniform(-0.003, 0.003, values.shape))).astype(np.float32)

    factors = {name: LoraFactors(moved(f.B, B), moved(f.A, A)) for name, f in held.factors.items()}
    return Held(factors=factors, head={n: moved(v, 1) for n, v in held.head.items()}, beside=held.beside)


def after_a_round(name, ranks=(2, 4, 4), tensors=TENSORS):
    """The method, what its clients trained, and its outcome."""
    there, method = world(ranks, tensors), METHODS[name]()
    sides = dict(zip("AB", method.trains(1), strict=True))
    updates = [trained(held, seed, **sides) for seed, held in enumerate(method.begin(there))]
    return there, updates, method.combine(updates, 1)


def exact(there, updates, name):
    return sum(w * dense(u, name, SCALING) for w, u in zip(there.weights, updates, strict=True))


def error(there, updates, outcome) -> float:
    """Of the model that is handed out, against the exact sum of the products: the larger over the matrices."""
    errors = []
    for m in MATRICES:
        wanted = exact(there, updates, m.name)
        found = dense(outcome.models[0], m.name, SCALING)
        errors.append(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return max(errors)


def best_cut(there, updates, rank) -> float:
    """The least error that a model of that rank has."""
    values = [np.linalg.svd(exact(there, updates, m.name), compute_uv=False) for m in MATRICES]
    return max(np.linalg.norm(v[rank:]) / np.linalg.norm(v) for v in values)


@pytest.mark.parametrize("name", ["complete", "selective", "exact", "flora"])
def test_methods_that_sum_products_hand_out_their_exact_sum_up_to_the_cut(name):
    there, updates, outcome = after_a_round(name)
    assert best_cut(there, updates, 4) < 0.1
    assert error(there, updates, outcome) < (0.002 if name == "flora" else 0.02)
    for tensor in TENSORS:
        mean = sum(w * u.head[tensor.name] for w, u in zip(there.weights, updates, strict=True))
        np.testing.assert_allclose(outcome.models[0].head[tensor.name], mean, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_whose_head_is_frozen_has_factors_alone(name):
    there, updates, outcome = after_a_round(name, tensors=())
    assert all(not held.head for held in outcome.held)
    if name in {"complete", "selective", "exact"}:
        assert error(there, updates, outcome) < 0.02
    assert all(np.isfinite(dense(held, "query", SCALING)).all() for held in outcome.held)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("fedit", 0.5, 2), ("exact", 0, 1e-4), ("complete", 0, 0.1)]
)
def test_a_client_with_both_signs_turned_has_the_same_product_and_only_averages_are_lost_over_it(
    name, least, most
):
    there, method = world((4, 4)), METHODS[name]()
    method.begin(there)
    base = trained(there.initial(4), 0)
    turned = Held(factors={n: LoraFactors(-f.B, -f.A) for n, f in base.factors.items()}, head=base.head)
    outcome = method.combine([base, turned], 1)
    assert least <= error(there, [base, base], outcome) < most


@pytest.mark.parametrize("name", ["ffa", "ffa-activations", "rolora"])
def test_training_one_factor_makes_averages_exact_at_equal_ranks(name):
    there, updates, outcome = after_a_round(name, (4, 4, 4))
    assert error(there, updates, outcome) < 1e-5


def test_the_factor_that_is_frozen_does_not_move():
    ffa, rolora = METHODS["ffa"](), METHODS["rolora"]()
    assert [ffa.trains(n) for n in (1, 2)] == [(False, True)] * 2
    assert [rolora.trains(n) for n in (1, 2)] == [(False, True), (True, False)]


def test_directions_from_activations_are_the_strongest_ones():
    method = METHODS["ffa-activations"]()
    held = method.begin(world())[1]
    A = held.factors["query"].A
    assert set(np.abs(A).argmax(axis=1).tolist()) == {44, 45, 46, 47}
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1 / np.sqrt(3), rtol=1e-5)


def test_columns_that_are_dropped_or_divided_twice_are_those_with_the_largest_inputs():
    for name, kept in (("dropped", 0.0), ("published", 1 / 3)):
        there, updates, outcome = after_a_round(name)
        found, wanted = dense(outcome.models[0], "query", SCALING), exact(there, updates, "query")
        large = slice(43, 48)  # ten percent of 48, which are the last ones too
        np.testing.assert_allclose(found[:, large], kept * wanted[:, large], atol=0.02 * np.abs(wanted).max())
        np.testing.assert_allclose(found[:, :43], wanted[:, :43], atol=0.02 * np.abs(wanted).max())


def test_turning_makes_clients_whose_factors_are_turned_alike_agree_and_keeps_products():
    there = world((4, 4))
    base = trained(there.initial(4), 0)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0].astype(np.float32)
    turned = Held(
        factors={n: LoraFactors(f.B @ rotation.T, rotation @ f.A) for n, f in base.factors.items()},
        head=base.head,
    )
    errors = {}
    for name in ("fedrot", "fedit"):
        method = METHODS[name]()
        method.begin(there)
        outcome = method.combine([base, turned], 1)
        errors[name] = error(there, [base, base], outcome)
    assert errors["fedrot"] < 1e-4
    assert errors["fedit"] > 0.1, "the control: without turning they do not"


def test_complete_keeps_beside_the_factors_what_is_beyond_a_clients_rank():
    _, _, outcome = after_a_round("complete")
    whole = dense(outcome.held[1], "query", SCALING)
    np.testing.assert_allclose(dense(outcome.held[0], "query", SCALING), whole, atol=1e-5)
    assert outcome.held[0].rank == 2


def test_sums_of_a_second_round_build_on_the_first():
    for name in ("complete", "selective"):
        there, method = world(), METHODS[name]()
        held = method.begin(there)
        held = method.combine([trained(h, i) for i, h in enumerate(held)], 1).held
        updates = [trained(h, 7 + i) for i, h in enumerate(held)]
        outcome = method.combine(updates, 2)
        assert error(there, updates, outcome) < 0.02, name


def test_bytes_are_those_of_what_is_sent():
    factors = sum(m.out_features + m.in_features for m in MATRICES)
    head = sum(t.size for t in TENSORS)
    _, _, outcome = after_a_round("exact", (4, 4, 4))
    assert outcome.up == outcome.down == 4 * (4 * factors + head)
    _, _, outcome = after_a_round("flora", (4, 4, 4))
    assert outcome.down == 4 * (12 * factors + head)
    _, _, outcome = after_a_round("complete", (4, 4, 4))
    assert 0 < outcome.up < outcome.down + 1
    _, _, outcome = after_a_round("alone")
    assert outcome.up == outcome.down == 0
    assert len(outcome.models) == 3


def test_effective_rank_counts_directions():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.outer(np.arange(4.0), np.arange(5.0))) == pytest.approx(1)
    assert effective_rank(np.zeros((3, 3))) == 0
