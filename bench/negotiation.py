"""How well each negotiation serves clients, by the paper's objective and by the score it encrypts.

    python -m bench.negotiation

Scores of all-MiniLM-L6-v2 on four clients' parts of Reuters R8, budgets of 1, 5 and 20 % and twice 5 %: as published
(three lists, searched weights), refined, and the ranking by summed scores (`sealed`) with as many columns of every
matrix. Everything runs on scores in the clear, as the authors' code does.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.scores import ASSETS, SCORED, Assets, Scored, client_scores, scored_model
from shelora.lora.layout import Matrix
from shelora.lora.shards import Float64
from shelora.negotiation.published import Chosen, Poll, allotted, fairness, published, refined
from shelora.negotiation.ranking import tier_ends, total_columns

BUDGETS: Final = (0.01, 0.05, 0.05, 0.2)
"""Of the four clients."""
app = typer.Typer(add_completion=False)


@app.command()
def measure(
    assets: Assets = ASSETS,
    examples: Scored = SCORED,
) -> None:
    """Prints both objectives at every budget, for each negotiation."""
    model = scored_model(assets)
    matrices, scores = model.matrices, client_scores(model, assets, examples)
    polls = [_poll([own[m.name] for own in scores]) for m in matrices]
    tiers = sorted(set(BUDGETS))
    ends = tier_ends(tiers, total_columns(matrices))
    theirs = published(polls, [tiers.index(budget) for budget in BUDGETS], ends)
    chains = {
        "as published": theirs,
        "refined": refined(polls, theirs),
        "summed scores": _summed(polls, ends),
    }
    Console().print(_table(matrices, tiers, polls, chains))


def _poll(scores: Sequence[Float64]) -> Poll:
    named = np.zeros((len(scores), len(scores[0])), dtype=np.bool_)
    for row, (own, budget) in enumerate(zip(scores, BUDGETS, strict=True)):
        named[row, np.argsort(-own, kind="stable")[: tier_ends([budget], len(own))[0]]] = True
    return Poll(np.stack(scores), named)


def _summed(polls: Sequence[Poll], ends: Sequence[int]) -> list[Chosen]:
    ranked = [np.argsort(-_votes(poll).sum(axis=0), kind="stable") for poll in polls]
    sizes = [poll.size for poll in polls]
    return [[r[:n] for r, n in zip(ranked, allotted(end, sizes), strict=True)] for end in ends]


def _votes(poll: Poll) -> Float64:
    votes: Float64 = poll.scores / poll.scores.sum(axis=1, keepdims=True)
    return votes


def _table(
    matrices: Sequence[Matrix], tiers: Sequence[float], polls: Sequence[Poll], chains: dict[str, list[Chosen]]
) -> Table:
    table = Table(
        title=f"{len(BUDGETS)} clients, {len(matrices)} matrices: least coverage less largest risk; score"
    )
    for heading in ("", *(f"{tier:.0%} of columns" for tier in tiers)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, chain in chains.items():
        table.add_row(name, *(f"{fairness(polls, c):+.3f}; {_covered(polls, c):.1%}" for c in chain))
    return table


def _covered(polls: Sequence[Poll], chosen: Chosen) -> float:
    """Share of all clients' scores in the chosen columns: mean over clients and matrices."""
    return float(np.mean([_votes(p)[:, c].sum(axis=1).mean() for p, c in zip(polls, chosen, strict=True)]))


if __name__ == "__main__":
    app()
