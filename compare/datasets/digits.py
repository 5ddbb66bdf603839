"""Handwritten digits, and what the frozen lower blocks of EfficientNet-Lite0, trained on ImageNet, make of them."""

from pathlib import Path
from typing import Final

import torch
from PIL import Image
from transformers import AutoImageProcessor, EfficientNetModel

from client_agent.checkpoint import quiet
from compare.data import Encoded
from compare.networks.lite0 import Lite0
from examples.digits.data import DIGITS, TRAINED, read_digits
from examples.lite0 import write_lite0
from examples.reuters.assets import fetch

SIDE: Final = 64
"""Pixels that images are scaled to: 2 x 2 positions enter the last block."""
AT_ONCE: Final = 100
"""Images that the frozen blocks see at once."""


class Digits:
    """The 1 797 digits of the vision demo: the first TRAINED train, the others test."""

    file = f"digits-lite0-{SIDE}.npz"

    @torch.no_grad()
    def encode(self, assets: Path) -> Encoded:
        """As of `DataSet`."""
        digits = read_digits(fetch(DIGITS, assets))
        images = [Image.fromarray(image).convert("RGB") for image in digits.images]
        folder = _folder(assets)
        model = _model(folder)
        with quiet():
            processor = AutoImageProcessor.from_pretrained(folder)
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        states = torch.cat([below(model, part) for part in pixels.split(AT_ONCE)])
        return Encoded(
            inputs={"states": states.flatten(2).mT.contiguous().numpy()},
            labels=digits.labels,
            tests=len(digits.labels) - TRAINED,
        )

    def network(self, encoded: Encoded, assets: Path) -> Lite0:
        """As of `DataSet`."""
        return Lite0(_model(_folder(assets)), encoded)


def _folder(assets: Path) -> Path:
    folder = assets / f"efficientnet-lite0-{SIDE}"
    write_lite0(folder, assets, SIDE)
    return folder


def _model(folder: Path) -> EfficientNetModel:
    with quiet():  # the classifier of ImageNet's classes is not used
        return EfficientNetModel.from_pretrained(folder).eval()


def below(model: EfficientNetModel, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the last block [images, channels, rows, columns]."""
    states: torch.Tensor = model.embeddings(pixels)
    for block in model.encoder.blocks[:-1]:
        states = block(states)
    return states
