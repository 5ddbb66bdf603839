"""A convolutional model on real processes, in complete mode: digits that are drawn here, and a small ResNet."""

import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch
import yaml
from peft import PeftModel
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetModel, ViTImageProcessorPil

from client_agent.checkpoint import quiet
from client_agent.moments import REMEMBERED
from examples.agents import agent_file
from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.e2e import federations

LABELS = ("0", "1", "4", "7")
SIDE = 16
RANKS = {"branch-1": 2, "branch-2": 4, "branch-3": 4}
KEEPS = "branch-2"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of random weights, without a head, and its image processor."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=8, layer_type="basic")
    with quiet():
        ResNetModel(config).save_pretrained(folder)
        size = {"height": SIDE, "width": SIDE}
        ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def draw_digits(folder: Path, count: int, seed: str) -> None:
    """Digits at any place of a noisy image, in a folder for every label."""
    rng, font = random.Random(seed), ImageFont.load_default(size=12)
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        place = folder / label
        place.mkdir(parents=True, exist_ok=True)
        image = Image.new("L", (SIDE, SIDE))
        image.putdata([rng.randrange(60) for _ in range(SIDE * SIDE)])
        ImageDraw.Draw(image).text((rng.randrange(2, 6), rng.randrange(-1, 2)), label, fill=255, font=font)
        image.save(place / f"{index:03}.png")


def specification() -> FederationSpec:
    return FederationSpec.model_validate(
        {
            "name": "digits",
            "training": {
                "base_model": "tiny-resnet",
                "task": "image-classification",
                "labels": LABELS,
                "target_modules": ["convolution"],
                "local_steps": 20,
                "batch_size": 32,
                "learning_rate": 0.01,
                "evaluation_examples": 0,
            },
            "round": {"rounds": 2, "clients": 3, "min_updates": 3, "deadline_s": 120},
        }
    )


async def start_agent(cluster: LocalCluster, name: str, resnet: Path, folder: Path) -> Process:
    home = folder / name
    await cluster.enrol_client("digits", name, home / "state")
    draw_digits(home / "train", 96, seed=name)
    content: dict[str, Any] = agent_file(cluster.addresses, federation="digits", name=name, model=resnet) | {
        "data": {"train": "train"},
        "lora": {"rank": RANKS[name], "alpha": 2.0 * RANKS[name]},
        "training": {"optimizer_state": "keep" if name == KEEPS else "reset"},
    }
    path = home / "agent.yaml"
    path.write_text(yaml.safe_dump(content))
    return cluster.spawn(name, "client_agent.main", ["run", "--config", str(path)], {})


def right(resnet: Path, adapter: Path, images: Path) -> int:
    """How many images PEFT tells rightly with the adapter that an agent saved."""
    with quiet():
        base = AutoModelForImageClassification.from_pretrained(resnet, num_labels=len(LABELS))
        model = PeftModel.from_pretrained(base, adapter).eval()
        processor = ViTImageProcessorPil.from_pretrained(adapter)
    files = sorted(images.glob("*/*.png"))
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.inference_mode():
        found = model(**pixels).logits.argmax(dim=1).tolist()
    return sum(LABELS[one] == file.parent.name for one, file in zip(found, files, strict=True))


async def test_convolutions_are_tuned_by_agents_of_different_ranks(
    cluster: LocalCluster, resnet: Path, tmp_path: Path
) -> None:
    """One of them keeps its optimizer's state."""
    spec = specification()
    agents = [await start_agent(cluster, name, resnet, tmp_path) for name in RANKS]
    await federations.start(cluster, spec)
    federation = await federations.wait_until_over(cluster, spec, agents)

    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    assert [summary.update_count for summary in training_rounds(federation)] == [3, 3]
    draw_digits(tmp_path / "new", 80, seed="new")
    for name in RANKS:
        adapter = tmp_path / name / "state/adapter"
        factors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
        kernels = [value for key, value in factors.items() if ".convolution.lora_A" in key]
        assert {kernel.shape[2:] for kernel in kernels} == {(3, 3), (1, 1), (7, 7)}
        assert right(resnet, adapter, tmp_path / "new") > 40  # 20 by chance
    kept = safetensors.numpy.load_file(tmp_path / KEEPS / "state/applied.safetensors")
    assert kept["moments/steps"] == REMEMBERED
    other = safetensors.numpy.load_file(tmp_path / "branch-1/state/applied.safetensors")
    assert "moments/steps" not in other
