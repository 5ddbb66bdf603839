"""One label for a text: a classifier on top of the model, trained whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import TaskType
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from client_agent.config import DataConfig
from client_agent.data import Examples, found_labels, read_examples
from client_agent.encoding import Encoder, ModelBatch
from client_agent.survey import Survey, survey
from client_agent.tasks.port import Task
from shelora.federation import TrainingSpec
from shelora.tasks import SEQUENCE_CLASSIFICATION, TaskName


class SequenceClassification(Task):
    """Texts with labels; the loss is of the label."""

    name: ClassVar[TaskName] = SEQUENCE_CLASSIFICATION
    peft = TaskType.SEQ_CLS
    loader = AutoModelForSequenceClassification
    has_head = True
    predicts_next = False
    predictions_named = "test examples"
    pipeline = "text-classification"
    usage = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer

known = AutoConfig.from_pretrained("adapter")  # this folder
labels = {"num_labels": known.num_labels, "id2label": known.id2label, "label2id": known.label2id}
model = AutoPeftModelForSequenceClassification.from_pretrained("adapter", **labels)
tokenizer = AutoTokenizer.from_pretrained("adapter")
"""

    def loading(self, labels: Sequence[str]) -> Mapping[str, Any]:
        names = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}

    def labels_found(self, data: DataConfig) -> tuple[str, ...]:
        return found_labels(data.train, data.label_field)

    def read(self, path: Path, data: DataConfig, spec: TrainingSpec) -> Examples:
        return read_examples(
            path,
            data.text_field,
            data.label_field,
            spec.labels,
            pair_field=data.pair_field,
            cache_dir=data.cache_dir,
        )

    def encoder(self, tokenizer: PreTrainedTokenizerBase, limit: int, spec: TrainingSpec) -> Encoder:
        del spec
        return Encoder(tokenizer, limit, append_end=False)

    def survey(self, path: Path, data: DataConfig, examples: Any, encoder: Any) -> Survey:  # noqa: ANN401 - its own
        return survey(path, data.text_field, examples, encoder)

    def predictions(self, logits: torch.Tensor, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return logits, batch.targets

    def target_count(self, batch: ModelBatch) -> int:
        return len(batch.targets)
