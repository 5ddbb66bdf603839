"""What later rounds give away: how A and B moved, from the sums that each round began with.

Of A by DAGER's check on the columns that are not encrypted; causal models.

From the second round on B is not zero, so A moves along the inputs of the batch, and every visible column shows one
coordinate of that. The start is public under `none`: it follows from the last result. Columns are hidden here as they
would be at a budget; of what is left the attacker knows the true places, or does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from attack import adam
from attack.opened import clear_parts
from attack.public import Public
from attack.spans import basis
from attack.stage import Client, Performance, Scene
from client_agent.learning import Weights
from client_agent.results import cut_to_rank
from shelora.lora.codec import decode_result
from shelora.lora.restore import restored_parts
from shelora.lora.shards import Float64
from shelora.negotiation.plan import column_orders

BUDGETS: Final = (0.001, 0.1, 1.0)
PLACES_KNOWN: Final = "leaves them out, true places known"
STILL: Final = 0.1
"""Share of the farthest that AdamW moves a value, below which a row is taken not to have moved."""
FLOOR: Final = 2e-7
"""Least value of 1 - |step| / lr that is more than rounding: A is no small number, and its step a difference."""
HALF_FLOOR: Final = 0.03
"""The same for an A that was sent in bfloat16, of values about ten times a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What an attacker makes of the visible columns."""

    budget: float
    who: str
    control: bool
    """Next to nothing is hidden from an attacker that knows what it sees: if this fails, the attack is broken."""
    distances: Float64
    """Of all tokens [V] from the span."""


def start_of(performance: Performance, public: Public, client: Client, number: int) -> Weights:
    """What a client trained from in that round, 2 or more, as everyone can tell under `none`."""
    return _start(performance, public, number, client.rank, client.alpha)


@lru_cache(maxsize=4)
def _start(performance: Performance, public: Public, number: int, rank: int, alpha: float) -> Weights:
    """That of all clients of a rank."""
    last = performance.rounds[number - 2]
    contents = [decode_result(last.layout, index, data) for index, data in sorted(last.results.items())]
    orders = column_orders(None, last.layout.matrices, None)
    parts = restored_parts(last.layout, contents, orders, None)
    return cut_to_rank(parts, rank, alpha / rank, public.unprotected.obfuscation)


def movement(
    performance: Performance, start: Weights, client: Client, name: str, number: int, bits: int = 32
) -> Float64:
    """How A of one matrix moved in a round [rank, n], from what was sent and where it began.

    Args: bits: 16 for what is left if it had been sent in bfloat16.
    """
    before = start.factors[name].A.astype(np.float64)
    sent = clear_parts(performance.rounds[number - 1], client.name)[name].A
    if bits == adam.HALF_BITS:
        sent = torch.from_numpy(sent).bfloat16().double().numpy()
    scale = _scales(sent, before, performance.scene)
    moved: Float64 = scale[:, None] * sent - before
    return moved


def movement_of_B(
    performance: Performance, start: Weights, client: Client, name: str, number: int
) -> Float64:
    """The same of B [out, rank], whose columns were scaled the other way."""
    before, sent = start.factors[name], clear_parts(performance.rounds[number - 1], client.name)[name]
    moved: Float64 = sent.B / _scales(sent.A, before.A.astype(np.float64), performance.scene) - before.B
    return moved


def _scales(sent: Float64, before: Float64, scene: Scene) -> Float64:
    """The powers of two that the rows of A [rank, n] were divided by.

    Some value of a row moves about as far as AdamW can move it, and none farther, or none moves at all, where B was
    zero. The power that leaves the least movement would not do: rows of small values move by as much as they are.
    """
    middle = np.log2(np.abs(before).max(axis=1) / np.abs(sent).max(axis=1))
    powers = np.round(middle) + np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    largest = np.array([np.abs(2.0 ** p[:, None] * sent - before).max(axis=1) for p in powers])
    share = largest / (scene.steps * scene.learning_rate)
    off = np.where(share < STILL, 0, np.abs(np.log(np.maximum(share, STILL))))
    chosen: Float64 = 2.0 ** powers[np.argmin(off, axis=0), np.arange(len(before))]
    return chosen


def beside_last_result(performance: Performance, client: Client, name: str, number: int) -> Float64:
    """B of a round as it was sent [out, rank], less what lies in the columns of the last result, which servers see.

    A client begins a round with a B whose columns lie there, so what is left moved in this round.
    """
    last = performance.rounds[number - 2]
    index = next(i for i, matrix in enumerate(last.layout.matrices) if matrix.name == name)
    place, shard = next((p, s) for p, s in enumerate(last.layout.shards) if index in s.matrices)
    Q = decode_result(last.layout, place, last.results[place]).matrices[shard.matrices.index(index)].Q
    B = clear_parts(performance.rounds[number - 1], client.name)[name].B
    outside: Float64 = B - Q.astype(np.float64) @ (Q.T.astype(np.float64) @ B)
    return outside


def views(
    moved: Float64,
    public: Public,
    tokens: int,
    rng: np.random.Generator,
    budgets: tuple[float, ...] = BUDGETS,
    floor: float = FLOOR,
) -> Iterator[View]:
    """The attackers at every budget.

    Args: moved: movements of A of the first layer's matrices, one over the other [rows, n]; tokens: of the batch;
        floor: as of `adam.gradient`.
    """
    even, _, scales = adam.evened(adam.gradient(moved, public.scene.learning_rate, floor), floor)
    columns = moved.shape[1]
    order = rng.permutation(columns)
    for budget in budgets:
        hidden = order[: max(1, round(budget * columns))]
        seen = np.setdiff1d(order, hidden)
        zeroed = even.copy()
        zeroed[:, hidden] = 0
        for who, rows, places in (
            ("stock DAGER: zeros in their place", zeroed, np.arange(columns)),
            (PLACES_KNOWN, even[:, seen], seen),
            ("leaves them out, places secret", even[:, seen], rng.permutation(seen)),
        ):
            control = who == PLACES_KNOWN and budget == min(budgets)
            distances = _distances(rows, places, public.first_inputs, scales, tokens, rng)
            yield View(budget=budget, who=who, control=control, distances=distances)


def _distances(
    rows: Float64,
    places: NDArray[np.intp],
    inputs: Float64,
    scales: Float64,
    tokens: int,
    rng: np.random.Generator,
) -> Float64:
    """Distances of all tokens [V] from the span of rows [count, m], whose columns are taken for `places` [m].

    As `residuals(basis(rows), (inputs * scales)[:, places])`, without a copy of the inputs of all tokens.

    Args: inputs: [V, n]; scales: of the coordinates [n].
    """
    if not rows.size or not rows.any():
        return rng.random(len(inputs))
    span = basis(rows, min(tokens, *rows.shape))
    spread, weights = np.zeros((len(scales), span.shape[1])), np.zeros(len(scales))
    spread[places] = span * scales[places, None]
    weights[places] = scales[places] ** 2
    inside = ((inputs @ spread) ** 2).sum(axis=1)
    sizes = np.einsum("ij,ij,j->i", inputs, inputs, weights)
    distances: Float64 = np.sqrt(np.clip(1 - inside / np.maximum(sizes, 1e-24), 0, None))
    return distances
