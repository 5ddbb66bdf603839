"""What an update weighs in a sum under additive encryption: a small integer, by its client's examples.

The client multiplies its values by its weight before it encrypts them, commits to the weight with its signature, and
agents divide the sum by the weights of the set that the committee certified. A weight is capped, so that one client is
not the mean, and coarse, so that it does not tell a number of examples.
"""

from typing import Final

from shelora.errors import DomainError, Reason

MOST_WEIGHT: Final = 256
"""W_max: weight of a client with as many examples as count at most. Values are multiplied by weight / W_max."""


def summand_weight(examples: int, most_examples: int) -> int:
    """Weight of an update, 1 to MOST_WEIGHT.

    Args: examples: the client's, at least 1; most_examples: at which the weight is capped, at least 1.
    Raises: INVALID_ARGUMENT.
    """
    if examples < 1 or most_examples < 1:
        raise DomainError(Reason.INVALID_ARGUMENT, "examples must be at least 1")
    counted = min(examples, most_examples)
    return max(1, (2 * MOST_WEIGHT * counted + most_examples) // (2 * most_examples))
