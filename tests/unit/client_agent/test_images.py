"""Images as people have them: read the same from everywhere, refused by name, trained like texts."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from typer.testing import CliRunner

from client_agent.checkpoint import load_checkpoint, quiet
from client_agent.config import LoraSettings
from client_agent.evaluation import evaluate
from client_agent.images import ImageEncoder, Images, read_images
from client_agent.main import app
from client_agent.model import AdaptedModel
from client_agent.scoring import sensitivity_scores
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.obfuscation import Obfuscation

LABELS = ("left", "right")


def picture(label: str, seed: int) -> Image.Image:
    """Noise, brighter on one side."""
    pixels = np.random.default_rng(seed).integers(0, 100, (12, 10, 3), dtype=np.uint8)
    pixels[:, slice(0, 5) if label == "left" else slice(5, 10)] += 150
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for every class, ten images in each."""
    for label in LABELS:
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            picture(label, number).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


def save_vision(model: PreTrainedModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
        size = {"height": 8, "width": 8}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return save_vision(ViTModel(config, add_pooling_layer=False), tmp_path_factory.mktemp("vit"))


def classifier(folder: Path, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> AdaptedModel:
    made = AdaptedModel(
        load_checkpoint(str(folder), "image-classification", LABELS),
        task="image-classification",
        target_modules=targets,
        lora=LoraSettings(rank=4, alpha=8),
        device=torch.device("cpu"),
    )
    made.initialise(Obfuscation(bytes(range(32)), 1))
    return made


def read(path: Path) -> Images:
    return read_images(path, "image", "label", LABELS)


def by_path(folder: Path, target: Path) -> Path:
    rows = [
        {"image": str(file.relative_to(folder.parent)), "label": file.parent.name} for file in files(folder)
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def in_parquet(folder: Path, target: Path, wrap: Callable[[bytes], object]) -> Path:
    rows = [{"image": wrap(file.read_bytes()), "label": file.parent.name} for file in files(folder)]
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target


def test_images_are_the_same_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    expected = read(folder)
    known = expected.fingerprint()
    assert expected.count_by_label(LABELS) == {"left": 10, "right": 10}
    for path in (
        by_path(folder, tmp_path / "train.jsonl"),
        in_parquet(folder, tmp_path / "raw.parquet", lambda data: data),
        in_parquet(folder, tmp_path / "datasets.parquet", lambda data: {"bytes": data, "path": None}),
    ):
        found = read(path)
        assert found.fingerprint() == known
        assert found.select([12]).pixels(0).tobytes() == picture("right", 2).tobytes()
    (folder / "left" / "notes.txt").write_text("not an image")
    (folder / "left" / "0.png").write_bytes(png(picture("left", 99)))
    assert read(folder).fingerprint() != known


def test_images_are_made_upright_and_rgb(tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("L", (4, 2), 7).save(tmp_path / "left" / "a.jpg", exif=exif)
    image = read(tmp_path).pixels(0)
    assert (image.mode, image.size) == ("RGB", (2, 4))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "none.png", "label": "left"}, "none.png is not an image that can be read: No such file"),
        ({"image": "broken.png", "label": "left"}, "broken.png is not an image that can be read"),
        ({"image": "cut.png", "label": "left"}, "cut.png is not an image that can be read"),
        ({"image": "huge.png", "label": "left"}, "huge.png is not an image that can be read"),
        (
            {"image": "pipe.png", "label": "left"},
            "pipe.png is not an image that can be read: it is not a file",
        ),
        ({"image": "\ud83d.png", "label": "left"}, "that can be read: no file can have this name"),
        ({"image": "x" * 300, "label": "left"}, "that can be read: File name too long"),
        ({"image": 3, "label": "left"}, "line 1: field 'image' must be a path or an image's bytes"),
        ({"image": "a\0b", "label": "left"}, "line 1: field 'image' must be a path or an image's bytes"),
        ({"label": "left"}, "line 1: field 'image' is missing or null (set data.image_field)"),
        ({"image": "a.png"}, "line 1: field 'label' is missing or null (set data.label_field)"),
        ({"image": "a.png", "label": "up"}, "line 1: label 'up' is not one of the federation's: left, right"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, row: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    (tmp_path / "broken.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(png(picture("left", 1))[:-40])
    (tmp_path / "huge.png").write_bytes(png(Image.new("L", (200, 100))))
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DomainError) as caught:
        read(tmp_path / "train.jsonl").pixels(0)
    assert caught.value.reason is Reason.DATA_INVALID
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.message.count("no image that can be read") < 2


def test_a_vision_transformer_learns_and_its_adapter_loads_elsewhere(
    vit_folder: Path, folder: Path, tmp_path: Path
) -> None:
    model, examples = classifier(vit_folder), read(folder)
    encoder = ImageEncoder(model.tokenizer)
    before = evaluate(model, encoder, examples, lambda _: None)
    train(model, encoder, examples, TrainingRun(rates=[0.02] * 40, batch_size=10, seed=3), lambda _: None)
    after = evaluate(model, encoder, examples, lambda _: None)
    assert after.loss < before.loss / 2
    assert after.correct == after.count == 20
    assert {
        name: len(scores)
        for name, scores in sensitivity_scores(model, encoder, examples, lambda _: None).items()
    }
    model.save_adapter(tmp_path / "adapter")
    with quiet():
        base = AutoModelForImageClassification.from_pretrained(
            vit_folder, num_labels=2, ignore_mismatched_sizes=True
        )
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = encoder.batch(examples)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "adapter")
    pixels = processor([examples.pixels(index) for index in range(20)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, model.predict(batch)[0])


def test_a_check_shows_images(agent_folder: Path, vit_folder: Path, folder: Path) -> None:
    config = agent_folder / "agent.yaml"
    lines = config.read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("model:", "data:"))]
    lines += [f"model: {{path: {vit_folder}, device: cpu}}", f"data: {{train: {folder}, test: {folder}}}"]
    config.write_text("\n".join(lines))
    arguments = [
        "check",
        "--offline",
        "--task",
        "image-classification",
        "--target-module",
        "q_proj",
        "--config",
        str(config),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    for expected in (
        "left │ 10 │ 10",
        "all │ 20 │ 20",
        "longest │ 120",
        "12 x 10",
        "becomes 8 x 8",
        "q_proj x 2",
    ):
        assert expected.replace("12 x 10", "10 x 12") in shown, shown
    assert "cut" not in shown.replace("cut to your", "")
