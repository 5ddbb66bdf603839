"""Estimates the security of the additive parameter sets: `python -m tools.lattice`.

The primal attack on LWE by unique-SVP embedding, as the "2016 estimate" of Alkim, Ducas, Poeppelmann, Schwabe (USENIX
Security 2016), verified by Albrecht, Goepfert, Virdia, Wunderer (ASIACRYPT 2017): a block size beta finds the secret if

    sqrt(beta) * sigma_e <= delta(beta)^(2 beta - d) * vol^(1/d),    d = m + n + 1,

where vol is that of the embedding lattice with the secret scaled to the errors' deviation. The number m of samples is
chosen best for the attacker, who has as many as he likes. Costs: "core-SVP" is one call of a sieve, 2^(0.292 beta);
"BDGL" is what the lattice estimator calls BDGL16, 2^(0.292 beta + 16.4 + log2(8 d)). Both count no memory.

The lattice estimator (github.com/malb/lattice-estimator) knows more attacks; its own documentation has 2^136.7 for the
best of them, primal_bdd, at N = 1024, q = 2^27 and deviations of 3.0, which is the first row here.
"""

import math
import sys
from dataclasses import dataclass
from typing import Final

LOG_Q: Final = 27
DEGREE: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Lwe:
    """An LWE instance with Gaussian errors and a secret of mean zero."""

    label: str
    secret_deviation: float
    error_deviation: float
    dimension: int = DEGREE


@dataclass(frozen=True)
class Estimate:
    """The cheapest primal attack."""

    beta: int
    dimension: int

    @property
    def core_svp(self) -> float:
        """log2 of one sieve."""
        return 0.292 * self.beta

    @property
    def bdgl(self) -> float:
        """log2 of all sieves of a reduction, with the constant of the estimator's BDGL16."""
        return 0.292 * self.beta + 16.4 + math.log2(8 * self.dimension)


def log_delta(beta: int) -> float:
    """log2 of the root Hermite factor of BKZ with that block size (Chen, 2013)."""
    return math.log2(beta / (2 * math.pi * math.e) * (math.pi * beta) ** (1 / beta)) / (2 * (beta - 1))


def succeeds(lwe: Lwe, beta: int, samples: int) -> bool:
    """Whether the block size finds the secret from so many samples."""
    d = samples + lwe.dimension + 1
    scale = lwe.error_deviation / lwe.secret_deviation
    log_volume = samples * LOG_Q + lwe.dimension * math.log2(scale)
    target = math.log2(math.sqrt(beta) * lwe.error_deviation)
    return target <= (2 * beta - d) * log_delta(beta) + log_volume / d


def estimate(lwe: Lwe) -> Estimate:
    """The smallest block size over all numbers of samples."""
    for beta in range(60, 1000):
        for samples in range(lwe.dimension // 2, 2 * lwe.dimension, 8):
            if succeeds(lwe, beta, samples):
                return Estimate(beta, samples + lwe.dimension + 1)
    raise ValueError("no block size below 1000 succeeds")


def reduced(deviation: float) -> float:
    """Deviation that Hint-MLWE reduces to: 1 / s0^2 = 2 (1 / s^2 + 1 / s^2) with one other honest client."""
    return deviation / 2


def conditional(deviation: float) -> float:
    """Deviation of one of two honest Gaussian secrets around half of their known sum."""
    return deviation / math.sqrt(2)


def ternary_pair() -> Lwe:
    """What is left of a ternary secret when the sum of two is known: 2/9 of the coefficients are certain.

    Of the others, 4/7 are one of two neighbours (variance 1/4), 3/7 any of three (variance 2/3). Errors as in SEAL, of
    deviation 3.2, of which the sum is known as well.
    """
    variance = (4 / 7) * (1 / 4) + (3 / 7) * (2 / 3)
    return Lwe(
        label="ternary secrets, S of two known",
        secret_deviation=math.sqrt(variance),
        error_deviation=conditional(3.2),
        dimension=round(DEGREE * 7 / 9),
    )


ROWS: Final = (
    Lwe(
        label="deviation 3.0, nothing known (the estimator's own example)",
        secret_deviation=3.0,
        error_deviation=3.0,
    ),
    Lwe(
        label="ours by the reduction: 3.2, S of two known",
        secret_deviation=reduced(6.4),
        error_deviation=reduced(6.4),
    ),
    Lwe(
        label="ours as attacked: 6.4 given S of two",
        secret_deviation=conditional(6.4),
        error_deviation=conditional(6.4),
    ),
    Lwe(label="ours, nothing known", secret_deviation=6.4, error_deviation=6.4),
    ternary_pair(),
)


def main() -> None:
    """Prints one row an instance."""
    sys.stdout.write(f"{'instance':60} {'beta':>5} {'core-SVP':>9} {'BDGL':>6}\n")
    for lwe in ROWS:
        found = estimate(lwe)
        sys.stdout.write(f"{lwe.label:60} {found.beta:5} {found.core_svp:9.1f} {found.bdgl:6.1f}\n")


if __name__ == "__main__":
    main()
