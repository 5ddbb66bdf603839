"""Key-additive RLWE: every client encrypts under its own fresh secret, and the sum opens under the sum of the secrets.

    c_i = a s_i + e_i + round(scale * x_i)    modulo q and X^N + 1;   a is expanded from a public context
    sum c_i = a S + e + scale * sum x_i       S = sum s_i, which `shelora.committee` opens; no other key exists

The package itself offers what needs no secret: parameters, the shape of a shard, the adder. What encrypts and opens is
`shelora.additive.secret`, for client agents only; no server imports it. docs/additive.md has the security argument.
"""

from shelora.additive.adder import Adder, validate_shard
from shelora.additive.parameters import (
    BALANCED,
    COMPACT,
    INSECURE_TOY,
    MAX_CONTRIBUTORS,
    PROFILES,
    SMALL,
    STANDARD,
    VALUE_LIMIT,
    AdditiveParameters,
    profile,
)
from shelora.additive.wire import ShardShape

__all__ = [
    "BALANCED",
    "COMPACT",
    "INSECURE_TOY",
    "MAX_CONTRIBUTORS",
    "PROFILES",
    "SMALL",
    "STANDARD",
    "VALUE_LIMIT",
    "Adder",
    "AdditiveParameters",
    "ShardShape",
    "profile",
    "validate_shard",
]
