import numpy as np

from bench.private_head import Data, Terms


def test_a_head_learns_without_noise_and_less_with_a_tiny_budget():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 800)
    inputs = np.hstack([np.eye(8)[labels] + 0.1 * rng.standard_normal((800, 8)), np.ones((800, 1))])
    data = Data(train=inputs[:600], test=inputs[600:], train_labels=labels[:600], test_labels=labels[600:])
    terms = Terms(rounds=2, steps=10, batch_size=300, learning_rate=0.1, clip=1.0)
    assert terms.accuracy(data, 0.0, 0) > 0.95
    assert terms.accuracy(data, 0.01, 0) < 0.8
