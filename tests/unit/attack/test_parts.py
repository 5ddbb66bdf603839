import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attack import adam, bases, columns, experiments, spans, tokens
from attack.capture import commands, replayed
from attack.findings import MOST_ERRORS, Finding
from attack.labels import label_leak
from attack.scores import auc, auc_error, recall, rouge, rouge_by_chance
from attack.stage import Client
from client_agent.learning import Weights
from services.aggregation.keys import RoundKeys
from shelora.additive.codec import decode
from shelora.additive.parameters import DEFAULT
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.additive.wire import ShardShape, summand_planes
from shelora.lora.shards import LoraFactors
from shelora.messages import layout_to_proto

ROW = {"setting": "s", "attacker": "a", "data": "d", "attack": "text", "terms": "1 step", "column": "none"}


def resp(*words):
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


@pytest.mark.parametrize(("hidden", "told"), [(True, 0.5), (False, 1.0)])
def test_ciphertexts_of_alike_clients_are_no_more_alike_than_others(hidden, told, monkeypatch):
    """A single AUC of twenty clients is 0.33 now and then; the mean of many tells. Without secrets all are told."""
    if not hidden:
        monkeypatch.setattr(
            SecretKey, "draw", lambda *_: SecretKey(DEFAULT, np.zeros(DEFAULT.degree, np.int64))
        )
    rng, truth = np.random.default_rng(0), np.repeat(np.arange(8), [5, 3, 3, 3, 1, 2, 1, 2])
    shares, clusters = np.eye(8)[truth], rng.uniform(-0.8, 0.8, (8, 2 * DEFAULT.degree))
    shape, found = ShardShape(DEFAULT, 0, clusters.shape[1]), []
    for number in range(60 if hidden else 2):
        keys = (SecretKey.draw(DEFAULT, Csprng.fresh()) for _ in truth)
        encryptions = [key.encryption(number.to_bytes(32), len(truth), Csprng.fresh()) for key in keys]
        sent = [e.encrypt(clusters[label]) for e, label in zip(encryptions, truth, strict=True)]
        kept = [decode(DEFAULT, summand_planes(part, shape), shape.coefficients) for part in sent]
        features = np.array(kept).astype(float)
        found.append(label_leak(features - features.mean(), shares).same_majority_auc)
    assert np.mean(found) == pytest.approx(told, abs=0.06)  # 7 standard errors of 60


@given(st.lists(st.lists(st.binary(max_size=20), min_size=1, max_size=4), max_size=6), st.integers(0, 40))
def test_commands_are_read_as_they_were_written_and_a_cut_one_is_left_out(written, cut):
    log = b"#TS:1700000000\r\n" + b"".join(resp(*words) for words in written)
    assert list(commands(log)) == written
    assert written[: len(list(commands(log[:-cut] if cut else log)))] == list(
        commands(log[:-cut] if cut else log)
    )


def test_an_update_is_found_though_it_was_deleted(some_layout):
    keys = RoundKeys("clinic.abcd.1")
    log = (
        resp(
            b"HSET",
            keys.round.encode(),
            b"layout_digest",
            some_layout.digest,
            b"layout",
            layout_to_proto(some_layout).SerializeToString(),
            b"format",
            b"1",
        )
        + resp(b"APPEND", keys.partial("ward/7", 0).encode(), b"first ")
        + resp(b"APPEND", keys.partial("ward/7", 0).encode(), b"second")
        + resp(b"RENAME", keys.partial("ward/7", 0).encode(), keys.update("ward/7", 0, bytes(32)).encode())
        + resp(b"SET", keys.result_bytes(0, bytes(32)).encode(), b"sum", b"PX", b"1000")
        + resp(b"UNLINK", keys.update("ward/7", 0, bytes(32)).encode(), keys.round.encode())
    )
    (found,) = replayed(log, "clinic")
    assert (found.clients(), found.of("ward/7"), found.results) == (
        ["ward/7"],
        {0: b"first second"},
        {0: b"sum"},
    )
    assert replayed(log, "clini") == []


