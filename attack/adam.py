"""Undoing AdamW's first step.

The first step of Adam moves each weight by -lr g / (|g| + eps), so nearly by its sign; but float32 keeps the small
difference 1 - |step| / lr = eps / (|g| + eps), and with it the gradient.
"""

from typing import Final

import numpy as np

from shelora.lora.shards import Float64

EPSILON: Final = 1e-8
"""The eps of torch's AdamW."""
FLOAT_STEP: Final = 1e-7
"""About the distance of two float32 numbers near 1."""
HALF_BITS: Final = 16
HALF_STEP: Final = 2.0**-9
"""That of bfloat16."""


def step_of(bits: int) -> float:
    """The distance of two numbers near 1 in a format of so many bits."""
    return HALF_STEP if bits == HALF_BITS else FLOAT_STEP


def gradient(step: Float64, learning_rate: float, floor: float = FLOAT_STEP) -> Float64:
    """The gradient, as it was clipped, behind a first step.

    Args: step: new minus old weights; floor: least value of 1 - |step| / lr that is more than rounding.
    """
    moved = -step / learning_rate
    size = np.abs(moved)
    rest: Float64 = np.maximum(1 - size, floor)
    return np.sign(moved) * EPSILON * size / rest


def evened(g: Float64, floor: float = FLOAT_STEP) -> tuple[Float64, Float64, Float64]:
    """A gradient with rows and columns scaled so that the noise of the inversion is even, and both scales.

    Its deviation is about floor g^2 / eps, which is close to rank one in the logarithm.
    """
    noise = np.log(floor * g**2 / EPSILON + 1e-6 * np.abs(g) + 1e-16)
    rows = np.exp(-noise.mean(axis=1))
    columns = np.exp(-(noise.mean(axis=0) - noise.mean()))
    scaled = rows[:, None] * g * columns[None]
    return scaled / np.abs(scaled).max(), rows / rows.max(), columns / columns.max()


def unscaled(B: Float64, learning_rate: float) -> Float64:
    """A first step of B without the power of two that the row normalization of A gave each of its columns."""
    powers = np.round(np.log2(np.abs(B).max(axis=0) / learning_rate))
    scaled: Float64 = B * 2.0**-powers
    return scaled
