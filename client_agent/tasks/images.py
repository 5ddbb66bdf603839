"""One label for an image: a classifier on top of the model, trained whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig

from client_agent.config import DataConfig
from client_agent.data import distinct_labels
from client_agent.images import ImageBatch, ImageEncoder, Images, labels_of, read_images, survey_images
from client_agent.survey import Survey
from client_agent.tasks.classification import SequenceClassification
from shelora.federation import TrainingSpec
from shelora.tasks import IMAGE_CLASSIFICATION

_USUAL_SIDE: Final = 224
"""Pixels of an image's side where a configuration says nothing."""


class ImageClassification(SequenceClassification):
    """Images with labels; the loss is of the label."""

    name = IMAGE_CLASSIFICATION
    peft = None  # PEFT has no wrapper for images; the plain one hands on whatever the model takes
    loader = AutoModelForImageClassification
    processor = AutoImageProcessor
    reads_text = False
    pipeline = "image-classification"
    usage = """\
from peft import PeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

labels = AutoConfig.from_pretrained("adapter")  # this folder
base = AutoModelForImageClassification.from_pretrained("BASE", config=labels, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "adapter")
processor = AutoImageProcessor.from_pretrained("adapter")
"""

    def sized_inputs(self, configuration: PreTrainedConfig, tokens: int) -> Mapping[str, torch.Tensor]:
        del tokens
        side = getattr(configuration, "image_size", None) or _USUAL_SIDE
        height, width = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.ones(1, getattr(configuration, "num_channels", 3), height, width)}

    def labels_found(self, data: DataConfig) -> tuple[str, ...]:
        return distinct_labels(
            data.train, data.label_field, labels_of(data.train, data.image_field, data.label_field)
        )

    def read(self, path: Path, data: DataConfig, spec: TrainingSpec) -> Images:  # type: ignore[override]
        return read_images(path, data.image_field, data.label_field, spec.labels, data.cache_dir)

    def encoder(self, tokenizer: Any, limit: int, spec: TrainingSpec) -> ImageEncoder:  # type: ignore[override]  # noqa: ANN401
        del limit, spec
        return ImageEncoder(tokenizer)

    def survey(self, path: Path, data: DataConfig, examples: Any, encoder: Any) -> Survey:  # noqa: ANN401 - its own
        del path, data, encoder
        return survey_images(examples)

    def predictions(self, logits: torch.Tensor, batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return logits, batch.targets

    def target_count(self, batch: ImageBatch) -> int:  # type: ignore[override]
        return len(batch)