def test_the_first_step_of_adam_gives_its_gradient_back():
    torch.manual_seed(0)
    start, gradient = torch.zeros(64, 8), torch.randn(64, 8) * 1e-6
    weights = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weights], lr=0.002, weight_decay=0.0)
    weights.grad = gradient
    optimizer.step()
    found = adam.gradient(weights.detach().double().numpy(), 0.002)
    small = np.abs(gradient.numpy()) < 3e-7
    assert np.allclose(found[small], gradient.numpy()[small], rtol=0.05)


def test_the_rank_of_a_noisy_matrix_is_told_by_its_gap():
    rng = np.random.default_rng(0)
    noisy = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 30)) + 1e-6 * rng.standard_normal((40, 30))
    assert spans.rank_by_gap(np.linalg.svd(noisy, compute_uv=False), 29) == 5
    assert spans.residuals(spans.basis(noisy, 5), noisy[:3]).max() < 1e-5


def test_scores():
    assert recall({1, 2}, {2, 3}) == 0.5
    assert (rouge([1, 2, 3], [1, 2, 3], 2), rouge([1, 2, 3], [3, 2, 1], 2)) == (1, 0)
    assert (auc([2, 3], [1]), auc([1], [1]), auc([0], [1])) == (1, 0.5, 0)
    assert auc_error(100, 100) == pytest.approx(0.0409, abs=1e-4)


def test_what_rouge_gives_by_chance_is_known():
    rng, lengths = np.random.default_rng(0), [(9, 12), (7, 8), (8, 3)]
    chance, error = rouge_by_chance(lengths, 60)
    drawn = [
        np.mean(
            [rouge(rng.integers(0, 60, true), rng.integers(0, 60, guessed), 1) for true, guessed in lengths]
        )
        for _ in range(2000)
    ]
    assert np.mean(drawn) == pytest.approx(chance, rel=0.4)  # a word twice counts once
    assert np.std(drawn) < error
    assert max(drawn) < chance + MOST_ERRORS * error


def test_a_text_that_every_update_points_to_is_no_member_of_all():
    scores = {
        "a": {"easy": 9.0, "rare": 5.0},
        "b": {"easy": 9.0, "rare": 1.0},
        "c": {"easy": 8.0, "rare": 1.0},
    }
    found = experiments.calibrated(scores, {"a": {"rare"}, "b": set(), "c": set()})
    assert found["a"] == {"easy": 0.5, "rare": 4.0}
    assert found["b"] == {"easy": 0.5, "rare": 0.0}, "who holds a text is no measure for the others"


def test_an_update_that_scores_all_texts_high_points_to_none():
    scores = {"a": {"x": 1.0, "y": 3.0, "own": 6.0}, "b": {"x": 100.0, "y": 300.0, "own": 200.0}}
    found = experiments.standardized(scores, ["x", "y"])
    assert found == {"a": {"x": -1, "y": 1, "own": 4}, "b": {"x": -1, "y": 1, "own": 0}}
    still = experiments.standardized({"a": {"x": 2.0, "y": 2.0}}, ["x", "y"])
    assert still == {"a": {"x": 0, "y": 0}}, "and one that scores all the same"


def test_labels_are_told_from_features_that_hold_them_and_not_from_noise():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([0.2] * 4, 24)
    told = label_leak(shares @ rng.standard_normal((4, 200)), shares)
    noise = label_leak(rng.standard_normal((24, 200)), shares)
    assert told.same_majority_auc > 0.85 > noise.same_majority_auc + 0.2
    assert told.distance < 0.5 * told.distance_by_chance


def test_a_control_that_fails_and_a_leak_are_problems():
    row = ROW
    assert Finding(**row, figures={"recall": 0.9}, at_least={"recall": 0.95}).problems()
    leak = {"figures": {"auc": 0.91}, "chance": {"auc": 0.5}, "error": {"auc": 0.1}}
    assert Finding(**row, **leak, no_better_than_chance=True).problems()
    assert not Finding(**row, **leak).problems()
    assert not Finding(**row, **(leak | {"figures": {"auc": 0.89}}), no_better_than_chance=True).problems()


