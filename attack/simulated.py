"""A control for order matching: rows drawn as updates would hold them, columns shuffled, the order found again.

Rows are random combinations of the first layer's inputs on one half of the texts; the attacker knows the correlations
on the other half. With enough rows the whole order comes back, so a secret order alone protects no client that sends
many.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from attack.findings import Finding
from attack.orders import correlations, matched
from attack.public import Public
from client_agent.data import Examples
from client_agent.encoding import Encoder
from shelora.lora.shards import Float64

ORDER: Final = "column order"
TEXTS: Final = 256
TOKENS: Final = 48
ROWS: Final = (144, 9600)
INPUTS_A_ROW: Final = 112
PUBLIC_ROWS: Final = 12_000


def findings(public_model: Public, texts: Sequence[str]) -> Iterator[Finding]:
    """One finding a number of rows, from the inputs that texts have in a BERT-like model."""
    inputs = _inputs(public_model, texts)
    private, public = np.array_split(inputs, 2)
    rng = np.random.default_rng(0)
    known = correlations(_rows(rng, public, PUBLIC_ROWS))
    for count in ROWS:
        hidden = rng.permutation(inputs.shape[1])
        seen = correlations(_rows(rng, private, count)[:, hidden])
        share = float(np.mean(matched(seen, known) == hidden))
        yield Finding(
            setting=f"simulated rows, {count}",
            attacker="order matching, no capture",
            data="R8, first layer",
            attack=ORDER,
            terms="order matching",
            column=f"{count} rows",
            figures={"order": share},
            counts={"columns": inputs.shape[1]},
            chance={"order": 1 / inputs.shape[1]},
            at_least={"order": 1.0} if count == max(ROWS) else {},
        )


def _rows(rng: np.random.Generator, inputs: Float64, count: int) -> Float64:
    chosen = rng.integers(0, len(inputs), (count // 8, INPUTS_A_ROW))
    mixed: Float64 = np.vstack([rng.standard_normal((8, INPUTS_A_ROW)) @ inputs[part] for part in chosen])
    return mixed


@torch.no_grad()
def _inputs(public: Public, texts: Sequence[str]) -> Float64:
    """Inputs of the first layer at every position of the texts [positions, n]."""
    encoder = Encoder(public.model.tokenizer, TOKENS, append_end=False)
    rows = []
    for text in texts:
        batch = encoder.batch(Examples((text,), (0,)))
        rows.append(public.base.bert.embeddings(input_ids=batch.input_ids)[0].double().numpy())
    stacked: Float64 = np.vstack(rows)
    return stacked
