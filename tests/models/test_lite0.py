"""The pretrained vision model of the guide: its logits are those of the package that its weights come from."""

import importlib
import sys
from pathlib import Path
from typing import Final

import pytest
import torch

from client_agent.checkpoint import load_checkpoint, usual_targets
from client_agent.config import LoraSettings
from client_agent.images import ImageBatch
from client_agent.model import AdaptedModel
from client_agent.preparation import rehearse
from examples.lite0 import LITE0, converted, write_lite0
from examples.local import ASSETS
from examples.reuters.assets import Wheel, fetch
from shelora.obfuscation import Obfuscation

PACKAGE: Final = Wheel(
    requirement="efficientnet-lite-pytorch==0.1.0",
    prefix="efficientnet_lite_pytorch/",
    files={
        "__init__.py": "18c809b4dde3430409cd9a68a931bddb0d24ab11cc85cd0a3ab94fe6e4e3f7b3",
        "model.py": "30b407fb0d051526eb1e79ce81d28f998373ed23881270c3a3db958c86b597f8",
        "utils.py": "340d558dda081eab08ff85873dc4400b7305ea76de3131836852f2dacb402f68",
    },
    target="efficientnet_lite_pytorch",
)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The package's own model."""
    fetch(PACKAGE, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = importlib.import_module(PACKAGE.target)
    model: torch.nn.Module = package.EfficientNet.from_name("efficientnet-lite0").eval()
    for name in [name for name in sys.modules if name.startswith(PACKAGE.target)]:
        monkeypatch.delitem(sys.modules, name)
    (file,) = LITE0.files
    model.load_state_dict(torch.load(fetch(LITE0, ASSETS) / file, weights_only=True))
    return model


def test_its_logits_are_the_package_s_own_and_it_can_be_trained(
    theirs: torch.nn.Module, tmp_path: Path
) -> None:
    ours = converted(fetch(LITE0, ASSETS))
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs(pixels)
        found = ours(pixel_values=pixels).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    write_lite0(tmp_path / "lite0", ASSETS, 64)
    targets = usual_targets(str(tmp_path / "lite0"))
    labels = ("cat", "dog")
    model = AdaptedModel(
        load_checkpoint(str(tmp_path / "lite0"), "image-classification", labels),
        task="image-classification",
        target_modules=targets,
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )
    model.initialise(Obfuscation(bytes(32), 1))
    assert len(model.matrices) == 31
    rehearse(model, ImageBatch(pixels[:, :, :64, :64], torch.tensor([0, 1, 0, 1])))
