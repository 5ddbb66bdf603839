"""Scores of a model's columns on four clients' parts of Reuters R8: what measurements of negotiations rest on."""

import logging
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

from client_agent.checkpoint import load_checkpoint
from client_agent.config import LoraSettings
from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.model import AdaptedModel, choose_device
from client_agent.scoring import sensitivity_scores
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.split import LABELS, Example, dirichlet_split, read_tab
from shelora.lora.shards import Float64
from shelora.obfuscation import Obfuscation

AGENTS: Final = 4
MAX_TOKENS: Final = 96
SECRET: Final = bytes(range(32))
"""Any secret will do: an attacker has none."""
ASSETS: Final = Path("assets")
SCORED: Final = 64

Assets: TypeAlias = Annotated[Path, typer.Option(help="Where model and data lie, or are fetched to.")]
Scored: TypeAlias = Annotated[int, typer.Option(min=8, help="Examples that scores are measured on.")]


def scored_model(assets: Path) -> AdaptedModel:
    """The model, with fresh factors."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    adapted = AdaptedModel(
        load_checkpoint(str(fetch(MINILM, assets)), "sequence-classification", LABELS),
        task="sequence-classification",
        target_modules=("query", "value"),
        lora=LoraSettings(rank=8, alpha=8),
        device=choose_device("cpu"),
    )
    adapted.initialise(Obfuscation(SECRET, 1))
    return adapted


def client_scores(model: AdaptedModel, assets: Path, examples: int) -> list[dict[str, Float64]]:
    """Scores of every client on so many examples of its part, by matrix."""
    texts = read_tab(fetch(REUTERS, assets) / "reuters-r8-train.tab")
    parts = dirichlet_split([e.label for e in texts], AGENTS, 0.5, seed=7)
    return [_scores(model, [texts[i] for i in part][:examples]) for part in parts]


def public_scores(model: AdaptedModel, assets: Path, examples: int) -> dict[str, Float64]:
    """Scores on text that everybody has."""
    return _scores(model, read_tab(fetch(REUTERS, assets) / "reuters-r8-test.tab")[:examples])


def _scores(model: AdaptedModel, texts: list[Example]) -> dict[str, Float64]:
    chosen = Examples(tuple(e.text for e in texts), tuple(LABELS.index(e.label) for e in texts))
    encoder = Encoder(model.tokenizer, MAX_TOKENS, append_end=False)
    return sensitivity_scores(model, encoder, chosen, lambda _: None)
