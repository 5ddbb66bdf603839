"""Packed secret sharing (Franklin and Yung, STOC 1992) modulo 65521, with the correction of wrong shares.

A polynomial of degree below T + l carries l secrets, at the points -1 to -l; at the points -l-1 to -l-T it is random,
and member j has its value at j. Any T members know nothing, T + l know all. Shares are linear: the sum of shares is a
share of the sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shelora.additive.sampler import Csprng
from shelora.committee.field import PRIME, Int64Array, interpolation, solve, uniform
from shelora.committee.rules import CommitteeRule
from shelora.errors import DomainError, Reason

_COMBINATIONS = 4
"""Random combinations in which liars are looked for: one of them hides a liar with a probability of 2^-16."""


@dataclass(frozen=True)
class Opened:
    """Secrets, and whose shares were wrong."""

    secrets: Int64Array
    """[n] below the prime."""
    liars: tuple[int, ...]
    """Positions whose shares do not fit; no more than the others can outvote."""


class PackedSharing:
    """Shares of m members with threshold T and packing l."""

    def __init__(self, rule: CommitteeRule) -> None:
        self.rule = rule
        self._secret_points = tuple(PRIME - 1 - i for i in range(rule.packing))
        free = tuple(PRIME - 1 - rule.packing - i for i in range(rule.threshold))
        self.base_points = self._secret_points + free
        """Where a polynomial is fixed: l secret points, then T random ones."""

    def polynomials(self, secrets: Int64Array, rng: Csprng) -> Int64Array:
        """Random polynomials that carry secrets [n], as their values at the base points, [T + l, n / l].

        n is a multiple of l. Secret k of polynomial b is number b l + k.
        """
        blocks = secrets.reshape(-1, self.rule.packing).T % PRIME
        return np.concatenate([blocks, uniform(rng, self.rule.threshold, blocks.shape[1])])

    def shares(self, polynomials: Int64Array, positions: Sequence[int]) -> Int64Array:
        """The shares of members, [positions, n / l], from values at the base points."""
        return interpolation(self.base_points, tuple(positions)) @ polynomials % PRIME

    def open(self, positions: Sequence[int], shares: Int64Array, rng: Csprng) -> Opened:
        """The secrets that shares [positions, n / l] carry, although some may be wrong.

        With a answers up to floor((a - T - l) / 2) wrong ones are corrected and named.

        Args: rng: For the random combinations; unknown to members.
        Raises: DomainError(ANSWERS_REFUSED): too few, or more wrong ones than can be told apart.
        """
        needed = self.rule.needed
        if len(positions) < needed:
            raise _refused(f"{len(positions)} members answered; {needed} are needed to open the sum")
        sound = self._sound(tuple(positions), shares, rng)
        base = [positions[index] for index in sound[:needed]]
        matrix = interpolation(tuple(base), self._secret_points)
        secrets = matrix @ shares[sound[:needed]] % PRIME
        liars = tuple(p for index, p in enumerate(positions) if index not in set(sound))
        return Opened(secrets.T.reshape(-1), liars)

    def guesses(self, positions: Sequence[int], shares: Int64Array) -> Iterator[Opened]:
        """What each choice of T + l shares says, and whom it makes a liar; each outcome once. For few members.

        More liars than `open` corrects can be told apart by who knows what secrets may look like.
        """
        seen: set[bytes] = set()
        for chosen in combinations(range(len(positions)), self.rule.needed):
            base = tuple(positions[i] for i in chosen)
            matrix = interpolation(base, (*self._secret_points, *positions))
            values = matrix @ shares[list(chosen)] % PRIME
            secrets, expected = values[: self.rule.packing], values[self.rule.packing :]
            if secrets.tobytes() not in seen:
                seen.add(secrets.tobytes())
                fit = (expected == shares).all(axis=1)
                liars = tuple(p for p, sound in zip(positions, fit, strict=True) if not sound)
                yield Opened(secrets.T.reshape(-1), liars)

    def _sound(self, positions: tuple[int, ...], shares: Int64Array, rng: Csprng) -> list[int]:
        """Indices of shares that all lie on polynomials; so many that no other polynomials fit as many."""
        everyone = list(range(len(positions)))
        if self._fit(positions, shares, everyone):
            return everyone
        wrong = self._wrong(positions, shares, rng)
        sound = [index for index in everyone if index not in wrong]
        if len(sound) < self.rule.needed + len(wrong) or not self._fit(positions, shares, sound):
            raise _refused("the members' answers do not fit together, and it cannot be told who lies")
        return sound

    def _fit(self, positions: tuple[int, ...], shares: Int64Array, indices: list[int]) -> bool:
        needed = self.rule.needed
        base, rest = indices[:needed], indices[needed:]
        matrix = interpolation(tuple(positions[i] for i in base), tuple(positions[i] for i in rest))
        return bool((matrix @ shares[base] % PRIME == shares[rest]).all())

    def _wrong(self, positions: tuple[int, ...], shares: Int64Array, rng: Csprng) -> set[int]:
        """Indices of shares that are wrong in random combinations of the columns."""
        coefficients = uniform(rng, shares.shape[1], _COMBINATIONS)
        words = shares @ coefficients % PRIME
        return {index for word in words.T for index in corrected(positions, word, self.rule.needed)}


def corrected(positions: tuple[int, ...], word: Int64Array, dimension: int) -> tuple[int, ...]:
    """Indices at which a word differs from the nearest polynomial of degree below `dimension`.

    Berlekamp and Welch: with at most e errors there are E monic of degree e and Q of degree below dimension + e with
    Q(x) = y E(x) at every position; Q / E is the polynomial.

    Raises: DomainError(ANSWERS_REFUSED): more than (len(word) - dimension) // 2 differ from every polynomial.
    """
    errors = (len(word) - dimension) // 2
    x = np.array(positions, dtype=np.int64)
    powers = _powers(x, dimension + errors)
    left = np.concatenate([powers[:, :-1], -(word[:, None] * powers[:, :errors])], axis=1) % PRIME
    right = word * powers[:, errors] % PRIME
    solution = solve(left, right)
    if solution is None:
        raise _refused("the members' answers do not fit together, and it cannot be told who lies")
    locator = np.append(solution[dimension + errors :], 1)
    roots = _evaluate(locator, x) == 0
    sound = np.flatnonzero(~roots)[:dimension]
    if len(sound) < dimension:
        raise _refused("the members' answers do not fit together, and it cannot be told who lies")
    fitted = interpolation(tuple(int(x[i]) for i in sound), positions) @ word[sound] % PRIME
    wrong = tuple(int(i) for i in np.flatnonzero(fitted != word))
    if len(wrong) > errors:
        raise _refused("the members' answers do not fit together, and it cannot be told who lies")
    return wrong


def _powers(x: Int64Array, count: int) -> Int64Array:
    """[x, count + 1]: powers 0 to count."""
    powers = np.ones((len(x), count + 1), dtype=np.int64)
    for exponent in range(1, count + 1):
        powers[:, exponent] = powers[:, exponent - 1] * x % PRIME
    return powers


def _evaluate(polynomial: Int64Array, x: Int64Array) -> Int64Array:
    """Values at x of a polynomial by its coefficients, lowest first."""
    value = np.zeros_like(x)
    for coefficient in polynomial[::-1].tolist():
        value = (value * x + coefficient) % PRIME
    return value


def _refused(message: str) -> DomainError:
    return DomainError(Reason.ANSWERS_REFUSED, message)