@pytest.mark.parametrize("gate", [{"at_least": {"auc": 0.9}}, {"no_better_than_chance": True}])
def test_a_figure_that_is_no_number_is_a_problem(gate):
    noise = {"chance": {"auc": 0.5}, "error": {"auc": 0.1}}
    assert Finding(**ROW, figures={"auc": math.nan}, **noise, **gate).problems()


def test_columns_of_even_magnitudes_come_back_from_their_span_and_others_do_not():
    rng = np.random.default_rng(0)
    shrunk = 1 - 1e-3 * rng.exponential(size=(256, 8))  # as after a first step of AdamW
    steps = np.sign(rng.standard_normal((256, 8))) * shrunk
    assert bases.found_again(steps) == 1
    assert bases.found_again(rng.standard_normal((256, 8))) == 0


STEPPED = SimpleNamespace(steps=1, learning_rate=0.002)


def stepped(rng, shape):
    """What a first step of AdamW adds: hardly less than the learning rate, for the most part."""
    return 0.002 * np.sign(rng.standard_normal(shape)) * (1 - 1e-3 * rng.exponential(size=shape))


def test_movement_of_A_comes_back_whatever_powers_of_two_its_rows_were_scaled_by(monkeypatch):
    rng = np.random.default_rng(1)
    before = rng.standard_normal((6, 20)).astype(np.float32)
    before[3:] *= 1e-3  # rows of values that are no larger than a step
    after = before + stepped(rng, (6, 20)).astype(np.float32)
    sent = np.ldexp(after, -np.frexp(np.abs(after).max(axis=1))[1][:, None])
    monkeypatch.setattr(columns, "clear_parts", lambda *_: {"q": SimpleNamespace(A=sent.astype(np.float64))})
    start = Weights(factors={"q": LoraFactors(np.zeros((4, 6), np.float32), before)}, tensors={})
    performance = SimpleNamespace(rounds=[None, None], scene=STEPPED)
    moved = columns.movement(performance, start, Client(name="c", texts=("t",)), "q", 2)
    assert np.abs(moved - (after.astype(np.float64) - before)).max() < 1e-6


def test_movement_of_B_comes_back_though_its_columns_were_scaled_and_one_was_zero(monkeypatch):
    rng = np.random.default_rng(1)
    A, began, step = rng.standard_normal((6, 20)), rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    began[:, 2] = 0  # a component that died starts again, and its A does not move
    after = A + stepped(rng, (6, 20)) * (np.arange(6) != 2)[:, None]
    powers = np.frexp(np.abs(after).max(axis=1))[1]
    sent = SimpleNamespace(A=np.ldexp(after, -powers[:, None]), B=np.ldexp(began + 1e-3 * step, powers))
    monkeypatch.setattr(columns, "clear_parts", lambda *_: {"q": sent})
    start = Weights(factors={"q": LoraFactors(began, A)}, tensors={})
    performance = SimpleNamespace(rounds=[None, None], scene=STEPPED)
    moved = columns.movement_of_B(performance, start, Client(name="c", texts=("t",)), "q", 2)
    assert moved == pytest.approx(1e-3 * step)


def test_words_come_back_from_visible_columns_whose_places_are_known_and_stock_dager_loses_them():
    rng = np.random.default_rng(2)
    inputs, true = rng.standard_normal((400, 40)), [3, 50, 200]
    public = SimpleNamespace(first_inputs=inputs, scene=STEPPED)
    gradient = 1e-6 * rng.standard_normal((12, 3)) @ inputs[true]
    moved = -0.002 * gradient / (np.abs(gradient) + adam.EPSILON)
    found = {
        (view.budget, view.who): recall(spans.best(view.distances, 3), set(true))
        for view in columns.views(moved, public, 3, rng, (0.02, 0.5), floor=1e-12)
    }
    assert [found[budget, columns.PLACES_KNOWN] for budget in (0.02, 0.5)] == [1, 1]
    assert max(found[budget, "leaves them out, places secret"] for budget in (0.02, 0.5)) < 1
    assert [view.control for view in columns.views(moved, public, 3, rng, (0.02, 0.5))] == [0, 1, 0, 0, 0, 0]


