"""Texts of the comparison, and what the frozen lower layers of MiniLM make of them: computed once, then cached.

Hidden states of a text are kept as the first position and the means of CHUNKS stretches of the others: the layer above
is trained on these few vectors in place of every token, which makes a step many times cheaper, for every method alike.
"""

import fcntl
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from attack.assets import tomatoes
from examples.reuters.assets import MINILM, REUTERS, Wheel, fetch
from examples.reuters.split import Example, read_tab
from shelora.lora.shards import Float32

CHUNKS: Final = 7
FROZEN_LAYERS: Final = 5
"""Of MiniLM's six; the last one carries adapters."""
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
class Source:
    """A data set."""

    title: str
    tokens: int
    """Texts are cut to so many."""
    load: Callable[[Path], tuple[list[Example], list[Example]]]
    """Training and test examples, given the folder of assets."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A data set behind the frozen layers. Examples: training first, then `tests` test examples."""

    states: Float32
    """[examples, 1 + CHUNKS, width]"""
    present: NDArray[np.bool_]
    """Whether a stretch holds any token [examples, 1 + CHUNKS]."""
    labels: NDArray[np.int64]
    tests: int

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(self.labels.max()) + 1

    @property
    def training(self) -> int:
        """Number of training examples; the others are for testing."""
        return len(self.labels) - self.tests


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


DATA: Final = {
    "r8": Source(title="Reuters R8", tokens=32, load=_reuters),
    "20news": Source(title="20 Newsgroups", tokens=48, load=_newsgroups),
    "tomatoes": Source(title="Rotten Tomatoes", tokens=32, load=_tomatoes),
}


@cache
def encoded(name: str, assets: Path, store: Path) -> Encoded:
    """The data set, encoded; from `store` if it lies there."""
    source = DATA[name]
    path = store / f"{name}-{source.tokens}-{FROZEN_LAYERS}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process encodes, the others wait for it
        if not path.is_file():
            scratch = path.with_suffix(".part.npz")
            np.savez(scratch, **_encode(source, assets))  # type: ignore[arg-type]
            scratch.rename(path)
    with np.load(path, allow_pickle=False) as found:
        return Encoded(
            states=found["states"],
            present=found["present"],
            labels=found["labels"],
            tests=int(found["tests"]),
        )


def _encode(source: Source, assets: Path) -> dict[str, NDArray[np.generic]]:
    training, testing = (
        _drawn(part, most) for part, most in zip(source.load(assets), (TRAIN, TEST), strict=True)
    )
    examples = training + testing
    names = sorted({e.label for e in training})
    states, present = _states([e.text for e in examples], source.tokens, fetch(MINILM, assets))
    labels = np.array([names.index(e.label) for e in examples])
    return {"states": states, "present": present, "labels": labels, "tests": np.array(len(testing))}


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


def split(encoded_: Encoded, clients: int, *, uneven: bool, seed: int, least: int) -> list[NDArray[np.int64]]:
    """Every client's training examples; who would have fewer than `least` gets some of whoever has most."""
    rng = np.random.default_rng([seed, clients, uneven])
    labels = encoded_.labels[: encoded_.training]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in range(encoded_.classes):
        indices = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet([0.3] * clients) if uneven else np.full(clients, 1 / clients)
        cuts = (np.cumsum(shares)[:-1] * len(indices)).round().astype(int)
        for part, mine in zip(parts, np.split(indices, cuts), strict=True):
            part.extend(mine.tolist())
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(int(rng.integers(len(largest)))))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def seed_bytes(seed: int) -> bytes:
    """The secret that a run's initial values are drawn from."""
    return hashlib.sha256(f"compare/{seed}".encode()).digest()
