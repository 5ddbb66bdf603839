"""What clear B tells of a client's labels, in a federation of a classifier.

The attacker knows the label distributions of all clients but one (a strong one: say, of branches whose business is
public) and predicts the last one's by kernel ridge regression on B. Leave one out, over all clients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attack.scores import auc
from shelora.lora.shards import Float64

RIDGE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLeak:
    """How well label distributions are told; every figure beside what is known without B."""

    majority: float
    """Share of clients whose most frequent label is guessed."""
    majority_by_chance: float
    """The same by guessing for everyone the label that is most often the most frequent."""
    distance: float
    """Mean total variation distance of predicted and true distributions, 0 to 1."""
    distance_by_chance: float
    same_majority_auc: float
    """AUC of: two clients with similar B have the same most frequent label; 0.5 is chance."""
    pairs: tuple[int, int]
    """Pairs with and without the same most frequent label."""


def label_leak(features: Float64, shares: Float64) -> LabelLeak:
    """Args: features: [clients, n]; shares: label distributions [clients, labels]."""
    clients = len(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    guesses, priors = zip(*(_left_out(unit, shares, i) for i in range(clients)), strict=True)
    truth = shares.argmax(axis=1)
    same_majority_auc, pairs = _similar(unit, truth)
    return LabelLeak(
        majority=float(np.mean([g.argmax() == t for g, t in zip(guesses, truth, strict=True)])),
        majority_by_chance=float(np.bincount(truth).max() / clients),
        distance=float(np.mean(np.abs(np.array(guesses) - shares).sum(axis=1) / 2)),
        distance_by_chance=float(np.mean(np.abs(np.array(priors) - shares).sum(axis=1) / 2)),
        same_majority_auc=same_majority_auc,
        pairs=pairs,
    )


def _left_out(unit: Float64, shares: Float64, client: int) -> tuple[Float64, Float64]:
    """The predicted distribution of one client, and the others' mean."""
    others = [i for i in range(len(unit)) if i != client]
    mean, prior = unit[others].mean(axis=0), shares[others].mean(axis=0)
    centred = unit[others] - mean
    kernel = centred @ centred.T
    ridge = np.trace(kernel) / len(others) * RIDGE or RIDGE  # of features that are all alike
    weights = np.linalg.solve(kernel + ridge * np.eye(len(others)), shares[others] - prior)
    guess = np.clip(prior + (unit[client] - mean) @ centred.T @ weights, 1e-9, None)
    return guess / guess.sum(), prior


def _similar(unit: Float64, truth: NDArray[np.intp]) -> tuple[float, tuple[int, int]]:
    """AUC of similarity for the same most frequent label, and the pairs with and without it."""
    centred = unit - unit.mean(axis=0)
    gram = centred @ centred.T
    size = np.sqrt(np.maximum(np.diag(gram), 1e-30))
    first, second = np.triu_indices(len(unit), 1)
    similarity = (gram / np.outer(size, size))[first, second]
    same = truth[first] == truth[second]
    return auc(similarity[same], similarity[~same]), (int(same.sum()), int((~same).sum()))