def test_distances_are_those_of_the_columns_that_are_visible():
    rng = np.random.default_rng(3)
    inputs, scales, places = rng.standard_normal((30, 12)), rng.uniform(0.5, 2, 12), rng.permutation(12)[:7]
    rows = rng.standard_normal((4, 7))
    found = columns._distances(rows, places, inputs, scales, 3, rng)
    assert found == pytest.approx(spans.residuals(spans.basis(rows, 3), (inputs * scales)[:, places]))


def test_what_of_B_lies_in_the_last_sum_is_taken_out(monkeypatch):
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.standard_normal((12, 5)))[0]
    moved = rng.standard_normal((12, 2))
    layout = SimpleNamespace(
        matrices=[SimpleNamespace(name="v"), SimpleNamespace(name="q")],
        shards=[SimpleNamespace(matrices=()), SimpleNamespace(matrices=(0, 1))],
    )
    result = SimpleNamespace(matrices=[None, SimpleNamespace(Q=Q.astype(np.float32))])
    monkeypatch.setattr(columns, "decode_result", lambda of, index, data: {b"sums": result}[data])
    sent = SimpleNamespace(B=Q @ rng.standard_normal((5, 2)) + moved)
    monkeypatch.setattr(columns, "clear_parts", lambda *_: {"q": sent})
    rounds = [SimpleNamespace(layout=layout, results={0: b"head", 1: b"sums"}), None]
    found = columns.beside_last_result(SimpleNamespace(rounds=rounds), Client(name="c", texts=("t",)), "q", 2)
    assert found == pytest.approx(moved - Q @ (Q.T @ moved), abs=1e-5)


def test_hidden_columns_cost_whoever_fills_in_zeros_and_nobody_who_leaves_them_out():
    rng, rate = np.random.default_rng(2), 1e-3
    inputs = rng.standard_normal((400, 64))
    true = set(range(6))
    g = 1e-8 * rng.standard_normal((16, 6)) @ inputs[:6]
    moved = -rate * g / (np.abs(g) + adam.EPSILON)
    public = SimpleNamespace(first_inputs=inputs, scene=SimpleNamespace(learning_rate=rate))
    found = {
        view.who: recall(spans.best(view.distances, 6), true)
        for view in columns.views(moved, public, 6, rng, (0.8,))
    }
    assert found["leaves them out, true places known"] == 1
    assert found["leaves them out, places secret"] < 0.5
    assert found["stock DAGER: zeros in their place"] < 1


def test_a_token_is_told_from_how_A_moved_beside_the_A_that_it_began_from():
    rng = np.random.default_rng(3)
    inputs, start = rng.standard_normal((300, 64)), rng.standard_normal((8, 64))
    moved = rng.standard_normal((40, 5)) @ inputs[:5] + 10 * rng.standard_normal((40, 8)) @ start
    distances = tokens.by_A(SimpleNamespace(first_inputs=inputs), moved, 5, start)
    assert spans.best(distances, 5) == set(range(5))
    assert distances[:5].max() < 1e-5
    assert distances[5:].min() > 0.3


def test_a_token_is_told_by_all_matrices_of_an_update_and_by_any_of_a_sum():
    exact, noisy = np.full(40, 0.9), np.linspace(0.3, 0.9, 40)
    exact[:6], noisy[:6], noisy[20:26] = 1e-5, 0.2, 0.1  # the noisy one has six others before the true ones
    assert tokens.in_all([exact, noisy], 6) == set(range(6))
    assert tokens.in_any([exact, noisy], 6) != set(range(6)), "the control"
    first, second = np.full(40, 0.9), np.full(40, 0.9)
    first[:3] = second[3:6] = 0.3  # each lost what the other kept
    first[20:26] = second[20:26] = 0.4
    assert tokens.in_any([first, second], 6) == set(range(6))
    assert tokens.in_all([first, second], 6) != set(range(6)), "the control"
    assert tokens.in_all([np.zeros(5), np.arange(5.0)], 2) == {0, 1}, (
        "no distance at all is no nearer than the least"
    )
