"""How much order tells: what a coordinator learns of true columns from ballots under negotiation "ope".

    python -m bench.leakage

A client scores all-MiniLM-L6-v2 on its part of Reuters R8 and casts a ballot of all columns. The attacker is the
coordinator: it has the ballot (labels, and values that keep order), the public base model, and in the stronger case
public text. It guesses that the label at some place of the ballot is the column at the same place of its own
ranking, matrix by matrix, as labels tell their matrix. Training text is never shown; both measure what the *scores*
give away, so everything here is the attacker's success at undoing the labels.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.scores import ASSETS, SCORED, SECRET, Assets, Scored, client_scores, public_scores, scored_model
from client_agent.model import AdaptedModel
from shelora.lora.shards import Float64
from shelora.negotiation.ope import Ope, quantize
from shelora.negotiation.plan import joined_scores
from shelora.negotiation.protocol import Stake
from shelora.negotiation.votes import normalized
from shelora.obfuscation import Obfuscation

TOP: Final = 0.1
"""Share of a matrix's columns that counts as its top."""

Order = NDArray[np.int64]
app = typer.Typer(add_completion=False)


@app.command()
def measure(
    assets: Assets = ASSETS,
    examples: Scored = SCORED,
) -> None:
    """Prints how well the attacker undoes the labels of each client, and what chance gives."""
    model = scored_model(assets)
    clients = client_scores(model, assets, examples)
    priors = {
        "weights alone": model.base_weight_sums(),
        "weights and public text": public_scores(model, assets, examples),
    }
    Console().print(_table(model, clients, priors))


def _table(
    model: AdaptedModel, clients: list[dict[str, Float64]], priors: Mapping[str, Mapping[str, Float64]]
) -> Table:
    columns = sum(m.in_features for m in model.matrices)
    table = Table(
        title=f"Undoing the labels of {columns} columns in {len(model.matrices)} matrices from order alone"
    )
    for heading in (
        "the attacker has",
        "exact column",
        "within 1 % of places",
        f"top {TOP:.0%} told",
        "rank corr.",
    ):
        table.add_column(heading, justify="left" if "has" in heading else "right")
    for name, prior in priors.items():
        table.add_row(name, *_shown(np.mean([_success(model, own, prior) for own in clients], axis=0)))
    others = [_success(model, own, other) for own in clients for other in clients if own is not other]
    table.add_row("weights and another client's scores", *_shown(np.mean(others, axis=0)))
    table.add_row(
        "nothing (chance)", *_shown(np.mean([_chance(m.in_features) for m in model.matrices], axis=0))
    )
    distances = np.mean([_distance_leak(model, own) for own in clients])
    table.caption = f"values beside order: correlation of ballot values with log scores {distances:.3f}"
    return table


def _success(
    model: AdaptedModel, own: Mapping[str, Float64], prior: Mapping[str, Float64]
) -> tuple[float, ...]:
    """Shares of labels undone, by the measure; means over the matrices."""
    order = _ballot_order(model, own)
    return tuple(
        np.mean(
            [_matched(order[m.name], np.argsort(-prior[m.name])) for m in model.matrices], axis=0
        ).tolist()
    )


def _ballot_order(model: AdaptedModel, own: Mapping[str, Float64]) -> dict[str, Order]:
    """True columns of each matrix in the order of the ballot's values: what the attacker tries to name."""
    obfuscation, vote = Obfuscation(SECRET, 1), "bench.1"
    ballot = Ope(model.matrices, obfuscation, vote).cast(own, Stake())
    orders, start = {}, 0
    for m in model.matrices:
        values = ballot.values[start : start + m.in_features]  # of all columns, so in order of labels
        by_value = np.argsort(-values.astype(np.int64), kind="stable")
        orders[m.name] = obfuscation.labels(vote, m.name, m.in_features)[by_value]
        start += m.in_features
    return orders


def _matched(true: Order, guess: Order) -> tuple[float, float, float, float]:
    count = len(true)
    place_of = np.argsort(guess)
    apart = np.abs(place_of[true] - np.arange(count))
    top = max(1, round(TOP * count))
    told = len(set(true[:top].tolist()) & set(guess[:top].tolist())) / top
    correlation = float(np.corrcoef(place_of[true], np.arange(count))[0, 1])
    return float(np.mean(apart == 0)), float(np.mean(apart <= 0.01 * count)), told, correlation


def _chance(count: int) -> tuple[float, float, float, float]:
    within = int(0.01 * count)
    return 1 / count, (2 * within + 1) / count, TOP, 0.0


def _distance_leak(model: AdaptedModel, own: Mapping[str, Float64]) -> float:
    shares = joined_scores(normalized(model.matrices, own), model.matrices)
    levels = quantize(shares * len(shares))
    values = Obfuscation(SECRET, 1).increasing("bench.1", int(levels.max()) + 1)[levels]
    return float(np.corrcoef(levels, values.astype(np.float64))[0, 1])


def _shown(figures: NDArray[np.float64]) -> tuple[str, ...]:
    *shares, correlation = figures.tolist()
    return (*(f"{100 * share:.1f} %" for share in shares), f"{correlation:.2f}")


if __name__ == "__main__":
    app()
