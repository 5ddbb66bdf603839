"""The last block of EfficientNet-Lite0 and the convolution above it, with a head."""

from typing import Final

import torch
from torch import nn
from torch.nn import functional
from transformers import EfficientNetModel

from compare.data import Encoded
from compare.networks.port import Adapters, Classifier
from shelora.lora.layout import Matrix

ADAPTED: Final = ("expand", "project", "top")
"""The convolutions of one pixel, which are matrices; the one between them is of one channel each, and frozen."""


class Lite0(Classifier):
    """Inputs: `states` [examples, positions, channels], what enters the last block, row by row of a square image."""

    def __init__(self, model: EfficientNetModel, data: Encoded) -> None:
        """Takes the model, whose gates of squeeze-and-excitation are open, as those of `examples.lite0`."""
        encoder = model.encoder
        block = encoder.blocks[-1]
        self._convolutions = {
            "expand": block.expansion.expand_conv.weight.detach()[:, :, 0, 0],
            "project": block.projection.project_conv.weight.detach()[:, :, 0, 0],
            "top": encoder.top_conv.weight.detach()[:, :, 0, 0],
        }
        self._norms = {
            "expand": _affine(block.expansion.expand_bn),
            "depth": _affine(block.depthwise_conv.depthwise_norm),
            "project": _affine(block.projection.project_bn),
            "top": _affine(encoder.top_bn),
        }
        self._depth = block.depthwise_conv.depthwise_conv.weight.detach()
        self._states = torch.from_numpy(data.inputs["states"])
        self._expanded = functional.linear(self._states, self._convolutions["expand"])
        self._side = round(self._states.shape[1] ** 0.5)
        self.matrices = tuple(Matrix(name, *self._convolutions[name].shape) for name in ADAPTED)
        super().__init__(data.labels, data.classes, self._convolutions["top"].shape[0])

    def pooled(self, adapters: Adapters, chosen: torch.Tensor) -> torch.Tensor:
        """As of `Classifier`."""
        expanded = adapters.applied("expand", self._states[chosen], self._expanded[chosen])
        wide = self._filtered(functional.relu6(self._normed("expand", expanded)))
        narrow = self._normed("project", self._convolved(adapters, "project", wide))
        top = self._normed("top", self._convolved(adapters, "top", narrow))
        return functional.relu6(top).mean(dim=1)

    def _convolved(self, adapters: Adapters, name: str, x: torch.Tensor) -> torch.Tensor:
        return adapters.applied(name, x, functional.linear(x, self._convolutions[name]))

    def _filtered(self, x: torch.Tensor) -> torch.Tensor:
        """Every channel by its own filter."""
        image = x.mT.reshape(*x.mT.shape[:2], self._side, self._side)
        filtered = functional.conv2d(image, self._depth, padding="same", groups=len(self._depth))
        return functional.relu6(self._normed("depth", filtered.flatten(2).mT))

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self._norms[name]
        return x * scale + shift


def _affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift by channel of a normalisation by stored statistics."""
    state = norm.state_dict()
    scale = state["weight"] / (state["running_var"] + norm.eps).sqrt()
    return scale, state["bias"] - state["running_mean"] * scale
