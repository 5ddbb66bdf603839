"""A script as one has it: texts with labels, a Trainer. The last lines make it an agent.

python -m examples.own_trainer.script MODEL TRAIN.jsonl TEST.jsonl                  trains alone
python -m examples.own_trainer.script MODEL TRAIN.jsonl TEST.jsonl agent.yaml       takes part in a federation
"""

import json
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from client_agent.federate import federate

LABELS = ("cold", "warm")
"""In the federation's order."""


class Texts(Dataset[dict[str, Any]]):
    """Tokenized lines of a JSONL file."""

    def __init__(self, path: Path, tokenizer: Any) -> None:  # noqa: ANN401 - any tokenizer
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=16)
        self._ids = encoded["input_ids"]
        self._labels = [LABELS.index(row["label"]) for row in rows]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": self._labels[index]}


def made(model: str, train: Path, test: Path) -> Trainer:
    """The trainer, as it was before there was a federation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(LABELS))
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    return Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(
            output_dir="checkpoints",
            per_device_train_batch_size=32,
            learning_rate=0.01,
            max_steps=80,
            weight_decay=0.01,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Texts(train, tokenizer),
        eval_dataset=Texts(test, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


if __name__ == "__main__":
    model, train, test, *agent = sys.argv[1:]
    trainer = made(model, Path(train), Path(test))
    if agent:
        federate(trainer, agent[0])
    else:
        trainer.train()
