"""How good guesses are: recall, ROUGE, AUC. Pure functions of guesses and truth."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def recall(guessed: set[int], true: set[int]) -> float:
    """Share of the true tokens that were guessed."""
    return len(guessed & true) / len(true)


def rouge(true: Sequence[int], guessed: Sequence[int], n: int) -> float:
    """ROUGE-n (F1 over n-grams) of token sequences, 0 to 1."""
    want, have = _grams(true, n), _grams(guessed, n)
    shared = sum((want & have).values())
    return 2 * shared / (want.total() + have.total()) if shared else 0.0


def rouge_by_chance(lengths: Iterable[tuple[int, int]], vocabulary: int) -> tuple[float, float]:
    """Mean ROUGE-1 of guesses drawn from a vocabulary, and about its standard error and a word more.

    Args: lengths: of each text, how many tokens are true and how many are guessed.
    """
    pairs = np.array(list(lengths), dtype=float)
    shared, share = pairs.prod(axis=1) / vocabulary, 2 / pairs.sum(axis=1)
    error = float(np.sqrt((share**2 * shared).sum()) + share.max()) / len(pairs)
    return float((share * shared).mean()), error


def _grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def auc(members: Iterable[float], others: Iterable[float]) -> float:
    """Probability that a member scores above another; 0.5 is chance."""
    a, b = np.array(list(members)), np.array(list(others))
    return float((a[:, None] > b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean())


def auc_error(members: int, others: int) -> float:
    """Standard error of an AUC at chance (Hanley and McNeil, 1982, at 0.5)."""
    return float(np.sqrt((members + others + 1) / (12 * members * others)))
