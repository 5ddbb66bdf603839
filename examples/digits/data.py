"""Images, base model and split of the digits demo.

The 1 797 digits of 8 x 8 pixels (UCI, Alpaydin and Kaynak 1998) lie in the wheel of scikit-learn, of which one file is
taken. The base model is a small vision transformer that the demo trains from scratch on the first 300 of them, which
count as public; the others are divided among the agents by class.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from client_agent.checkpoint import quiet
from examples.reuters.assets import Wheel

DIGITS: Final = Wheel(
    requirement="scikit-learn==1.9.1",
    prefix="sklearn/datasets/data/",
    files={"digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    target="digits",
)
LABELS: Final = tuple(str(digit) for digit in range(10))
CLASSES: Final[Mapping[str, Sequence[int]]] = {
    "post-office-1": (0, 1, 2, 3),
    "post-office-2": (4, 5, 6),
    "post-office-3": (7, 8, 9),
}
"""The digits that each agent sees."""
PUBLIC, TRAINED = 300, 1300
"""The first digits make the base model, those up to the second number are the agents', the others test."""
SIDE: Final = 16
"""Pixels that an image is scaled to."""
_BRIGHTEST: Final = 16
_EPOCHS, _BATCH, _SEED = 150, 50, 7


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images and what they show."""

    images: NDArray[np.uint8]
    """[count, 8, 8], 0 to 255."""
    labels: NDArray[np.int64]
    """[count], 0 to 9."""

    def part(self, start: int, stop: int | None = None) -> "Digits":
        """Those from `start` up to `stop`."""
        return Digits(self.images[start:stop], self.labels[start:stop])


def read_digits(folder: Path) -> Digits:
    """All of them, in the order of the file."""
    with gzip.open(folder / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels = rows[:, :-1].reshape(-1, 8, 8) * 255 // _BRIGHTEST
    return Digits(pixels.astype(np.uint8), rows[:, -1])


def write_agents(digits: Digits, folder: Path) -> dict[str, int]:
    """Writes a folder of images for every agent: `train` of its classes, `test` of all. Returns training examples."""
    train, test = digits.part(PUBLIC, TRAINED), digits.part(TRAINED)
    counts = {}
    for position, (agent, classes) in enumerate(CLASSES.items()):
        chosen = np.flatnonzero(np.isin(train.labels, classes))
        counts[agent] = write_images(train, chosen, folder / agent / "train")
        write_images(test, np.arange(position, len(test.labels), len(CLASSES)), folder / agent / "test")
    return counts


def write_pooled(digits: Digits, folder: Path) -> None:
    """Writes the images of all agents to one folder, for pooled training."""
    train, test = digits.part(PUBLIC, TRAINED), digits.part(TRAINED)
    write_images(train, np.arange(len(train.labels)), folder / "train")
    write_images(test, np.arange(len(test.labels)), folder / "test")


def write_images(digits: Digits, chosen: NDArray[np.int64], folder: Path) -> int:
    """A PNG file each, in a folder for every class. Returns their number."""
    for index in chosen:
        place = folder / str(digits.labels[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[index]).save(place / f"{index:04}.png")
    return len(chosen)


def write_base(digits: Digits, folder: Path) -> None:
    """Trains a small vision transformer on public digits and saves it, if it is not there yet."""
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        processor = ViTImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    public = digits.part(0, PUBLIC)
    images = [Image.fromarray(image).convert("RGB") for image in public.images]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    labels = torch.from_numpy(public.labels)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = ViTForImageClassification(
            ViTConfig(
                image_size=SIDE,
                patch_size=4,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=128,
                num_labels=len(LABELS),
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        model.train()
        for _ in range(_EPOCHS):
            for chosen in torch.randperm(PUBLIC).split(_BATCH):  # type: ignore[no-untyped-call]  # torch leaves it untyped
                shifts = torch.randint(-2, 3, (2,)).tolist()
                moved = torch.roll(pixels[chosen], shifts, dims=(2, 3))
                moved += 0.2 * torch.randn_like(moved)
                loss = model(pixel_values=moved, labels=labels[chosen]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with quiet():
        model.vit.save_pretrained(folder)  # without its head: the federation has its own
        processor.save_pretrained(folder)
